"""What every reader returns: a config and weights that stay in the file until they are asked for.

`Weights` maps Meta's names to tensors. A whole tensor of a single memory-mapped file is a view of it; shards are
merged, q/k rows reordered and quantized blocks expanded when a tensor (or a range of its rows) is read, never before.

    python -c "from nanollama.checkpoint import open_checkpoint; print(open_checkpoint('DIR').weights.shapes)"
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanollama.checkpoint.names import EMBEDDING, weight_shapes
from nanollama.checkpoint.spellings import misshapen
from nanollama.gate import CheckpointError
from nanollama.model import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED_DTYPES = {name.upper().replace("FP", "F"): dtype for name, dtype in DTYPES.items()}  # of safetensors and GGUF


@dataclass(frozen=True)
class Lazy:
    """One weight in a file: `read(start, stop)` returns those rows as a tensor of `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def lazy(tensor: Tensor) -> Lazy:
    """A tensor that is already there (in memory or memory-mapped)."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


class Weights(Mapping[str, Tensor]):
    """Meta's names -> tensors, read at each access and not kept.

    shapes: every name and its shape. dtypes: the same for dtypes. dtype: that of the embedding, which real files give
    to all large matrices.
    """

    def __init__(self, entries: Mapping[str, Lazy]) -> None:
        self._entries = dict(entries)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}
        self.dtype = self.dtypes[EMBEDDING]

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.read(0, entry.shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of one weight, reading only those (`stop` beyond the end is cut, as in a slice)."""
        entry = self._entries[name]
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        return entry.read(start, max(start, stop))

    def entry(self, name: str) -> Lazy:
        """One weight, unread."""
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. notices: what a user should know about how the file was read, one line each."""

    config: ModelConfig
    weights: Weights
    tokenizer: Path | None
    format: str  # "meta", "hf", "llama2c" or "gguf"
    path: Path
    notices: list[str] = field(default_factory=list)


def opened(
    kind: str,
    path: Path,
    config: ModelConfig,
    entries: Mapping[str, Lazy],
    said_by: str,
    notices: Iterable[str] = (),
    spelled: Callable[[str], str] = str,
) -> Checkpoint:
    """A checkpoint without a tokenizer; raises unless the entries are exactly the weights that `config` asks for."""
    weights = Weights(check_weights(path, config, entries, said_by, spelled))
    return Checkpoint(config, weights, None, kind, path, list(notices))


def make_config(where: str | Path, **fields: object) -> ModelConfig:
    """ModelConfig, with its complaints as CheckpointError."""
    try:
        return ModelConfig(**fields)  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(where, error) from None


def check_weights(
    where: str | Path,
    config: ModelConfig,
    entries: Mapping[str, Lazy],
    said_by: str,
    spelled: Callable[[str], str] = str,
) -> dict[str, Lazy]:
    """The entries in the model's order; raises unless they are exactly the weights that `config` asks for.

    For the messages: said_by, where the config came from; spelled: Meta's name of a weight -> its name in the file.
    """
    if 9 * config.n_layers > len(entries) + 9:  # before listing the names of a billion layers
        present = sum(1 for name in entries if name.endswith(".attention_norm.weight"))
        raise CheckpointError(where, f"{said_by} says {config.n_layers} layers, the file holds {present}")
    expected = weight_shapes(config)
    _refuse_differing_names(where, expected, entries, said_by, spelled)
    for name, shape in expected.items():
        if entries[name].shape != shape:
            raise CheckpointError(where, f"{spelled(name)} {misshapen(entries[name].shape, shape, said_by)}")
        if entries[name].dtype not in DTYPES.values():
            raise CheckpointError(
                where,
                f"{spelled(name)} is stored as {entries[name].dtype}: only fp32, bf16 and fp16 weights can be read",
            )
    return {name: entries[name] for name in expected}


def _refuse_differing_names(
    where: str | Path, expected: Iterable[str], found: Iterable[str], said_by: str, spelled: Callable[[str], str]
) -> None:
    expected, found = set(expected), set(found)
    for kind, names, mend in (
        ("is missing", expected - found, f"{said_by} asks for it; download or convert the checkpoint again"),
        ("is unknown", found - expected, f"{said_by} describes no such weight, so dropping it would change the model"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(where, f"weight {spelled(min(names))} {kind}{more}: {mend}")


def as_weights(weights: Mapping[str, Tensor]) -> Weights:
    """A plain dict of tensors (a state dict) as Weights."""
    return weights if isinstance(weights, Weights) else Weights({name: lazy(t.detach()) for name, t in weights.items()})


def cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """The same weights, converted as they are read; None leaves them as stored."""
    if dtype is None:
        return weights

    def entry(name: str) -> Lazy:
        def read(start: int, stop: int) -> Tensor:
            rows = weights.rows(name, start, stop)
            converted = rows.to(dtype)
            if dtype == torch.float16 and rows.dtype != dtype and converted.isinf().any():
                raise CheckpointError(name, "holds numbers beyond fp16's 65504: choose bf16 or fp32")
            return converted

        return Lazy(weights.shapes[name], dtype, read)

    return Weights({name: entry(name) for name in weights})


def same_numbers(a: Lazy, b: Lazy) -> bool:
    """Whether two weights of one shape are equal, compared in blocks of rows."""
    blocks = range(0, a.shape[0], 4096)
    return all(torch.equal(a.read(i, i + 4096), b.read(i, i + 4096)) for i in blocks)


def row_blocks(entry: Lazy, block_bytes: int = 1 << 26) -> Iterator[Tensor]:
    """A weight in blocks of rows of at most about `block_bytes`."""
    rows = entry.shape[0]
    row_bytes = max(1, entry.dtype.itemsize * math.prod(entry.shape[1:]))
    step = max(1, block_bytes // row_bytes)
    for start in range(0, rows, step):
        yield entry.read(start, min(rows, start + step))


def to_write(
    where: Path, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Lazy]:
    """The entries that a writer stores: in the model's order, checked against the config, converted when read."""
    whole = cast(as_weights(weights), dtype)
    return check_weights(where, config, {name: whole.entry(name) for name in whole}, "the config")
