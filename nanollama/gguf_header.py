"""The header of a GGUF file, read with every count and length checked against the file's size before it is believed.

The gguf package's own reader trusts the counts and takes seconds for a vocabulary of 128,256 tokens; this one is for
files from anywhere. The format is in docs/formats.md. A model may be split over several files, of which any is given.

    python -c "from nanollama.gguf_header import read; print(read('x.gguf').keys['general.architecture'])"
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanollama import gate
from nanollama.gate import CheckpointError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
LONGEST_STRING_BYTES = 1 << 24
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """What a file says of a tensor: shape in torch's order (rows first), ggml's number of its type, absolute offset."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    keys: dict[str, Any]
    tensors: dict[str, Tensor]


def read_parts(path: Path) -> dict[Path, Header]:
    """The headers of all files of the model that `path` is a part of, the first part first; of most models, one.

    Raises CheckpointError for a missing part and for parts that are not of one model.
    """
    header = read(path)
    count, number = header.keys.get("split.count", 0), header.keys.get("split.no", 0)
    if count in (0, 1):
        return {path: header}
    named = PART.fullmatch(path.name)
    if named is None or (int(named[2]) - 1, int(named[3])) != (number, count):
        what = f"is one part of a split model (split.no {number}, split.count {count})"
        raise CheckpointError(path, f"{what}: give it its name back, NAME-00001-of-00003.gguf or the like")
    number, count = int(named[2]) - 1, int(named[3])
    parts = {}
    for i in range(count):
        part = path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            what = f"is missing: part {i + 1} of a split model of {count} files"
            raise gate.missing(part, f"{what}; download it beside the others")
        parts[part] = header if i == number else read(part)
    _refuse_strangers(parts)
    return parts


def _refuse_strangers(parts: dict[Path, Header]) -> None:
    """Parts of another model, or of another split of the same one."""
    seen: set[str] = set()
    for i, (part, header) in enumerate(parts.items()):
        said = (header.keys.get("split.no"), header.keys.get("split.count"))
        if said != (i, len(parts)):
            what = f"is named as part {i + 1} of a split model of {len(parts)} files, but says split.no {said[0]}"
            raise CheckpointError(part, f"{what} of {said[1]}: download all parts again")
        for name in seen & header.tensors.keys():
            raise CheckpointError(part, f"holds {name}, as another part of the split model does: download all again")
        seen |= header.tensors.keys()
    first, *_ = parts
    promised = parts[first].keys.get("split.tensors.count", len(seen))
    if promised != len(seen):
        what = f"says that the split model has {promised} tensors (split.tensors.count), its {len(parts)} parts hold"
        raise CheckpointError(first, f"{what} {len(seen)}: they are not of one model; download all again")


def read(path: Path) -> Header:
    """Parse the header of one file; raises CheckpointError for damage."""
    gate.refuse_strangers(path)
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(path, f"is truncated: {size} bytes cannot hold a GGUF header; download it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Cursor(path, data).header()
        except (ValueError, struct.error, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise damaged(path, error) from None


def damaged(path: Path, what: object) -> CheckpointError:
    return CheckpointError(path, f"is damaged or not a GGUF file ({what}); download it again")


class _Cursor:
    """A place in the file. Methods raise ValueError when the file ends before what it promises."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def count(self, smallest_bytes: int, what: str) -> int:
        """A u64 that says how many things of at least so many bytes follow."""
        count = self.scalar("<Q")
        if count * smallest_bytes > len(self.data) - self.at:
            raise ValueError(f"{count} {what} cannot fit into the {len(self.data) - self.at} bytes that are left")
        return count

    def text(self) -> str:
        size = self.count(1, "bytes of text")
        if size > LONGEST_STRING_BYTES:
            raise ValueError(f"a text of {size} bytes")
        raw = self.data[self.at : self.at + size]
        self.at += size
        # Byte-level tokens are UTF-8; a broken one must not be lost silently.
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        value = self.scalar(SCALARS[kind])
        if kind == BOOL:
            return bool(value)
        return shortest(value) if kind == 6 else value

    def array(self) -> list[Any]:
        kind = self.scalar("<I")
        if kind == STRING:
            return [self.text() for _ in range(self.count(8, "texts"))]
        if kind not in SCALARS:
            raise ValueError(f"an array of unknown type {kind}")
        form = SCALARS[kind]
        n = self.count(struct.calcsize(form), "values")
        values = list(struct.unpack_from(f"<{n}{form[1]}", self.data, self.at))
        self.at += n * struct.calcsize(form)
        return values

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {self.data[:4]!r}")
        self.at = 4
        self._check_version(self.scalar("<I"))
        n_tensors = self.count(24, "tensors")
        n_keys = self.count(13, "keys")
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            name = self.text()
            if name in keys:
                raise ValueError(f"the key {name!r} stands there twice")
            keys[name] = self.value(self.scalar("<I"))
        infos = [self.tensor_info() for _ in range(n_tensors)]
        return Header(keys, self.tensors(infos, keys.get("general.alignment", 32)))

    def _check_version(self, version: int) -> None:
        if version and version % (1 << 16) == 0:
            what = "is big-endian, made for s390x and the like: get the little-endian file, or run"
            raise CheckpointError(self.path, f"{what} `gguf-convert-endian {self.path} little` (of the gguf package)")
        if version == 1:
            what = "is GGUF version 1, of August 2023, which no program of today reads: get a newer file of this model"
            raise CheckpointError(self.path, what)
        if version not in (2, 3):
            raise CheckpointError(self.path, f"is GGUF version {version}: 2 and 3 are known; get a file of version 3")

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.text(), self.scalar("<I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(reversed([self.scalar("<Q") for _ in range(n_dims)]))
        return name, shape, self.scalar("<I"), self.scalar("<Q")

    def tensors(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, Tensor]:
        """With absolute offsets."""
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        found: dict[str, Tensor] = {}
        for name, shape, kind, offset in infos:
            if name in found or 0 in shape or offset % alignment:
                raise ValueError(f"tensor {name} with shape {shape} at offset {offset} is impossible or repeated")
            found[name] = Tensor(shape, kind, start + offset)
        return found


def shortest(value: float) -> float:
    """The number with the fewest digits that is this float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
