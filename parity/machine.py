"""The machine that a check runs on: its cores, its memory, where made files are kept."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nanollama.machine import cache_folder as cache_folder
from parity.contract import DTYPES, UsageError

SMALL_BYTES = 2 * 10**9  # of a checkpoint on disk: below, several implementations fit in memory side by side
PACKAGES = ("torch", "transformers", "llama_models", "fairscale", "safetensors", "tokenizers", "tiktoken")
MEMORY_SHARE = 0.8  # of the machine that a model may take


def user_folder(flag: str, folder: Path) -> Path:
    """The folder that a flag names, made where there is none. Raises UsageError where it cannot be written into."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} {folder}: is a file; give a folder, which is made where there is none")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be made ({error.strerror}); give another folder") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{flag} {folder}: cannot be written into; give another folder")
    return folder


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


def environment(threads: int, device: str) -> dict[str, Any]:
    """What a report says of the machine: versions, processor, and the threads that each implementation had."""
    cpu = torch.backends.cpu.get_cpu_capability()
    machine = {"system": platform.system(), "machine": platform.machine(), "cpu_capability": cpu}
    return {
        "python": platform.python_version(),
        **installed(PACKAGES),
        **machine,
        "threads": threads,
        "device": device,
    }


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of a process now (Linux; 0 elsewhere and for a process that has ended)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")), "0")
    return int(kib) * 1024


def own_anonymous_bytes() -> int:
    return anonymous_bytes(os.getpid())


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
