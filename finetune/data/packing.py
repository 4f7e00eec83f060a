"""Documents -> packed rows: every row begins with a document's BOS, positions restart with each document, and the
label at a document's last token is ignored, so a packed row trains exactly like its documents one by one.

A document longer than a row is cut into pieces, each with a BOS of its own, or, where the tokenizer has none, with the
last token of the piece before. Pieces are shuffled by (seed, epoch) and
packed window by window, best fit first, without splitting any. The order depends on nothing else, so a cursor of three
integers is the whole state of the loader, and a resumed run continues at the same row.

    >>> pack(np.array([5, 3, 2, 6]), 8)
    [[3, 2], [0, 1]]
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.data.documents import IGNORE, Bools, Documents, Ints, mask_of
from finetune.errors import UserError

COUNTED_WINDOWS = 100
WINDOW_ROWS = 64  # rows packed together: enough to fill them to about 99%, few enough to be instant


@dataclass(frozen=True)
class Pieces:
    """Documents cut to fit a row: piece i is tokens start..stop of its document, after one more where start > 0."""

    document: Ints
    start: Ints
    stop: Ints

    @property
    def lengths(self) -> Ints:
        """Tokens that each piece takes in a row."""
        return self.stop - self.start + (self.start > 0)


@dataclass(frozen=True)
class Cursor:
    """The next row to be read."""

    epoch: int = 0
    window: int = 0
    row: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, all (B, T) int64."""

    tokens: Tensor
    labels: Tensor  # the next token, or IGNORE
    positions: Tensor
    doc_ids: Tensor | None  # 0, 1, ... along a row, the padding at its end counts as one more; None: no document mask
    valid: int  # labels that are not IGNORE

    @property
    def count(self) -> int:
        """What the summed loss is divided by."""
        return self.valid

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What a LossModel takes."""
        return self.tokens, self.labels, self.positions, self.doc_ids

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        doc_ids = None if self.doc_ids is None else move(self.doc_ids)
        return Batch(move(self.tokens), move(self.labels), move(self.positions), doc_ids, self.valid)


def cut(lengths: Ints, seq_len: int) -> Pieces:
    """Cut documents of the given lengths into pieces of at most `seq_len` tokens."""
    # The first piece has its BOS already; each later one gives a place to the token that leads it.
    counts = 1 + np.maximum(0, -(-(lengths - seq_len) // (seq_len - 1)))
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.where(nth == 0, 0, seq_len + (nth - 1) * (seq_len - 1))
    stop = np.minimum(lengths[document], seq_len + nth * (seq_len - 1))
    return Pieces(document, start, stop)


def pack(lengths: Ints, capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`: the longest first, each where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(room, (length, -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        insort(room, (free - length, row))
    return rows


class MicroBatch(Protocol):
    """What a loss is computed on at a time."""

    @property
    def valid(self) -> int:
        """Labels that are not IGNORE."""

    @property
    def count(self) -> int:
        """What the summed loss is divided by."""

    def inputs(self) -> tuple[Any, ...]:
        """What the loss's model takes."""

    def to(self, device: torch.device) -> "MicroBatch": ...
    def pinned(self) -> "MicroBatch": ...


class Packing(Protocol):
    """Rows in a fixed order, as `Packer` makes them."""

    @property
    def documents(self) -> Documents: ...
    def holds(self, cursor: Cursor) -> bool: ...
    def take(self, cursor: Cursor, count: int) -> tuple[list[list[int]], Cursor]: ...
    def in_order(self, documents: int) -> list[list[int]]: ...
    def batch(self, rows: Sequence[Sequence[int]]) -> MicroBatch: ...
    def documents_in(self, rows: Sequence[Sequence[int]]) -> list[int]: ...
    def rows_an_epoch(self) -> int: ...


class Packer:
    """Rows of packed pieces in a fixed order."""

    def __init__(self, documents: Documents, seq_len: int, *, seed: int = 0, doc_mask: bool = True) -> None:
        """Raises UserError when there is nothing to predict."""
        if not len(documents.lengths) or documents.lengths.max() < 2:
            raise UserError("no document has a token to predict")
        self.documents, self.seq_len, self.seed, self.doc_mask = documents, seq_len, seed, doc_mask
        self.pieces = cut(documents.lengths, seq_len)
        self.lengths = self.pieces.lengths
        self.window_pieces = max(1, round(WINDOW_ROWS * seq_len / float(self.lengths.mean())))
        self._windows: dict[tuple[int, int], list[list[int]]] = {}
        self._orders: dict[int, Ints] = {}

    def window(self, epoch: int, window: int) -> list[list[int]]:
        """The rows of one window, each a list of pieces; empty past the end of the epoch."""
        if (epoch, window) not in self._windows:
            if epoch not in self._orders:
                self._orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))}
            members = self._orders[epoch][window * self.window_pieces : (window + 1) * self.window_pieces]
            rows = [members[row].tolist() for row in pack(self.lengths[members], self.seq_len)]
            np.random.default_rng((self.seed, epoch, window)).shuffle(rows)  # best fit sorts them by length
            self._windows = {(epoch, window): rows}
        return self._windows[epoch, window]

    def holds(self, cursor: Cursor) -> bool:
        """Whether a run over these rows can have come there; from elsewhere `take` may look for its row for ever."""
        rows = self.window(cursor.epoch, cursor.window)
        if rows or not cursor.window:
            return cursor.row < max(1, len(rows))
        return cursor.row == 0 and bool(self.window(cursor.epoch, cursor.window - 1))  # the end of the epoch

    def take(self, cursor: Cursor, count: int) -> tuple[list[list[int]], Cursor]:
        """The next `count` rows, over the ends of windows and epochs, and the cursor behind them."""
        rows: list[list[int]] = []
        while len(rows) < count:
            window = self.window(cursor.epoch, cursor.window)
            if not window:
                cursor = Cursor(cursor.epoch + 1)
                continue
            got = window[cursor.row : cursor.row + count - len(rows)]
            rows += got
            cursor = Cursor(cursor.epoch, cursor.window, cursor.row + len(got))
            if cursor.row == len(window):
                cursor = Cursor(cursor.epoch, cursor.window + 1)
        return rows, cursor

    def rows_an_epoch(self) -> int:
        """Rows of one pass over the documents: counted where that is quick, else reckoned from the first windows."""
        windows = -(-len(self.lengths) // self.window_pieces)
        counted = min(windows, COUNTED_WINDOWS)
        rows = sum(len(self.window(0, window)) for window in range(counted))
        return rows if counted == windows else round(rows * windows / counted)

    def in_order(self, documents: int) -> list[list[int]]:
        """The pieces of the first `documents` documents, packed: for evaluation."""
        count = int(np.searchsorted(self.pieces.document, documents))
        return pack(self.lengths[:count], self.seq_len)

    def piece(self, index: int) -> Ints:
        """Tokens of one piece, BOS first. Without one a later piece begins with the token before it."""
        document, start, stop = (int(a[index]) for a in (self.pieces.document, self.pieces.start, self.pieces.stop))
        bos_id = self.documents.bos_id
        if not start or bos_id is None:
            return self.documents.tokens(document, max(start - 1, 0), stop)
        return np.concatenate(([bos_id], self.documents.tokens(document, start, stop)))

    def piece_mask(self, index: int) -> Bools:
        """Which tokens of one piece are labels; what was put before it is none."""
        document, start, stop = (int(a[index]) for a in (self.pieces.document, self.pieces.start, self.pieces.stop))
        mask = mask_of(self.documents, document, start, stop)
        return np.concatenate(([False], mask)) if start else mask

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Tokens, labels, positions and document ids of `rows`."""
        shape = (len(rows), self.seq_len)
        tokens, positions, doc_ids = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        labels = np.full(shape, IGNORE, dtype=np.int64)
        for r, row in enumerate(rows):
            for number, begin, ids, said in self._placed(row):
                end = begin + len(ids)
                tokens[r, begin:end] = ids
                labels[r, begin : end - 1] = np.where(said[1:], ids[1:], IGNORE)
                positions[r, begin:] = np.arange(self.seq_len - begin)  # the last one counts on into the padding
                doc_ids[r, begin:end] = number
                doc_ids[r, end:] = number + 1
        if not self.doc_mask:
            positions[:] = np.arange(self.seq_len)
        mask = torch.from_numpy(doc_ids) if self.doc_mask else None
        valid = int((labels != IGNORE).sum())
        tensors = [torch.from_numpy(a) for a in (tokens, labels, positions)]
        return Batch(tensors[0], tensors[1], tensors[2], mask, valid)

    def _placed(self, row: Sequence[int]) -> Iterator[tuple[int, int, Ints, Bools]]:
        """(number in the row, first place, tokens, which of them are labels) of each piece."""
        begin = 0
        for number, index in enumerate(row):
            ids = self.piece(index)
            yield number, begin, ids, self.piece_mask(index)
            begin += len(ids)

    def documents_in(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The documents that the rows hold parts of, for messages."""
        return sorted({int(self.pieces.document[index]) for row in rows for index in row})
