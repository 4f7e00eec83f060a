"""The machine that a check runs on: its cores, its memory, where made files are kept."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanollama.machine import cache_folder as cache_folder
from parity.contract import DTYPES

SMALL_BYTES = 2 * 10**9  # of a checkpoint on disk: below, several implementations fit in memory side by side
MEMORY_SHARE = 0.8  # of the machine that a model may take


def cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def threads_for(stored_bytes: int) -> int:
    """CPU threads of every implementation alike, since bits depend on how a sum is split.

    Small checkpoints get one: their processes run side by side, and threads that wait for each other on a busy core
    are slower than no threads.
    """
    return 1 if stored_bytes <= SMALL_BYTES else cores()


def too_large(parameters: int, dtypes: Sequence[str]) -> list[str]:
    """The dtypes at which a model does not fit whole into this machine's memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [dtype for dtype in dtypes if parameters * DTYPES[dtype].itemsize > MEMORY_SHARE * memory_bytes]


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Those of these distributions that are here, and their versions."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder that is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.start
