"""Valid files changed field by field against every reader: each is opened or refused in one line, soon and in little.

A finding is anything else: another exception, a message of several lines, more than 2 s of CPU, more than 300 MB
beyond what the process has, the end of the process, a file written outside of the folder, a program started, a
connection. Each is printed with the seed that repeats it and kept as a small file.

    python tests/support/fuzz.py --seconds 60                     # all readers in turn; `make fuzz SECONDS=60`
    python tests/support/fuzz.py --inputs 20000 --readers tiktoken --keep findings --json fuzz.json
    tiktoken: 20,000 inputs, 16,102 refused, 3,898 opened, 0 findings
"""

import json as jsonlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzz_target import Target
from fuzz_targets import TEXT_READERS, targets, text_targets
from nanollama.cli import run

LIMIT_S = 2.0  # of CPU: the machine may be busy with other things
LIMIT_BYTES = 300 << 20
HANGS_S = 20  # of CPU, or of waiting for nothing: a reader in C hears no signal, so its process is ended
WAITS = 6  # times HANGS_S on a busy machine
BATCH = 500  # inputs of a process


@dataclass
class Tally:
    """Of one reader."""

    inputs: int = 0
    refused: int = 0
    opened: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    def line(self, name: str) -> str:
        counts = f"{self.inputs:,} inputs, {self.refused:,} refused, {self.opened:,} opened"
        return f"{name}: {counts}, {len(self.findings)} findings"


def changed(name: str, target: Target, original: bytes, seed: int, i: int) -> bytes:
    return target.change(original, random.Random(f"{name} {seed} {i}"))


def try_one(target: Target, data: bytes) -> tuple[str, str]:
    """("refused", its line), ("opened", "") or ("finding", what)."""
    started = time.process_time()
    watched.clear()
    try:
        line = target.attempt(data)
    except BaseException as error:  # a panic of Rust's is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "finding", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if watched:
        return "finding", f"did what no reader does: {watched[0]}"
    taken = time.process_time() - started
    if taken > LIMIT_S:
        return "finding", f"took {taken:.1f} s"
    return ("opened", "") if line is None else ("refused", line)


watched: list[str] = []  # what the reader did that none may do
STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.putenv")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "os.truncate")

DIR_FD = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}  # which of the arguments it is


def watch(folder: Path) -> None:
    """From now on what is written outside of the folder, or started, is noted; there is no way back."""
    inside = str(folder.resolve())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in STARTS:
            # The one program of ours: a tokenizer.json of no known form runs in a process with limits.
            if "nanollama.gate.worker" not in str(args):
                watched.append(f"{event} {str(args)[:80]}")
        elif (writes or event in CHANGES) and isinstance(args[0], str | bytes | os.PathLike):
            opened = args[DIR_FD[event]] if event in DIR_FD else -1  # rmtree removes by the descriptor of the folder
            beside = os.readlink(f"/proc/self/fd/{opened}") if opened >= 0 else ""
            place = os.path.realpath(os.path.join(beside, os.fsdecode(args[0])))
            if not place.startswith((inside, "/dev/null", tempfile.gettempdir() + "/parity-cmd-")):
                watched.append(f"{event} {os.path.relpath(place)[:80]}")

    sys.addaudithook(hook)


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, resource.RLIM_INFINITY))


def batch(name: str, target: Target, original: bytes, seed: int, numbers: range, out: int, folder: Path) -> None:
    """In a process of its own: a line of each input's outcome, written before the next is tried."""
    limit_memory()
    watch(folder)
    for i in numbers:
        os.write(out, f"{i}\t".encode())
        kind, what = try_one(target, changed(name, target, original, seed, i))
        os.write(out, f"{kind}\t{what.encode('ascii', 'backslashreplace').decode()}\n".encode())


def cpu_s(pid: int) -> float:
    """Of a process, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fork_batch(
    name: str, target: Target, original: bytes, seed: int, numbers: range, folder: Path
) -> list[tuple[int, str, str]]:
    """(input, outcome, what) of each; one that ends its process is a finding, and the last of the list."""
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(into)
        signal.alarm(0)
        try:
            batch(name, target, original, seed, numbers, out, folder)
        finally:
            os._exit(0)
    os.close(out)
    os.set_blocking(into, False)
    said, heard, spent = b"", time.monotonic(), 0.0
    while True:
        try:
            more = os.read(into, 1 << 16)
        except BlockingIOError:
            silent = time.monotonic() - heard
            if silent > WAITS * HANGS_S or (silent > HANGS_S and cpu_s(pid) - spent > HANGS_S):
                os.kill(pid, signal.SIGKILL)
                heard = time.monotonic() + 3600
            time.sleep(0.02)
            continue
        if not more:
            break
        said, heard, spent = said + more, time.monotonic(), cpu_s(pid)
    os.close(into)
    _, status = os.waitpid(pid, 0)
    rows = [line.split("\t") for line in said.decode().split("\n") if line]
    return [(int(row[0]), row[1], row[2]) if len(row) > 2 else (int(row[0]), "finding", ended(status)) for row in rows]


def ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return (
        f"ended the process by {signal.Signals(-code).name} (SIGKILL: no answer in {HANGS_S} s)"
        if code < 0
        else "ended it"
    )


def fuzz(
    name: str,
    target: Target,
    inputs: int,
    seed: int,
    seconds: float,
    keep: Path | None,
    report: Callable[[str], None],
    folder: Path,
) -> Tally:
    """All inputs, or as many as the seconds allow; folder: where the reader may write."""
    tally, original, started, i = Tally(), target.file.read_bytes(), time.monotonic(), 0

    def here(numbers: range) -> Iterator[tuple[int, str, str]]:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        limit_memory()
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, HANGS_S)  # of CPU: then the whole process ends, and the input is known
            yield number, *try_one(target, changed(name, target, original, seed, number))
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)

    while i < inputs and time.monotonic() - started < seconds:
        numbers = range(i, min(i + BATCH, inputs))
        outcomes = fork_batch(name, target, original, seed, numbers, folder) if target.forks else here(numbers)
        for number, kind, what in outcomes:
            i = number + 1
            tally.inputs += 1
            tally.refused += kind == "refused"
            tally.opened += kind == "opened"
            if kind == "finding":
                tally.findings.append(f"seed {seed} input {number}: {what}")
                report(f"{name}: {tally.findings[-1]}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    data = changed(name, target, original, seed, number)
                    (keep / f"{name.replace(' ', '_')}-{seed}-{number}").write_bytes(data)
    target.file.write_bytes(original)
    tally.seconds = round(time.monotonic() - started, 1)
    return tally


def main(
    *,
    inputs: int = 10**9,  # changed files of each reader
    seconds: float = 60.0,  # for all readers together
    seed: int = 0,  # of the changes
    readers: tuple[str, ...] = (),  # default: all
    keep: Path | None = None,  # a folder for the files that are findings
    json: Path | None = None,  # where the counts go
) -> int:
    """Fuzz the readers; 1 where there is a finding."""
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = bool(readers) and {*readers} <= {*TEXT_READERS}
        found = text_targets(Path(folder)) if texts else targets(Path(folder))
        chosen = [name for name in found if name in readers or not readers]
        for target in found.values():  # everything is imported before a limit is set
            if line := target.attempt(target.file.read_bytes()):
                raise ValueError(f"a valid file is refused: {line}")
        for name in chosen:
            tallies[name] = fuzz(name, found[name], inputs, seed, seconds / len(chosen), keep, print, Path(folder))
            print(tallies[name].line(name), flush=True)
    if json is not None:
        command = f"python tests/support/fuzz.py --seconds {seconds:g} --inputs {inputs} --seed {seed}"
        counts = {name: asdict(tally) for name, tally in tallies.items()}
        json.write_text(jsonlib.dumps({"command": command, "readers": counts}, indent=1) + "\n")
    return int(any(tally.findings for tally in tallies.values()))


if __name__ == "__main__":
    run(main)
