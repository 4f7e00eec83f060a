"""A kit on disk: arrays in flat little-endian files, and the gates that judge them, in one table told twice.

KIT/kit.json       schema nanollama.kit/1: config, arrays, gates, and what made them
KIT/kit.txt        the same table without words, for readers that have no JSON: one item a line, see docs/kit.md
KIT/weights.f32    weights under Meta's names and in Meta's layout
KIT/inputs.i32, inputs.f32    what a port reads besides: tokens, targets, made-up gradients
KIT/expected.f64   what it has to compute. float64: rounded to float32, these numbers would themselves be off
                   by half of what the references are (`python -m parity.kit` prints the share)
KIT/README.md, SHA256SUMS
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama.gate import CheckpointError, require_file, require_inside, shown
from nanollama.gate.documents import read_text
from parity.contract import UsageError
from parity.kit.claims import FILES, read_table
from parity.synth.checkpoint import sha256

SCHEMA = "nanollama.kit/1"
# How an error becomes a number; kit/check.py computes them.
METRICS = ("rms", "max", "relative", "tokens", "kl_mean", "kl_p99", "kl_max")
KINDS = {"f32": torch.float32, "f64": torch.float64, "i32": torch.int32}


@dataclass(frozen=True)
class Array:
    """Numbers in row-major order. Arrays over tokens hold all sequences one after another: (N, ...)."""

    name: str
    file: str  # its ending is the kind of number
    offset: int  # bytes
    shape: tuple[int, ...]
    meaning: str

    @property
    def kind(self) -> str:
        return self.file.rpartition(".")[2]

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape) * KINDS[self.kind].itemsize

    def line(self) -> str:
        return " ".join(map(str, ("array", self.name, self.file, self.offset, len(self.shape), *self.shape)))


@dataclass(frozen=True)
class Gate:
    """`metric` over rows first .. first+rows of an expected array must not exceed noise * factor."""

    array: str
    dtype: str  # the run dtype whose noise this is
    check: str
    gate: str  # of docs/parity.md
    metric: str  # how it is computed: METRICS in kit/check.py
    label: str  # what reports call it
    unit: str
    first: int
    rows: int
    noise: float
    factor: float

    @property
    def bound(self) -> float:
        return self.noise * self.factor

    def line(self) -> str:
        return f"bound {self.dtype} {self.array} {self.metric} {self.first} {self.rows} {self.bound:.9e}"


class KitWriter:
    """Appends arrays to the files of a new folder; `finish` writes the table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: list[Array] = []
        self.gates: list[Gate] = []

    def add(self, name: str, file: str, tensor: Tensor, meaning: str) -> None:
        assert all(name != array.name for array in self.arrays), name
        path = self.folder / file
        offset = path.stat().st_size if path.exists() else 0
        array = Array(name, file, offset, tuple(tensor.shape), meaning)
        with path.open("ab") as out:
            out.write(tensor.detach().to(KINDS[array.kind]).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.arrays.append(array)

    def finish(self, meta: dict[str, Any]) -> None:
        """meta: what kit.json holds besides the table; `config`, `sequences` and `training` are repeated in kit.txt."""
        arrays = [{"kind": array.kind, **asdict(array)} for array in self.arrays]
        gates = [{**asdict(gate), "bound": gate.bound} for gate in self.gates]
        table = {"schema": SCHEMA, **meta, "arrays": arrays, "gates": gates}
        (self.folder / "kit.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        lines = [SCHEMA, *_settings(meta), *(a.line() for a in self.arrays), *(g.line() for g in self.gates)]
        (self.folder / "kit.txt").write_text("\n".join(lines) + "\n", encoding="ascii")


def _settings(meta: dict[str, Any]) -> Iterator[str]:
    """`config` and `training` lines, nested keys flattened; a sequence is its first row and its tokens."""
    flat = {**meta["config"], **(meta["config"]["rope_scaling"] or {"factor": 0})}
    yield from (
        f"config {key} {float(value):.17g}" for key, value in flat.items() if not isinstance(value, dict | None)
    )
    first = 0
    for tokens in meta["sequences"]:
        yield f"sequence {first} {tokens}"
        first += tokens
    for key, value in (meta["training"] or {}).items():
        yield " ".join(["training", key, *(f"{v:.17g}" for v in (value if isinstance(value, list) else [value]))])


class Kit:
    """A kit that was written before. Raises UsageError when there is none, or its files are not what they were."""

    def __init__(self, folder: Path, flag: str = "--check") -> None:
        self.folder = folder
        _verify(folder, flag)
        self.table = read_table(folder, SCHEMA, METRICS)
        rows = [{k: v for k, v in row.items() if k not in ("kind", "bound")} for row in self.table["arrays"]]
        self.arrays = {row["name"]: replace(Array(**row), shape=tuple(row["shape"])) for row in rows}
        self.gates = [Gate(**{k: v for k, v in row.items() if k != "bound"}) for row in self.table["gates"]]

    def get(self, name: str) -> Tensor:
        array = self.arrays[name]
        return read(self.folder / array.file, array.kind, array.shape, array.offset)

    @property
    def starts(self) -> list[int]:
        """The first row of each sequence, and the end of the last one."""
        lengths = self.table["sequences"]
        return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def read(path: Path, kind: str, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    dtype = KINDS[kind]
    with path.open("rb") as file:
        file.seek(offset)
        data = bytearray(file.read(prod(shape) * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _verify(folder: Path, flag: str) -> None:
    """Every file against SHA256SUMS: a kit is copied about, and a changed byte would be a wrong verdict."""
    manifest = folder / "SHA256SUMS"
    if not manifest.is_file() or not (folder / "kit.json").is_file():
        raise UsageError(f"{flag} {folder}: is no kit; make one with python -m parity.kit --out {folder}")
    try:
        listed = [line.partition("  ")[::2] for line in read_text(manifest).splitlines()]
        names = [name for _, name in listed]
        if missing := sorted({"kit.json", *(n for n in FILES if (folder / n).exists())} - {*names}):
            raise UsageError(f"{manifest}: does not list {missing[0]}; copy the kit again")
        for digest, name in listed:
            path = folder / name
            if Path(name).name != name or name in ("", ".."):
                raise UsageError(f"{manifest}: lists {shown(name)}, which is no file beside it; copy the kit again")
            require_file(path)
            require_inside(path)
            if not path.is_file() or sha256(path) != digest:
                raise UsageError(f"{path}: is missing or changed (see SHA256SUMS); copy the kit again")
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be read ({error.strerror}); copy the kit again") from None
