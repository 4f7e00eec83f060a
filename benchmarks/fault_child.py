"""What happens to one training process of `benchmarks.faults`: installed in it before it begins.

Process(target=child, args=(argv, out, log, Fault("files", 12)))      # SIGKILL before the 13th change of a file
"""

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.resume import RunFolder, checkpoints

CAPABILITIES = 0x20080522  # the version of Linux's call
REFUSED = {"quota": errno.EDQUOT, "space": errno.ENOSPC}
OVERRIDE = 1 << 1  # CAP_DAC_OVERRIDE


@dataclass(frozen=True)
class Fault:
    """What happens to one process. `at`: of "files" and "flush" the how-manieth, else seconds behind `after`."""

    kind: str
    at: float = 0.0
    after: int = 0  # calls of the part that is named


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file(out: Path, at: int) -> None:
    """Before the `at`-th time that a file below `out` is opened to be written, renamed, made or removed."""
    left = [at]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event == "open":
            changes = isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and str(args[0]).startswith(str(out)):
            left[0] -= 1
            if left[0] < 0:
                die()

    sys.addaudithook(watch)


def die_at_flush(at: int) -> None:
    """Before, or behind, the `at`-th fsync: even numbers fall between the rename and the flush of the folder."""
    flush, left = os.fsync, [at]

    def counted(fd: Any) -> None:
        left[0] -= 1
        if left[0] == -1:
            die()
        flush(fd)
        left[0] -= 1
        if left[0] == -1:
            die()

    os.fsync = counted


def die_within(owner: Any, name: str, after: int, delay_s: float) -> None:
    """`delay_s` after the call of a function that follows `after` others."""
    call, left = getattr(owner, name), [after]

    def counted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            threading.Timer(delay_s, die).start()
        return call(*args, **options)

    setattr(owner, name, counted)


def set_back(seed: int) -> None:
    """A clock that jumps about, days back and forth."""
    rng, real = random.Random(seed), time.time
    time.time = lambda: real() + rng.uniform(-1e6, 1e6)


def install(fault: Fault, out: Path) -> None:
    import finetune.objective
    import finetune.run
    import finetune.train

    if fault.kind == "files":
        die_at_file(out, int(fault.at))
    elif fault.kind == "flush":
        die_at_flush(int(fault.at))
    elif fault.kind == "step":
        die_within(finetune.train.Loop, "step", fault.after, fault.at)
    elif fault.kind == "evaluate":
        die_within(finetune.objective, "evaluate", fault.after, fault.at)
    elif fault.kind == "sample":
        die_within(finetune.run, "sample", fault.after, fault.at)
    elif fault.kind == "any":
        threading.Timer(fault.at, die).start()
    elif fault.kind == "keep":
        keep_checkpoints(Path(f"{out}-kept"))
    elif fault.kind == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), int(fault.at)))
    elif fault.kind in REFUSED:
        refuse_writes(out, int(fault.at), REFUSED[fault.kind])
    elif fault.kind == "clock":
        set_back(int(fault.at))
    elif fault.kind == "obeys":
        obey_modes()


def refuse_writes(out: Path, at: int, number: int) -> None:
    """From the `at`-th time on that a file below `out` is opened to be written, the system says no."""
    left = [at]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(args[0]).startswith(str(out)):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, os.strerror(number), str(args[0]))

    sys.addaudithook(watch)


def obey_modes() -> None:
    """Root may write into a read-only folder; without this capability it may not."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and libc.capget(header, sets) == 0:
        for kind in range(3):  # effective, permitted, inheritable
            sets[kind] &= ~OVERRIDE
        libc.capset(header, sets)


def keep_checkpoints(kept: Path) -> None:
    """A copy of each, since a run removes the older ones."""
    save = RunFolder.save

    def saved(self: RunFolder, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        newest = checkpoints(self.path)[-1]
        shutil.copytree(newest, kept / "checkpoints" / newest.name, dirs_exist_ok=True)

    RunFolder.save = saved  # type: ignore[method-assign]


def child(argv: list[str], out: Path, log: Path, fault: Fault | None, places: Mapping[str, str] = {}) -> None:
    """The whole life of a run's process. places: variables that make it a rank among others."""
    os.environ.update(places)
    from finetune.run import run_entry
    from finetune.text import ENTRY

    tqdm.set_lock(threading.RLock())  # one of processes would be left behind by a kill
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if fault:
        install(fault, out)
    sys.argv = ["text", *argv]
    run_entry(ENTRY)
