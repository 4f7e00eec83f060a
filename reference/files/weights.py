"""Lazy weights by Meta names: memory-mapped parts, merged, permuted and converted only when they are read.

A weight is one or more mapped parts (model-parallel shards) to be joined along one dimension. Hugging Face files keep
the rows of wq and wk in another order than Meta's (rotary pairs (j, j + D/2) instead of (2j, 2j+1)); the permutation
here is this package's own, so that an error in another reader's permutation cannot hide.

    weights = open_folder(path).weights              # reference.files
    weights.rows("tok_embeddings.weight", 0, 10)     # reads ten rows
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nanollama.gate import CheckpointError

T = TypeVar("T")

BLOCK_BYTES = 1 << 26  # rows are merged, converted and hashed in blocks of this size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Unusable(ValueError):
    """Input that cannot be used. The message is one line: what, where, how to mend it."""


def through_gate(check: Callable[[Path], T], path: Path) -> T:
    """What the gate that all sides share says of a file, its refusal as Unusable."""
    try:
        return check(path)
    except CheckpointError as error:
        raise Unusable(str(error)) from None


@dataclass(frozen=True)
class Source:
    """Where one weight lies: `parts` joined along `dim`; each of them stands `copies` times in a row."""

    parts: tuple[Tensor, ...]
    dim: int = 0
    copies: int = 1  # kv heads repeated over more shards than there are heads
    label: str = ""  # for messages

    @property
    def shape(self) -> tuple[int, ...]:
        first = list(self.parts[0].shape)
        first[self.dim] = sum(part.shape[self.dim] for part in self.parts[:: self.copies])
        return tuple(first)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def single(self) -> Tensor | None:
        """The mapped tensor itself, where no merging is needed."""
        whole = len(self.parts) == self.copies and self.parts[0].is_contiguous()
        return self.parts[0] if whole else None

    def check_copies(self) -> None:
        for first in range(0, len(self.parts), self.copies):
            for other in range(first + 1, first + self.copies):
                if not torch.equal(self.parts[first], self.parts[other]):
                    raise Unusable(f"{self.label}: shards {first} and {other} should repeat the same heads and differ")


def half_split_rows(n_heads: int, head_dim: int) -> Tensor:
    """For each row of a q/k matrix in Meta's order, the row of the Hugging Face matrix that it is."""
    rows = torch.arange(n_heads * head_dim).view(n_heads, 2, head_dim // 2)  # HF: pair member p, then frequency j
    return rows.transpose(1, 2).reshape(-1)  # Meta: frequency j, then pair member p


def interleaved_rows(n_heads: int, head_dim: int) -> Tensor:
    """The inverse of `half_split_rows`: for each row in Hugging Face order, the Meta row that it is."""
    rows = torch.arange(n_heads * head_dim).view(n_heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


class Weights(Mapping[str, Tensor]):
    """Weights keyed by Meta names. `weights[name]` is in Meta's layout and in the stored dtype."""

    def __init__(self, sources: Mapping[str, Source], *, layout: str, head_dim: int):
        self._sources = dict(sources)
        self.layout = layout  # "meta" or "hf": the row order of wq and wk in the files
        self.head_dim = head_dim

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, name: str) -> Tensor:
        return self.load(name, self._sources[name].dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape for name, source in self._sources.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: source.dtype for name, source in self._sources.items()}

    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def is_mapped(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the weight can be used in place, with no merging and no conversion (wq and wk may be permuted)."""
        source = self._sources[name]
        return source.dtype == dtype and source.single() is not None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.load(name, self._sources[name].dtype, start=start, stop=stop)

    def load(
        self,
        name: str,
        dtype: torch.dtype,
        *,
        layout: str = "meta",
        start: int = 0,
        stop: int | None = None,
        copy: bool = False,
    ) -> Tensor:
        """Rows [start, stop) at `dtype`: a view of the mapped file where nothing has to change, else fresh memory."""
        source = self._sources[name]
        stop = source.shape[0] if stop is None else min(stop, source.shape[0])
        order = self._row_order(name, layout)
        single = source.single()
        if order is None and not copy and single is not None and source.dtype == dtype:
            return single[start:stop]
        if source.copies > 1:
            source.check_copies()
        out = torch.empty((stop - start, *source.shape[1:]), dtype=dtype)
        if order is None:
            _copy_rows_(out, source, start)
        else:
            _gather_rows_(out, source, order[start:stop])
        return out

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., T) token ids -> (..., T, dim), reading the rows of those tokens only."""
        ids, places = tokens.unique(return_inverse=True)
        rows = [self.load("tok_embeddings.weight", dtype, start=i, stop=i + 1) for i in ids.tolist()]
        return torch.cat(rows)[places]

    def crc32(self, name: str) -> int:
        """zlib.crc32 of the contiguous little-endian bytes in the stored dtype and Meta's layout."""
        shape, value = self._sources[name].shape, 0
        for start, stop in row_blocks(shape, self._sources[name].dtype):
            block = self.rows(name, start, stop).contiguous()
            value = zlib.crc32(block.view(torch.uint8).numpy().data, value)
        return value

    def _row_order(self, name: str, layout: str) -> Tensor | None:
        if layout == self.layout or not name.endswith((".wq.weight", ".wk.weight")):
            return None
        n_heads = self._sources[name].shape[0] // self.head_dim
        order = half_split_rows if layout == "meta" else interleaved_rows
        return order(n_heads, self.head_dim)


def row_blocks(shape: tuple[int, ...], dtype: torch.dtype, block_bytes: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Row ranges of about `block_bytes` each, cut at multiples of 256 rows."""
    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    step = max(256, block_bytes // row_bytes // 256 * 256)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _copy_rows_(out: Tensor, source: Source, start: int) -> None:
    """Fill `out` with rows from `start` on. copy_ converts as it goes: no second copy of the weight exists."""
    parts = source.parts[:: source.copies]
    if source.dim == 1:
        column = 0
        for part in parts:
            out[:, column : column + part.shape[1]].copy_(part[start : start + len(out)])
            column += part.shape[1]
        return
    first = 0  # row of the merged weight at which the part begins
    for part in parts:
        low, high = max(start, first), min(start + len(out), first + len(part))
        if low < high:
            out[low - start : high - start].copy_(part[low - first : high - first])
        first += len(part)


def _gather_rows_(out: Tensor, source: Source, order: Tensor) -> None:
    """Fill `out` with the rows `order` of the merged weight, block by block to bound the memory."""
    parts = source.parts[:: source.copies]
    merged = parts[0] if len(parts) == 1 else torch.cat(parts, dim=source.dim)
    for low, high in row_blocks(tuple(out.shape), out.dtype):
        out[low:high].copy_(merged[order[low:high]])
