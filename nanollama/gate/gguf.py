"""The header of a .gguf, walked before the reference's libraries believe its counts: types, lengths, tokenizer lists.

python -c "from nanollama.gate.gguf import check; from pathlib import Path; check(Path('x.gguf'))"

Source: ggml's docs/gguf.md.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from nanollama import gate
from nanollama.gate import CheckpointError

BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of ggml's scalar types
FLOAT32, STRING, ARRAY = 6, 8, 9
INTEGERS = (4, 5, 10, 11)
MAX_KEYS, MAX_TEXT_BYTES, MAX_ITEMS = 10_000, 1 << 24, 1 << 24
MAX_TOKEN_BYTES = 65_535
# Of the tokenizer's lists: what they may hold.
LISTS = {"tokens": (STRING,), "merges": (STRING,), "scores": (FLOAT32,), "token_type": INTEGERS}


def check(path: Path) -> None:
    """Raises CheckpointError for a header that no converter writes."""
    gate.refuse_strangers(path)
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).walk()
        except (ValueError, struct.error) as error:
            raise CheckpointError(path, f"is damaged or not a GGUF file ({gate.reason(error)})") from None


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.file.read(struct.calcsize(form)))[0])

    def count(self, item_bytes: int) -> int:
        """How many items of so many bytes follow, of which there is room for all."""
        count = self.number("<Q")
        left = self.size - self.file.tell()
        if count > MAX_ITEMS or count * item_bytes > left:
            raise ValueError(f"{count} things cannot fit into the {left} bytes that are left")
        return count

    def text(self, most: int = MAX_TEXT_BYTES) -> str:
        size = self.count(1)
        if size > most:
            raise ValueError(f"a text of {size:,} bytes")
        return self.file.read(size).decode("utf-8")

    def walk(self) -> None:
        if self.file.read(4) != b"GGUF" or self.number("<I") not in (2, 3):
            raise ValueError("it is not of version 2 or 3")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        if n_keys > MAX_KEYS or n_tensors > MAX_ITEMS:
            raise ValueError(f"{n_keys} keys and {n_tensors} tensors")
        seen: set[str] = set()
        for _ in range(n_keys):
            name = self.text(1 << 16)
            if name in seen:
                raise ValueError(f"the key {gate.shown(name)} stands there twice")
            seen.add(name)
            self.value(self.number("<I"), name)

    def value(self, kind: int, name: str) -> None:
        if kind in BYTES:
            self.file.seek(BYTES[kind], 1)
        elif kind == STRING:
            self.text()
        elif kind == ARRAY:
            self.array(name)
        else:
            raise ValueError(f"a value of unknown type {kind}")

    def array(self, name: str) -> None:
        kind, part = self.number("<I"), name.removeprefix("tokenizer.ggml.")
        if part != name and kind not in LISTS.get(part, (kind,)):
            raise ValueError(f"{name} holds values of type {kind}")
        if kind == STRING:
            for _ in range(self.count(8)):
                self.text(MAX_TOKEN_BYTES if part != name else MAX_TEXT_BYTES)
            return
        if kind not in BYTES:
            raise ValueError(f"an array of unknown type {kind}")
        data = self.file.read(self.count(BYTES[kind]) * BYTES[kind])
        if part == "scores" and not all(math.isfinite(score) for (score,) in struct.iter_unpack("<f", data)):
            raise ValueError("a score that is no number")
