"""A program that answers lines with lines, held to its limits: time to the first byte, time, bytes; and ended whole.

It leads a session of its own, so that what it started ends with it. Where a harness process is killed before it could
end its program, the process above does: `note_group` leaves word of each in the folder that `WORK` names.

    program = Program(["./my_port"], PROGRAM)
    program.ask("can")       # 'ok logits'
"""

import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

from parity.candidates.limits import Limits

ANSWERS = "{answers}"
WORK = "PARITY_WORK"  # the variable that names the folder of a candidate's process, which goes when it has ended
PATIENCE_S = 2.0  # for a program that says nothing more to end by itself
LOOK_S = 0.25  # between two looks whether it still runs
TAIL_BYTES = 1 << 16  # of what it says on stderr
CHUNK_BYTES = 1 << 16


class Ended(Exception):
    """The program says nothing more. `code`: its exit code, None where it was still running and had to be ended."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class Exceeded(Exception):
    """It did not keep to its limits; one line. The program has been ended."""


def own_environment() -> dict[str, str]:
    """Without what keeps our own processes from importing out of the folder that they are started in."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}


class Program:
    """A running program; `end` ends it and what it started."""

    def __init__(self, words: list[str], limits: Limits, environment: dict[str, str] | None = None) -> None:
        own = any(ANSWERS in word for word in words)
        into, outof = os.pipe() if own else (-1, -1)
        self.limits = limits
        self.process = subprocess.Popen(
            [word.replace(ANSWERS, f"/dev/fd/{outof}") for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if own else subprocess.PIPE,
            bufsize=0,
            env=environment or own_environment(),
            pass_fds=(outof,) if own else (),
            start_new_session=True,
        )
        note_group(self.process.pid)
        assert self.process.stdin and self.process.stdout
        if own:
            os.close(outof)  # so that the stream ends with the program
        said = self.process.stdout if own else self.process.stderr
        assert said is not None
        self.answers = into if own else self.process.stdout.fileno()
        self.own = into if own else None
        self.over = False
        self.stdin = self.process.stdin.fileno()
        self.held = bytearray()  # what came behind the last answer
        self.said: deque[bytes] = deque()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.answers, False)
        self.listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self.listener.start()

    def ask(self, request: str) -> str:
        """The line that it answers. Raises Ended and Exceeded."""
        if self.over:
            raise self._ended()
        if self.held or self._ready(self.answers, 0):
            self._take()
            if self.held:
                raise self._exceeded(f"said more than one line before `{request[:40]}`: {bytes(self.held[:60])!r}")
        started = time.monotonic()
        self._send(request.encode() + b"\n", started)
        while b"\n" not in self.held:
            limit = self.limits.answer_s if self.held else self.limits.first_byte_s
            left = started + min(limit, self.limits.answer_s) - time.monotonic()
            if left <= 0:
                raise self._late(request)
            if not self._ready(self.answers, min(left, LOOK_S)):
                if self.process.poll() and not self._ready(self.answers, 0):  # a child of it holds the stream open
                    raise self._ended()
                continue
            if not self._take():
                raise self._ended()
            if len(self.held) > self.limits.answer_bytes:
                most = f"{self.limits.answer_bytes / 2**20:g}"
                raise self._exceeded(f"answers with more than {most} MiB: a larger --answer_mb lets it")
        line, _, rest = self.held.partition(b"\n")
        self.held = bytearray(rest)
        return line.decode("utf-8", "replace")

    def _send(self, data: bytes, started: float) -> None:
        """A program that does not read is late, too."""
        while data:
            left = started + self.limits.first_byte_s - time.monotonic()
            if left <= 0 or not self._ready(self.stdin, left, write=True):
                raise self._late("reading the request")
            try:
                data = data[os.write(self.stdin, data[:CHUNK_BYTES]) :]
            except BlockingIOError:
                time.sleep(0.01)  # there is room, and less than a pipe takes at once
            except BrokenPipeError:
                raise self._ended() from None

    def _ready(self, file: int, seconds: float, write: bool = False) -> bool:
        poll = select.poll()
        poll.register(file, select.POLLOUT if write else select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def _take(self) -> bool:
        """What is there to read; False at the end."""
        try:
            found = os.read(self.answers, CHUNK_BYTES)
        except BlockingIOError:
            return True
        self.held += found
        return bool(found)

    def _late(self, request: str) -> Exceeded:
        whole = bool(self.held)
        seconds = self.limits.answer_s if whole else self.limits.first_byte_s
        flag = "--answer_s" if whole or seconds == self.limits.answer_s else "--first_byte_s"
        words = "no whole answer" if whole else "no answer"
        return self._exceeded(f"gave {words} to `{request.split(' ')[0]}` within {seconds:g} s: a larger {flag} waits")

    def _exceeded(self, what: str) -> Exceeded:
        self.end()
        return Exceeded(what)

    def _ended(self) -> Ended:
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(PATIENCE_S)
        self.end()
        return Ended(code)

    def _listen(self, stream: IO[bytes]) -> None:
        """Keep the last of what it says beside its answers."""
        size = 0
        with suppress(OSError), stream:
            while found := os.read(stream.fileno(), CHUNK_BYTES):
                self.said.append(found)
                size += len(found)
                while size - len(self.said[0]) > TAIL_BYTES:
                    size -= len(self.said.popleft())

    def last_words(self) -> str:
        """The last line on stderr."""
        self.listener.join(1.0)  # what it started may hold the stream open
        lines = b"".join(list(self.said)).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"

    def end(self) -> None:
        """Stop the program and what it started."""
        if self.over:
            return
        self.over = True
        end_group(self.process.pid, reaped=self.process.poll() is not None)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        forget_group(self.process.pid)
        self.listener.join(1.0)
        assert self.process.stdin and self.process.stdout
        with suppress(OSError):
            self.process.stdin.close()
        if self.own is None:
            self.process.stdout.close()
        else:
            os.close(self.own)


# --- What is left of a program whose harness was killed --------------------------------------------------------------


def note_group(leader: int) -> None:
    folder = os.environ.get(WORK)
    if folder:
        (Path(folder) / f"group-{leader}").write_text(birth(leader))


def forget_group(leader: int) -> None:
    folder = os.environ.get(WORK)
    if folder:
        (Path(folder) / f"group-{leader}").unlink(missing_ok=True)


def end_noted_groups(folder: Path) -> None:
    """End the groups that are noted in a folder, but for numbers that belong to other processes by now."""
    for file in folder.glob("group-*"):
        leader = int(file.name.removeprefix("group-"))
        if birth(leader) in ("", file.read_text()):
            end_group(leader, reaped=False)


def end_group(leader: int, *, reaped: bool) -> None:
    """Kill a process group. reaped: its leader's end was waited for, so that a process of that number is another."""
    if reaped and birth(leader):
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def birth(pid: int) -> str:
    """When a process began, in ticks (Linux; "" elsewhere, and of one that is not there)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
