"""Run an implementation in a process of its own: progress from its stdout, its peak memory, its errors as one line."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parity.candidates.program import WORK, end_group, end_noted_groups
from parity.contract import UsageError
from parity.machine import anonymous_bytes
from parity.outside import LIBRARIES, OURS

POLL_S = 0.05


class Crash(RuntimeError):
    """The process failed in a way that is not the user's input: the message is its last line.

    NANOLLAMA_DEBUG=1 prints all of what it said.
    """


@dataclass
class Process:
    """A running implementation; `wait` ends it and returns its peak anonymous memory in bytes."""

    label: str
    popen: subprocess.Popen[str]
    stderr: Path
    on_progress: Callable[[str, str, float], None]
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def feed(self, text: str) -> None:
        """The rest of what the process waits for on its standard input. One that has ended tells why in `finish`."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.popen.stdin as pipe:
            pipe.write(text)

    def say(self, line: str) -> None:
        """One line of it, of several."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(line + "\n")
            self.popen.stdin.flush()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                    self.on_progress(self.label, str(event["stage"]), float(event["done"]))
                except (ValueError, KeyError, TypeError):
                    continue  # a library's own print

    def poll(self) -> bool:
        """Sample the memory; True when the process has ended."""
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes(self.popen.pid))
        return self.popen.poll() is not None

    def finish(self) -> None:
        """Raises UsageError (exit code 2 with its `error:` line) or Crash."""
        self.reader.join(timeout=5)
        code, text = self.popen.returncode, self.stderr.read_text(errors="replace")
        if code == 0:
            return
        lines = [line for line in text.splitlines() if line.strip()]
        if code == 2:
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UsageError(errors[-1] if errors else f"{self.label}: {lines[-1] if lines else 'unusable input'}")
        if code in (-9, 137):
            raise Crash(f"{self.label}: was killed, most likely for lack of memory")
        if os.environ.get("NANOLLAMA_DEBUG"):
            print(text, file=sys.stderr)
        if code < 0:
            raise Crash(f"{self.label}: was ended by {signal.Signals(-code).name}{_fatal_frame(lines)}")
        raise Crash(f"{self.label}: {lines[-1] if lines else f'exit code {code}'}")


def _fatal_frame(lines: list[str]) -> str:
    """The innermost line outside the harness and the libraries, of what faulthandler wrote."""
    frames = [m.groups() for line in lines if (m := re.match(r'\s*File "(.+)", line (\d+)', line))]
    mine = [f"{Path(file).name}:{line}" for file, line in frames if not file.startswith((OURS, *LIBRARIES))]
    return f" at {mine[0]}" if mine else ""


@contextmanager
def start_process(
    label: str,
    module: str,
    arguments: list[str],
    log: Path,
    on_progress: Callable[[str, str, float], None],
    fed: bool = False,
) -> Iterator[Process]:
    """`python -m module arguments`; killed when the block is left early, so that Ctrl-C leaves nothing behind.

    fed: it reads standard input, see `Process.feed`. A candidate's process ends with all that it started and with its
    temporary folder, however it ends.
    """
    hostile = module.startswith("parity.candidates")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    # A folder `reference` or `parity` of the user's, where the command is typed, is not ours.
    quiet = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet["TOKENIZERS_PARALLELISM"] = "false"
    work = log.with_suffix(".work")
    if hostile:
        work.mkdir(exist_ok=True)
        quiet[WORK] = str(work)
    with log.open("w") as stderr:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet,
            start_new_session=hostile,
        )
    process = Process(label, popen, log, on_progress)
    try:
        yield process
    finally:
        reaped = popen.poll() is not None
        if hostile:
            end_group(popen.pid, reaped=reaped)
            end_noted_groups(work)
            shutil.rmtree(work, ignore_errors=True)
        if not reaped:
            popen.kill()
            popen.wait()
        if popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                popen.stdin.close()
        process.reader.join()


def wait_any(processes: list[Process]) -> Process:
    """The first of these to end, well or not: ask its `finish`."""
    while True:
        for process in processes:
            if process.poll():
                return process
        time.sleep(POLL_S)
