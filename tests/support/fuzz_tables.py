"""A .parquet file to be changed, and the reader of its rows.

parquet_target(Path("rows.parquet"))      # None without the library that writes one
"""

from pathlib import Path

from finetune.data.rows import read_rows
from fuzz_target import Target
from mutators_parquet import mutate_parquet


def parquet_target(path: Path) -> Target | None:
    """None without the library that writes one."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    rows = [{"text": f"once {n}", "messages": [{"role": "user", "content": "on" * n}]} for n in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=8, compression="snappy")

    def read_all() -> None:
        for row in read_rows(path):
            row.value  # noqa: B018 (each is made)

    return Target(path, mutate_parquet, read_all, forks=False)  # Arrow's threads would not be there
