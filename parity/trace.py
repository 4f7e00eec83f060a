"""Traces: the tensors that one implementation computed for one case, as a folder of safetensors files.

    TRACE/trace.json                 what ran: config, sequences, versions, seconds (docs/parity.md lists the keys)
    TRACE/fp32/layers.3.safetensors  "{sequence}/{tap}" -> (T, ...), one file per layer; also embed, head, extra
    TRACE/rope.safetensors           cos and sin at the case's rope_positions

Reading is lazy and memory-mapped: a trace may be larger than memory.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from parity.contract import UsageError
from reference.protocol import TRACE_SCHEMA, tap_part


class Readable(Protocol):
    """What a probable cause is computed from: a trace, or a kit's arrays."""

    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def sequences(self) -> list[list[int]]: ...
    def has(self, dtype: str, sequence: int, tap: str) -> bool: ...
    def get(self, dtype: str, sequence: int, tap: str) -> Tensor: ...


class Trace:
    """A trace on disk. Raises UsageError when the folder holds none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "trace.json"
        if not path.is_file():
            raise UsageError(f"{folder} holds no trace: trace.json is missing")
        self.meta: dict[str, Any] = json.loads(path.read_text())
        if self.meta.get("schema") != TRACE_SCHEMA:
            raise UsageError(f"{path} has schema {self.meta.get('schema')!r}: this version reads {TRACE_SCHEMA!r}")

    @property
    def sequences(self) -> list[list[int]]:
        return self.meta["sequences"]

    @property
    def n_layers(self) -> int:
        return self.meta["config"]["n_layers"]

    def _file(self, dtype: str, part: str) -> Path:
        return self.folder / self.meta["dtypes"].get(dtype, dtype) / f"{part}.safetensors"

    @cached_property
    def _files(self) -> dict[tuple[str, str], tuple[Any, frozenset[str]]]:
        """Open part files and the names in them: opening one reads its whole header."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def _open(self, dtype: str, part: str) -> tuple[Any, frozenset[str]]:
        if (dtype, part) not in self._files:
            path = self._file(dtype, part)
            if not path.is_file():
                return None, frozenset()
            file = safe_open(path, "pt").__enter__()  # mapped; closed with the trace
            self._files[dtype, part] = (file, frozenset(file.keys()))
        return self._files[dtype, part]

    def keys(self, dtype: str, part: str) -> frozenset[str]:
        """Names "{sequence}/{tap}" in one part file; empty when the file is absent."""
        return self._open(dtype, part)[1]

    def has(self, dtype: str, sequence: int, tap: str) -> bool:
        return f"{sequence}/{tap}" in self.keys(dtype, tap_part(tap.split("@")[0]) if "@" not in tap else "extra")

    def get(self, dtype: str, sequence: int, tap: str) -> Tensor:
        """The tensor (T, ...). Taps with an @ ("logits@cached") live in the part `extra`. Raises KeyError if absent."""
        part, key = "extra" if "@" in tap else tap_part(tap), f"{sequence}/{tap}"
        file, keys = self._open(dtype, part)
        if key not in keys:
            raise KeyError(f"{self._file(dtype, part)} holds no {key}")
        return file.get_tensor(key)

    def rope(self) -> dict[str, Tensor]:
        path = self.folder / "rope.safetensors"
        if not path.is_file():
            return {}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)


class TraceWriter:
    """Writes one trace, a part file at a time, so that memory holds one part at most; trace.json comes last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, dtype: str, part: str, tensors: dict[str, Tensor]) -> None:
        (self.folder / dtype).mkdir(exist_ok=True)
        save_file(separate(tensors), self.folder / dtype / f"{part}.safetensors")

    def rope(self, cos: Tensor, sin: Tensor) -> None:
        save_file({"cos": cos.contiguous(), "sin": sin.contiguous()}, self.folder / "rope.safetensors")

    def finish(self, meta: dict[str, Any]) -> None:
        (self.folder / "trace.json").write_text(json.dumps({"schema": TRACE_SCHEMA, **meta}))


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and copied where two share memory: the file format refuses those, and a candidate's taps may."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        x = tensor.contiguous()
        storage = x.untyped_storage().data_ptr()
        out[name] = x.clone() if storage in seen else x
        seen.add(storage)
    return out


def by_part(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Split "{sequence}/{tap}" tensors into the part files that they belong to."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        tap = key.split("/", 1)[1]
        parts.setdefault("extra" if "@" in tap else tap_part(tap), {})[key] = tensor
    yield from parts.items()
