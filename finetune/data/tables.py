r"""Tables in text: .csv and .tsv as spreadsheets, pandas and Python's csv write them -> rows, an object each.

The first record names the columns. Cells may be quoted and hold line ends; the separator is the one that the first
line has most of (Excel writes ; in much of Europe), or the one that Excel's `sep=;` names. Rows are counted from 1,
behind the header.

    >>> list(read_table(Path("a.csv")))[0].value                                                 # doctest: +SKIP
    {'id': '7', 'text': 'Two\nlines'}
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv")
SEPARATORS = (",", ";", "\t", "|")
FIELD_BYTES = 2**31 - 1  # the csv module refuses cells of more than 131,072 characters unless it is told
NAMED_BY_EXCEL = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)


class Row(NamedTuple):
    """One row of whatever file, or why there is none."""

    where: str  # file and line, as messages name them
    value: Any
    trouble: str = ""


@dataclass(frozen=True)
class Header:
    """The first record of a table."""

    columns: tuple[str, ...]
    separator: str
    stop: int  # the byte behind it


def is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_SUFFIXES


def read_header(path: Path) -> Header:
    """Raises UserError for a table without one, or with two columns of one name."""
    lines = _lines(path, 0)
    first, begin = next(lines, ""), 0
    named = NAMED_BY_EXCEL.fullmatch(first)
    if named:
        begin = lines.place
    separator = named[1] if named else _most_likely(path, first)
    stop, columns, trouble = next(_records(path, begin, path.stat().st_size, separator), (0, [], "the file is empty"))
    names = tuple(column.strip() for column in columns)
    twice = [name for name in names if name and names.count(name) > 1]
    if trouble or twice:
        raise UserError(f"--data {path}: {trouble or f'two columns are named {twice[0]!r:.40}'}")
    return Header(names, separator, stop)


def _most_likely(path: Path, line: str) -> str:
    """The separator that cuts the first line into most cells; one column has none, and any will do."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(SEPARATORS, key=lambda mark: len(next(csv.reader([line.rstrip("\r\n")], delimiter=mark), [])))


def check_column(path: Path, columns: tuple[str, ...], field: str) -> None:
    """Raises UserError where the table has no such column."""
    if field not in columns:
        shown = ", ".join(repr(name[:30]) for name in columns[:8])
        more = f" and {len(columns) - 8} more" if len(columns) > 8 else ""
        raise UserError(f'--data {path}: no column "{field}": it has {shown}{more} (--field names another)')


class Part(NamedTuple):
    """Whole rows of a table."""

    start: int  # byte
    stop: int  # the byte behind
    first: int  # how many rows stand before
    rows: int


def table_parts(path: Path, part_bytes: int) -> Iterator[Part]:
    """The table in parts of about this size."""
    header, size = read_header(path), path.stat().st_size
    start, first, number = header.stop, 0, 0
    for stop, _, _ in _records(path, header.stop, size, header.separator):
        number += 1
        if stop - start >= part_bytes:
            yield Part(start, stop, first, number - first)
            start, first = stop, number
    if number > first:
        yield Part(start, size, first, number - first)


def read_table(path: Path, start: int = 0, stop: int = 0, first: int = 0) -> Iterator[Row]:
    """The rows of a part, all by default; first: how many stand before it. A bad one is a row with a trouble."""
    header = read_header(path)
    records = _records(path, start or header.stop, stop or path.stat().st_size, header.separator)
    for number, (_, cells, trouble) in enumerate(records, start=first + 1):
        where, expected = f"--data {path} row {number}", len(header.columns)
        if not trouble and len(cells) != expected:
            trouble = f"{len(cells)} cells, and the header names {expected}: a cell that holds {header.separator!r} "
            trouble += "or a line end has to be quoted"
        if not trouble and any(not _is_text(cell) for cell in cells):
            trouble = "not UTF-8: save the file as UTF-8"
        yield Row(where, None if trouble else dict(zip(header.columns, cells, strict=True)), trouble)


def _is_text(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _records(path: Path, start: int, stop: int, separator: str) -> Iterator[tuple[int, list[str], str]]:
    """(byte behind it, cells, trouble) of each record between two bytes; empty lines are none."""
    csv.field_size_limit(FIELD_BYTES)
    lines = _lines(path, start)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while lines.place < stop:
        try:
            cells, trouble = next(reader), ""
        except StopIteration:
            return
        except csv.Error as error:
            cells, trouble = [], _explain(error)
        if cells or trouble:
            yield lines.place, cells, trouble


def _explain(error: csv.Error) -> str:
    if "end of data" in str(error):
        return "a cell that begins with a quote here is never closed: the rest of the file would be in it"
    return f"no row of a table: {error}"


class _Lines:
    """The lines of a file from a byte on, with whatever ends, and the byte behind the last one that was taken."""

    def __init__(self, lines: Iterator[str], place: int) -> None:
        self.lines, self.place = lines, place

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        at_start = self.place == 0
        self.place += len(line.encode("utf-8", "surrogateescape"))
        return line.removeprefix("\ufeff") if at_start else line


def _lines(path: Path, start: int) -> _Lines:
    return _Lines(_open_lines(path, start), start)


def _open_lines(path: Path, start: int) -> Iterator[str]:
    with path.open("rb") as binary:
        binary.seek(start)
        with io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="") as text:
            yield from text
