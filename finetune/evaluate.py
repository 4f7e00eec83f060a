"""Validation loss in nats per token and, since that depends on the tokenizer, in bits per byte of text; the same of a
bigram model fitted on the training tokens, which a model that has learned anything beats.

    bits per byte = nats of all held-out tokens / ln 2 / bytes of their text

Run as a command it is finetune.scoring: checkpoints side by side on a text, and in tasks.

    python -m finetune.evaluate --ckpt A --ckpt B --data FILE
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from finetune.data.documents import Bools, Documents, Ints, MaskedDocuments, first_documents, whole, whole_mask
from finetune.data.packing import Packer, Packing
from finetune.parallelize import World
from nanollama.tokenizer import Tokenizer

BIGRAM_TOKENS = 20_000_000  # training tokens that the bigram is fitted on, at most
PRIOR_COUNTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token
    bpb: float  # bits per byte
    more: dict[str, float] = field(default_factory=dict)  # of losses that have more to say


@dataclass(frozen=True)
class HeldOut:
    """What is evaluated: whole documents, packed, and the bytes of their text."""

    packer: Packing
    rows: list[list[int]]
    documents: int
    text_bytes: int  # of the labels
    tokens: int  # labels

    def score(self, nats: float, tokens: int) -> Score:
        return Score(nats / tokens, nats / math.log(2) / self.text_bytes)


@dataclass(frozen=True)
class Beginning:
    """The first tokens of one document, as Documents: a whole book would be validated on otherwise."""

    documents: Documents
    lengths: Ints

    @property
    def bos_id(self) -> int | None:
        return self.documents.bos_id

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return self.documents.tokens(document, start, stop)


def hold_out(packer: Packing, tokenizer: Tokenizer, max_tokens: int) -> HeldOut:
    """The first documents, about `max_tokens` of them and at least one; of one that is far longer its beginning."""
    documents = packer.documents
    if isinstance(packer, Packer) and documents.lengths[0] > 2 * max_tokens and not _is_masked(documents):
        documents = Beginning(documents, np.array([max(max_tokens, 2)]))  # two tokens, one to predict
        packer = Packer(documents, packer.seq_len, doc_mask=packer.doc_mask)
    count = first_documents(documents, max_tokens)
    special = np.array(sorted(tokenizer.special_ids.values()), dtype=np.int64)
    labels = [whole(documents, i)[_labels(documents, i)] for i in range(count)]
    # The names of special tokens are no text: <|eot_id|> is one label and no byte.
    texts = (tokenizer.decode(ids[~np.isin(ids, special)].tolist()) for ids in labels)
    bytes_of_text = sum(len(text.encode()) for text in texts)
    return HeldOut(packer, packer.in_order(count), count, max(1, bytes_of_text), sum(map(len, labels)))


def _is_masked(documents: Documents) -> bool:
    """Dialogues and pairs are never longer than a row."""
    return isinstance(documents, MaskedDocuments)


def _labels(documents: Documents, i: int) -> Bools:
    """Which tokens of one document are predicted: never its first."""
    mask = whole_mask(documents, i).copy()
    mask[:1] = False
    return mask


@torch.no_grad()
def evaluate(model: nn.Module, held_out: HeldOut, world: World, batch_size: int, autocast: torch.autocast) -> Score:
    """Score `model` (a LossModel or what compiles it) on the held-out rows, shared among the ranks."""
    was_training = model.training
    model.eval()
    mine = held_out.rows[world.data_rank :: world.data_size]
    most = -(-len(held_out.rows) // world.data_size)  # rows of any rank: shards are gathered by all ranks together
    nats, tokens = 0.0, 0
    for i in range(0, most, batch_size):
        rows = mine[i : i + batch_size]
        batch = held_out.packer.batch(rows + [[]] * (batch_size - len(rows))).to(world.device)
        with autocast:
            nats += model(*batch.inputs()).item()
        tokens += batch.valid
    model.train(was_training)
    total_nats, total_tokens = world.sum([nats, float(tokens)]).tolist()
    return held_out.score(total_nats, int(total_tokens))


def bigram(train: Documents, held_out: HeldOut, vocab_size: int) -> Score:
    """An interpolated bigram: (count(a, b) + k p(b)) / (count(a) + k), with the k that suits the held-out text best."""
    first, second = _pairs(train, first_documents(train, BIGRAM_TOKENS))
    codes, counts = np.unique(first * vocab_size + second, return_counts=True)
    of_first = np.bincount(first, minlength=vocab_size)
    unigram = (np.bincount(second, minlength=vocab_size) + 1) / (len(second) + vocab_size)
    a, b = _pairs(held_out.packer.documents, held_out.documents)
    place = np.minimum(np.searchsorted(codes, a * vocab_size + b), len(codes) - 1)
    seen = np.where(codes[place] == a * vocab_size + b, counts[place], 0)
    nats = [-np.log((seen + k * unigram[b]) / (of_first[a] + k)).sum() for k in PRIOR_COUNTS]
    return held_out.score(float(min(nats)), len(b))


def _pairs(documents: Documents, count: int) -> tuple[Ints, Ints]:
    """All neighbouring tokens within the first `count` documents whose second one is a label."""
    texts = [(whole(documents, i), whole_mask(documents, i)[1:]) for i in range(count)]
    return np.concatenate([t[:-1][mask] for t, mask in texts]), np.concatenate([t[1:][mask] for t, mask in texts])


def loss_model_of(module: nn.Module) -> nn.Module:
    """The LossModel inside DDP's wrapper: ranks with different numbers of rows must not wait for each other."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    return inner


if __name__ == "__main__":
    from finetune.scoring import evaluate_checkpoints
    from nanollama.cli import run

    run(evaluate_checkpoints)
