"""Packing: every token once, rows begin with BOS, labels stay inside their document, the order resumes."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.documents import Ints
from finetune.data.packing import Cursor, Packer, cut, pack
from finetune.loss import IGNORE

BOS = 1


@dataclass(frozen=True)
class Lists:
    """Documents in memory: each token names its document and place."""

    lengths: Ints
    bos_id: int = BOS

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        whole = 1000 * (document + 1) + np.arange(int(self.lengths[document]))
        whole[0] = BOS
        return whole[start:stop]


def documents(*lengths: int) -> Lists:
    return Lists(np.array(lengths))


LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)
ROW = st.integers(2, 50)


@given(LENGTHS, ROW)
def test_pieces_cover_each_document_in_order_and_fit_a_row(lengths: list[int], seq_len: int) -> None:
    pieces = cut(np.array(lengths), seq_len)
    assert pieces.lengths.max() <= seq_len
    assert pieces.lengths.min() >= 2
    for document, length in enumerate(lengths):
        mine = pieces.document == document
        starts, stops = pieces.start[mine].tolist(), pieces.stop[mine].tolist()
        assert [*starts, length] == [0, *stops]


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_packing_keeps_every_piece_once_and_no_row_overflows(lengths: list[int], capacity: int) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


def test_packing_wastes_little_on_documents_of_mixed_lengths() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 2000)
    rows, _ = Packer(documents(*lengths), 512).take(Cursor(), 300)
    packer = Packer(documents(*lengths), 512)
    used = sum(int(packer.lengths[i]) for row in rows for i in row)
    assert used > 0.97 * 512 * len(rows)


@settings(max_examples=50)
@given(LENGTHS, ROW)
def test_every_token_of_a_row_is_labelled_within_its_own_document(lengths: list[int], seq_len: int) -> None:
    packer = Packer(documents(*lengths), seq_len)
    batch = packer.batch(packer.in_order(len(lengths)))
    assert batch.doc_ids is not None
    starts = batch.positions == 0
    assert (batch.tokens[starts & (batch.tokens != 0)] == BOS).all()  # no document is seen without its BOS
    assert (batch.tokens[:, 0] == BOS).all()
    labelled = batch.labels != IGNORE
    assert (batch.labels[labelled] != BOS).all()  # the end of a document predicts nothing
    inner = labelled[:, :-1]
    assert (batch.labels[:, :-1][inner] == batch.tokens[:, 1:][inner]).all()  # shifted once
    assert (batch.doc_ids[:, 1:][inner] == batch.doc_ids[:, :-1][inner]).all()
    # Each token but a document's BOS is predicted once; a later piece's first token from its own BOS.
    expected = Counter(int(t) for d in range(len(lengths)) for t in documents(*lengths).tokens(d, 1, lengths[d]))
    assert Counter(batch.labels[labelled].tolist()) == expected
    assert batch.valid == int(labelled.sum()) == sum(lengths) - len(lengths)


def test_labels_positions_and_ids_of_a_small_row() -> None:
    batch = Packer(documents(4, 3), 9).batch([[0, 1]])
    assert batch.tokens.tolist() == [[BOS, 1001, 1002, 1003, BOS, 2001, 2002, 0, 0]]
    assert batch.labels.tolist() == [[1001, 1002, 1003, IGNORE, 2001, 2002, IGNORE, IGNORE, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch.doc_ids is not None
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]


def test_padding_is_masked_by_length_even_where_a_document_holds_the_same_ids() -> None:
    class Zeros(Lists):
        def tokens(self, document: int, start: int, stop: int) -> Ints:
            return np.zeros(stop - start, dtype=np.int64)

    batch = Packer(Zeros(np.array([5])), 8).batch([[0]])
    assert batch.labels.tolist() == [[0, 0, 0, 0, IGNORE, IGNORE, IGNORE, IGNORE]]


def test_without_the_document_mask_positions_run_on_and_labels_stay() -> None:
    batch = Packer(documents(4, 3), 8, doc_mask=False).batch([[0, 1]])
    assert batch.doc_ids is None
    assert batch.positions.tolist() == [list(range(8))]
    assert batch.labels.tolist() == Packer(documents(4, 3), 8).batch([[0, 1]]).labels.tolist()


def test_an_epoch_holds_every_piece_once_and_the_next_one_in_another_order() -> None:
    packer = Packer(documents(*range(2, 200)), 64, seed=3)
    orders = []
    cursor = Cursor()
    for epoch in (0, 1):
        seen: list[int] = []
        while cursor.epoch == epoch and packer.window(cursor.epoch, cursor.window):
            rows, cursor = packer.take(cursor, 1)
            seen += [i for row in rows for i in row]
        assert sorted(seen) == list(range(len(packer.lengths)))
        orders.append(seen)
        cursor = Cursor(epoch + 1)
    assert orders[0] != orders[1]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_taking_rows_in_two_parts_equals_taking_them_at_once(a: int, b: int, seed: int) -> None:
    lengths = documents(*range(2, 60))
    first, cursor = Packer(lengths, 64, seed=seed).take(Cursor(), a)
    second, end = Packer(lengths, 64, seed=seed).take(cursor, b)  # a new one, as after a resume
    whole, whole_end = Packer(lengths, 64, seed=seed).take(Cursor(), a + b)
    assert first + second == whole
    assert end == whole_end


def test_the_order_depends_on_the_seed_alone() -> None:
    take = lambda seed: Packer(documents(*range(2, 60)), 64, seed=seed).take(Cursor(), 9)[0]
    assert take(1) == take(1)
    assert take(1) != take(2)


@pytest.mark.parametrize("lengths", [(), (1, 1)])
def test_documents_without_a_token_to_predict_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no document has a token to predict"):
        Packer(Lists(np.array(lengths, dtype=np.int64)), 8)


def test_messages_can_name_the_documents_of_a_row() -> None:
    packer = Packer(documents(100, 5, 7), 16)
    rows, _ = packer.take(Cursor(), len(packer.lengths))
    assert packer.documents_in(rows) == [0, 1, 2]
    assert torch.equal(packer.batch(rows).tokens, packer.batch(rows).tokens)
