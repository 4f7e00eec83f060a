"""Text files -> documents: .txt and .md with a separator, .jsonl, .json, .csv, .tsv or .parquet with a field, folders
of them; cut in chunks for parallel work. Line ends are \n, \r\n or \r, in the separator as well; a text has \n in
their place.

Which documents are held out depends on their place in the corpus alone: each 20th of them, or, in a corpus of fewer
than 20 documents, the last tenth of each.

    >>> [text for _, text in documents(Chunk(Path("two.txt"), 0, 33, 0), Format())]     # doctest: +SKIP
    ['One story.', 'Another story.']
"""

import mmap
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from finetune.data.documents import HOLD_OUT_EACH, is_held_out
from finetune.data.files import Say, check_text, find_files, listed, silent
from finetune.data.left_out import LeftOut, OnBad
from finetune.data.rows import (
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    is_array,
    is_one_value,
    is_parquet,
    parquet_groups,
    parquet_rows,
    parse_line,
    read_rows,
)
from finetune.data.tables import Row, check_column, is_table, read_header, read_table, table_parts
from finetune.errors import UserError

READING = 4  # changes whenever the same files are read as other documents, or held out otherwise
CHUNK_BYTES = 16 << 20
MAX_DOCUMENT_BYTES = 1 << 20  # a longer document is cut at a line end: tokenizers slow down on endless strings
SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
LINE_END = rb"(?:\r\n|\n|\r(?!\n))"

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Format:
    """How documents lie in the files."""

    separator: str = "<|endoftext|>"  # of .txt and .md files
    field: str = "text"  # of rows
    on_bad: OnBad = "stop"  # what becomes of documents that cannot be read

    @classmethod
    def typed(cls, separator: str, field: str, on_bad: OnBad = "stop") -> "Format":
        r"""As typed in a shell, where \n stands for the end of a line and \t for a tab. Raises UserError."""
        if not separator:
            raise UserError(r"--separator is empty: expected the text between two documents, or \n for one a line")
        for typed, meant in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t")):
            separator = separator.replace(typed, meant)
        return cls(_plain_lines(separator), field, on_bad)

    @cached_property
    def mark(self) -> re.Pattern[bytes]:
        """The separator in bytes, with any kind of line ends."""
        return re.compile(LINE_END.join(re.escape(part.encode()) for part in self.separator.split("\n")))


@dataclass(frozen=True)
class Chunk:
    """A range of bytes that begins and ends between documents (in an endless document: between lines)."""

    path: Path
    start: int  # of a .parquet file: the part
    stop: int
    first: int  # number of its first document (in a .jsonl: line) in the file
    before: int = 0  # documents (lines, rows) in the files before
    goes_on: int = -1  # number in the file of an endless document that the chunk cuts at its end; -1: none


@dataclass(frozen=True)
class Source:
    """Where the text of a run comes from."""

    name: str
    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()  # empty: held out of the training files
    format: Format = Format()
    title: str = ""  # for messages: the name, and what was left out


def text_files(path: Path, flag: str = "--data") -> tuple[Path, ...]:
    """The file, or the files of text below the folder, sorted. Raises UserError."""
    return named_files(path, silent, flag)[0]


def named_files(path: Path, say: Say, flag: str = "--data") -> tuple[tuple[Path, ...], str]:
    """`text_files`, and a name for them that lists what else lies in the folder. Raises UserError."""
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    files, title = find_files(path, SUFFIXES, say, _is_data)
    if not files:
        raise UserError(f"{flag} {path}: the folder holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            check_text(file)  # which has better words for some
            raise UserError(
                f"{flag} {path}: expected a .txt, .md, .jsonl, .csv, .tsv or .parquet file, a .json array, a folder of "
                "them, or a folder of token shards; a plain text under another name: call it .txt"
            )
        if not file.stat().st_size:
            raise UserError(f"{flag} {file}: the file is empty")
    return files, title


def _is_data(path: Path) -> bool:
    """In a folder, a .json that is no array is somebody's settings, and README.md beside rows is about them."""
    if path.name.lower() == "readme.md":
        return not any(p.suffix.lower() in ROW_SUFFIXES for p in path.parent.rglob("*"))
    return path.suffix.lower() != ".json" or is_array(path)


def check_separator(files: Sequence[Path], form: Format, say: Say) -> None:
    """Says, or where one was chosen refuses, a separator that never occurs: all of a file would be one document."""
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES and path.stat().st_size]
    if not texts or any(_occurs(form.mark, path) for path in texts):
        return
    names = listed([path.name for path in texts])
    if form.separator != Format.separator:
        raise UserError(
            f"--separator {form.separator!r}: occurs nowhere in {names}: name the text that stands between two "
            "documents, or leave the flag out where a file is one document"
        )
    one = f"{names} is one document" if len(texts) == 1 else f"each of {names} is one document"
    say(rf"data: no {form.separator} in it: {one} (--separator names another mark, such as \n\n)")


def _occurs(mark: re.Pattern[bytes], path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return mark.search(data) is not None


def all_chunks(files: Sequence[Path], form: Format) -> Iterator[Chunk]:
    """Those of all files, whose documents are numbered through."""
    before = 0
    for path in files:
        before += yield from chunks(path, form, before)


def chunks(path: Path, form: Format, before: int = 0) -> Generator[Chunk, None, int]:
    """Cut one file. Reads it once, to number its documents, and returns how many it has, empty ones included."""
    if is_parquet(path):
        rows = parquet_groups(path)
        for group in range(len(rows)):
            yield Chunk(path, group, group + 1, sum(rows[:group]), before)
        return sum(rows)
    check_text(path)
    if is_table(path):
        check_column(path, read_header(path).columns, form.field)
        number = 0
        for part in table_parts(path, CHUNK_BYTES):
            yield Chunk(path, part.start, part.stop, part.first, before)
            number = part.first + part.rows
        return number
    if _has_rows(path) and is_one_value(path):
        yield Chunk(path, 0, path.stat().st_size, 0, before)
        return sum(1 for _ in read_rows(path))
    mark = re.compile(LINE_END) if _has_rows(path) else form.mark
    start, first = 0, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while start < len(data):
            stop, is_cut = _boundary(data, start + CHUNK_BYTES, mark)
            ended = sum(1 for _ in mark.finditer(data, start, stop))
            yield Chunk(path, start, stop, first, before, first + ended if is_cut else -1)
            first += ended
            start = stop
    return first + 1


def _has_rows(path: Path) -> bool:
    return path.suffix.lower() in ROW_SUFFIXES


def _boundary(data: mmap.mmap, target: int, mark: re.Pattern[bytes]) -> tuple[int, bool]:
    """The first place at or behind `target` that ends a document, or, where none ends soon, a line; and whether that
    cuts a document.
    """
    if target >= len(data):
        return len(data), False
    for pattern in (mark, re.compile(LINE_END)):
        found = pattern.search(data, target, target + CHUNK_BYTES)
        if found:
            place = found.end()
            # The range that was searched may end within a line end.
            return place + (data[place - 1 : place + 1] == b"\r\n"), pattern is not mark
        if target + CHUNK_BYTES >= len(data):  # the last document ends with the file
            break
    return len(data), False


def documents(chunk: Chunk, form: Format, left_out: LeftOut | None = None) -> Iterator[tuple[int, str]]:
    """(number in the file, text) of each document that is not empty.

    left_out: takes what cannot be read; without it that raises UserError, which names the place.
    """
    counted = LeftOut() if left_out is None else left_out
    for number, (where, text, trouble) in enumerate(_texts(chunk, form), start=chunk.first):
        if trouble and left_out is None:
            raise UserError(f"{where}: {trouble}")
        if trouble:
            counted.add(f"{where}: {trouble}")
        elif text and text.strip():
            counted.seen += 1
            yield number, text.strip()
        else:
            counted.empty += bool(where)


def _texts(chunk: Chunk, form: Format) -> Iterator[Row]:
    """Their values are texts. Empty ones are included, since they count in the numbers; of rows they have a place."""
    path = chunk.path
    if is_parquet(path):
        return (_text_of(row, form.field) for row in parquet_rows(path, chunk.start, form.field))
    if not _has_rows(path):
        return _plain_texts(chunk, form)
    if is_table(path):
        return (_text_of(row, form.field) for row in read_table(path, chunk.start, chunk.stop, chunk.first))
    if is_one_value(path):
        return (_text_of(row, form.field) for row in read_rows(path))
    lines = enumerate(_plain_lines(_decoded(chunk, "surrogateescape")).split("\n"), start=chunk.first + 1)
    where, blank = f"--data {path} line", Row("", "")
    return (_text_of(parse_line(f"{where} {n}", line), form.field) if line.strip() else blank for n, line in lines)


def _plain_texts(chunk: Chunk, form: Format) -> Iterator[Row]:
    """Those between separators. A byte that is no UTF-8 is the file's fault, or, where it may be skipped, its
    document's.
    """
    text = _plain_lines(_decoded(chunk, "surrogateescape" if form.on_bad == "skip" else "strict"))
    for number, part in enumerate(text.split(form.separator), start=chunk.first + 1):
        try:
            part.encode()
        except UnicodeEncodeError:
            yield Row(f"--data {chunk.path} document {number}", None, "not UTF-8: convert the file to UTF-8")
        else:
            yield Row("", part)


def _decoded(chunk: Chunk, errors: str) -> str:
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        raw = file.read(chunk.stop - chunk.start)
    try:
        return raw.decode("utf-8-sig" if chunk.start == 0 else "utf-8", errors)
    except UnicodeDecodeError as error:
        where = chunk.start + error.start
        raise UserError(f"--data {chunk.path}: not UTF-8 at byte {where}: convert the file to UTF-8") from None


def _plain_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _text_of(row: Row, field: str) -> Row:
    """The row with the text in place of its value; null is no text, and no fault either."""
    if row.trouble:
        return row
    if not isinstance(row.value, dict) or not isinstance(row.value.get(field, 0), str | None):
        found = sorted(map(str, row.value)) if isinstance(row.value, dict) and field not in row.value else []
        has = f", it has {', '.join(map(repr, found))[:120]}" * bool(found)
        return row._replace(trouble=f'expected an object with a text under "{field}"{has} (--field names another)')
    return row._replace(value=row.value[field])


def is_small(source: Source) -> bool:
    """Whether there are too few documents to hold whole ones out, and no files for it."""
    form, ignored = source.format, LeftOut()
    found = (number for chunk in all_chunks(source.train, form) for number in documents(chunk, form, ignored))
    return not source.val and sum(1 for _ in islice(found, HOLD_OUT_EACH)) < HOLD_OUT_EACH


def split(
    chunk: Chunk, form: Format, only: Split | None, small: bool, left_out: LeftOut | None = None
) -> Iterator[tuple[Split, str, bool]]:
    """(split, text, whether the document ends here) of the chunk's documents, long ones in parts.

    only: all documents belong to this split. small: the last tenth of each document is held out, else each 20th.
    left_out: as `documents` takes it.
    """
    for number, text in documents(chunk, form, left_out):
        is_whole = number != chunk.goes_on
        pieces: list[tuple[Split, str, bool]] = [(only or _side(chunk.before + number), text, is_whole)]
        if small and only is None:
            at = _line_end(text, len(text) * 9 // 10)
            pieces = [("train", text[:at], False), ("val", text[at:], is_whole)]
        for side, piece, ends in pieces:
            parts = list(_parts(piece))
            for i, part in enumerate(parts):
                yield side, part, ends and i == len(parts) - 1


def _side(number: int) -> Split:
    return "val" if is_held_out(number) else "train"


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
