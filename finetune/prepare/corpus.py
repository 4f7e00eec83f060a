"""Text files -> documents: .txt with a separator, .jsonl with a field, folders of them; cut in chunks for parallel
work.

Which documents are held out depends on their place in the corpus alone: each 20th of them, or, in a corpus of fewer
than 20 documents, the last tenth of each.

    >>> [text for _, text in documents(Chunk(Path("two.txt"), 0, 33, 0), Format())]     # doctest: +SKIP
    ['One story.', 'Another story.']
"""

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHUNK_BYTES = 16 << 20
MAX_DOCUMENT_BYTES = 1 << 20  # a longer document is cut at a line end: tokenizers slow down on endless strings
HOLD_OUT_EACH = 20
SUFFIXES = (".txt", ".jsonl")

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Format:
    """How documents lie in the files."""

    separator: str = "<|endoftext|>"  # of .txt files
    field: str = "text"  # of .jsonl lines

    @classmethod
    def typed(cls, separator: str, field: str) -> "Format":
        r"""As typed in a shell, where \n stands for the end of a line and \t for a tab. Raises ValueError."""
        if not separator:
            raise ValueError(r"--separator is empty: expected the text between two documents, or \n for one a line")
        return cls(separator.replace(r"\n", "\n").replace(r"\t", "\t"), field)


@dataclass(frozen=True)
class Chunk:
    """A range of bytes that begins and ends between documents (in an endless document: between lines)."""

    path: Path
    start: int
    stop: int
    first: int  # number of its first document (in a .jsonl: line) in the file


@dataclass(frozen=True)
class Source:
    """Where the text of a run comes from."""

    name: str
    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()  # empty: held out of the training files
    format: Format = Format()


def text_files(path: Path) -> tuple[Path, ...]:
    """The file, or the .txt and .jsonl files below the folder, sorted. Raises ValueError."""
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(
            f"--data {path}: expected a .txt or .jsonl file, a folder of them, or a folder of token shards"
        )
    files = (path,) if path.is_file() else tuple(sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES))
    if not files:
        raise ValueError(f"--data {path}: the folder holds no .txt or .jsonl file")
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"--data {file}: the file is empty")
    return files


def chunks(path: Path, form: Format) -> Iterator[Chunk]:
    """Cut one file. Reads it once, to number its documents."""
    separator = b"\n" if path.suffix == ".jsonl" else form.separator.encode()
    start, first = 0, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while start < len(data):
            stop = _boundary(data, start + CHUNK_BYTES, separator)
            yield Chunk(path, start, stop, first)
            first += data[start:stop].count(separator)
            start = stop


def _boundary(data: mmap.mmap, target: int, separator: bytes) -> int:
    """The first place at or behind `target` that ends a document, or, where none ends soon, a line."""
    if target >= len(data):
        return len(data)
    for mark in (separator, b"\n"):
        place = data.find(mark, target, target + CHUNK_BYTES)
        if place >= 0:
            return place + len(mark)
    return len(data)


def documents(chunk: Chunk, form: Format) -> Iterator[tuple[int, str]]:
    """(number in the file, text) of each document that is not empty. Raises ValueError that names the place."""
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        raw = file.read(chunk.stop - chunk.start)
    try:
        text = raw.decode("utf-8-sig" if chunk.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        where = chunk.start + error.start
        raise ValueError(f"--data {chunk.path}: not UTF-8 at byte {where}: convert the file to UTF-8") from None
    is_json = chunk.path.suffix == ".jsonl"
    for number, part in enumerate(text.split("\n" if is_json else form.separator), start=chunk.first):
        document = (_json_text(chunk.path, number + 1, part, form.field) if is_json else part).strip()
        if document:
            yield number, document


def _json_text(path: Path, line_number: int, line: str, field: str) -> str:
    """The text of one line of a .jsonl file."""
    if not line.strip():
        return ""
    where = f"--data {path} line {line_number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        raise ValueError(f'{where}: expected an object with a text under "{field}" (--field names another)')
    return entry[field]


def is_small(files: tuple[Path, ...], form: Format) -> bool:
    """Whether there are too few documents to hold whole ones out."""
    count = 0
    for path in files:
        for chunk in chunks(path, form):
            for _ in documents(chunk, form):
                count += 1
                if count >= HOLD_OUT_EACH:
                    return False
    return True


def split(chunk: Chunk, form: Format, only: Split | None, small: bool) -> Iterator[tuple[Split, str, bool]]:
    """(split, text, whether the document ends here) of the chunk's documents, long ones in parts.

    only: all documents belong to this split. small: the last tenth of each document is held out, else each 20th.
    """
    for number, text in documents(chunk, form):
        pieces: list[tuple[Split, str, bool]] = [(only or _side(number), text, True)]
        if small and only is None:
            at = _line_end(text, len(text) * 9 // 10)
            pieces = [("train", text[:at], False), ("val", text[at:], True)]
        for side, piece, ends in pieces:
            parts = list(_parts(piece))
            for i, part in enumerate(parts):
                yield side, part, ends and i == len(parts) - 1


def _side(number: int) -> Split:
    return "val" if number % HOLD_OUT_EACH == HOLD_OUT_EACH - 1 else "train"


def _line_end(text: str, target: int) -> int:
    """A place to cut near `target`: behind a line end, else behind a space, else there."""
    for mark in ("\n", " "):
        place = text.rfind(mark, target // 2, target)
        if place >= 0:
            return place + 1
    return target


def _parts(text: str) -> Iterator[str]:
    while len(text) > MAX_DOCUMENT_BYTES:
        at = _line_end(text, MAX_DOCUMENT_BYTES)
        yield text[:at]
        text = text[at:]
    if text:
        yield text
