"""Rows of data, whatever file they lie in: an object a line, an array, objects over several lines, .csv, .tsv,
.parquet, or a data set of the hub.

    for row in read_rows(Path("dialogs.jsonl")):
        print(row.where, row.trouble or row.value)     # --data dialogs.jsonl line 1 {'messages': ...}
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.data.files import check_text
from finetune.data.tables import TABLE_SUFFIXES, Row, check_column, is_table, read_table
from finetune.errors import UserError
from nanollama.gate import reason

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", *TABLE_SUFFIXES, ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".markdown")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
BATCH_ROWS = 256  # of a .parquet file
ROWS_A_BYTE = 64  # more are no text, but a few bytes that claim to be a million rows
SPACE = re.compile(r"\s*")
# An object that only holds the rows, all on its first line.
HOLDS_ROWS = re.compile(r'\{\s*(?:"type"\s*:\s*"\w*"\s*,\s*)?"(?:data|train|examples|instances)"\s*:\s*\[')
HOLDERS = ("data", "train", "examples", "instances")


def is_parquet(path: Path) -> bool:
    """By its first bytes, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def is_array(path: Path) -> bool:
    """Whether the file is one JSON array, and not an object a line."""
    return next(_lines(path), "").lstrip().startswith("[")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. Raises UserError for a file that holds none; a bad line is a row with a trouble."""
    if is_parquet(path):
        for group in range(len(parquet_groups(path))):
            yield from parquet_rows(path, group)
        return
    check_text(path)
    if is_table(path):
        yield from read_table(path)
        return
    if is_one_value(path):
        for number, value in enumerate(_values(path), start=1):
            yield Row(f"--data {path} item {number}", value)
        return
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:  # all kinds of line ends; not U+2028
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_line(f"--data {path} line {number}", line)


def is_one_value(path: Path) -> bool:
    """Whether the file is one array, or objects over several lines, and not an object a line."""
    lines = _lines(path)
    first, second = next(lines, "").strip(), next(lines, "").strip()
    if first.startswith("["):
        return not (first.endswith("]") and second.startswith("["))  # a line may be a list of messages
    whole = first == "{" or HOLDS_ROWS.match(first) is not None
    return whole or (first.startswith("{") and first.endswith(("[", "{", ",", ":")) and not second.endswith("}"))


def _held(value: Any) -> list[Any]:
    """The rows in an object that does nothing but hold them; another value by itself."""
    lists = [key for key in HOLDERS if isinstance(value, dict) and isinstance(value.get(key), list)]
    return value[lists[0]] if len(lists) == 1 else [value]


def parse_line(where: str, line: str) -> Row:
    try:
        line.encode()
        return Row(where, json.loads(line))
    except UnicodeEncodeError:
        return Row(where, None, "not UTF-8: save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return Row(where, None, f"not JSON: {error}")


def _lines(path: Path) -> Iterator[str]:
    """Those that hold something."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from (line for line in file if line.strip())


def _values(path: Path) -> Iterator[Any]:
    """The items of an array, or objects one after another, over however many lines. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    try:
        if text.lstrip().startswith("["):
            yield from json.loads(text)
            return
        at = 0
        while (at := SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it matches nothing, too
            value, at = json.JSONDecoder().raw_decode(text, at)
            yield from _held(value)
    except json.JSONDecodeError as error:
        what = "a JSON array" if text.lstrip().startswith("[") else "JSON objects over several lines"
        raise UserError(f"--data {path} line {error.lineno}: not JSON: begins as {what}, then: {error.msg}") from None
    except RecursionError:
        raise UserError(f"--data {path}: not JSON that can be read: nested too deep") from None


def parquet_groups(path: Path) -> list[int]:
    """How many rows each part of a .parquet file has, in which it can be read. Raises UserError."""
    return _parquet(path)[1]


def parquet_rows(path: Path, group: int, column: str | None = None) -> Iterator[Row]:
    """The rows of one part; column: only this one is read, nulls as nulls. Raises UserError where there is none."""
    found, counts = _parquet(path)
    columns = None if column is None else [column]
    number = sum(counts[:group])
    with _arrow_errors(path):
        if column is not None:
            check_column(path, tuple(found.schema_arrow.names), column)
        # Some rows at a time: a few bytes may stand for a million of them. No threads, which a fork would wait for.
        batches = found.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(f"--data {path} row {number}", without_nulls(value) if column is None else value)
    if number != sum(counts[: group + 1]):
        raise UserError(f"--data {path}: not readable as .parquet: rows are missing: copy the file again")


def _parquet(path: Path) -> tuple[Any, list[int]]:
    """The file and the rows of each part. Raises UserError."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"--data {path}: .parquet needs the extra: pip install 'llama-parity[data]'") from None
    with _arrow_errors(path):
        found = parquet.ParquetFile(path)
        counts = [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]
        most = ROWS_A_BYTE * path.stat().st_size
        if min(counts, default=0) < 0 or sum(counts) > most:
            raise UserError(f"--data {path}: says that it has {sum(counts):,} rows in {most // ROWS_A_BYTE:,} bytes")
    return found, counts


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """What the library finds wrong, of whatever class, as UserError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: not readable as .parquet: {reason(error)}: copy the file again") from None


def is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not name.endswith((*ROW_SUFFIXES, *TEXT_SUFFIXES))


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of a data set of the hub. Raises UserError."""
    for number, value in enumerate(hub_data_set(name), start=1):
        yield Row(f"--data {name} row {number}", without_nulls(value))


def hub_data_set(name: str) -> Any:
    """The training split of a data set of the hub, or of its copy in the cache. Raises UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {name}: no such file or folder; a data set of the hub needs the extra: pip install "
            "'llama-parity[data]'"
        ) from None
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # of several libraries: offline, unknown, gated, several configurations, no such split
        reason = " ".join(str(error).split())
        raise UserError(
            f"--data {name}: no such file or folder, and as a data set of the hub it could not be had: "
            f"{type(error).__name__}: {reason[:300]}: check the name; without a network, download its files elsewhere "
            "and name their folder"
        ) from None


def without_nulls(value: Any) -> Any:
    """Arrow gives every row the keys of all: those that a row did not have are null there, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
