"""Data files of strangers that claim more than they hold: .parquet, pipes, devices, JSON nested deep."""

import os
from pathlib import Path
from typing import Any

import pytest

from finetune.data.files import find_files, silent
from finetune.data.rows import read_rows
from finetune.errors import UserError
from nanollama.gate import CheckpointError, read_prompts

ROWS = [{"text": f"once {n}", "tags": ["a"] * n} for n in range(20)]


def written(path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'llama-parity[data]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_a_table_is_read_part_by_part(tmp_path: Path) -> None:
    found = list(read_rows(written(tmp_path / "rows.parquet", row_group_size=8)))
    assert [row.value for row in found] == ROWS
    assert found[9].where.endswith("row 10")


def test_few_bytes_that_claim_a_million_rows_are_refused(tmp_path: Path) -> None:
    """Run-length encoding: a megabyte of them would be read for hours."""
    path = written(tmp_path / "bomb.parquet", [{"text": "a"}] * 1_000_000, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="says that it has 1,000,000 rows in"):
        list(read_rows(path))


@pytest.mark.parametrize("cut", [4, 8, 100, 500, -1, -5, -20])
def test_a_table_cut_short_is_one_line(cut: int, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"not readable as \.parquet") as refused:
        list(read_rows(path))
    assert "\n" not in str(refused.value)


def test_a_page_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    """The footer is whole: what is wrong shows only when a row is read."""
    path = written(tmp_path / "rows.parquet", compression="snappy")
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"not readable as \.parquet") as refused:
        list(read_rows(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["a pipe", "a device"])
def test_data_without_an_end_are_not_waited_for(what: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path) if what == "a pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"is {what} and not a file"):
        find_files(path, (".jsonl",), silent)


def test_a_prompt_nested_deep_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1"):
        read_prompts(tmp_path / "prompts.jsonl")
