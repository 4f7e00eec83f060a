"""Valid files changed field by field against every reader: each is opened or refused in one line, soon and in little.

A finding is anything else: another exception, a message of several lines, more than 2 s, more than 300 MB beyond what
the process has, the end of the process. Each is printed with the seed that repeats it and kept as a small file.

    python tests/support/fuzz.py --seconds 60                     # all readers in turn; `make fuzz SECONDS=60`
    python tests/support/fuzz.py --inputs 20000 --readers tiktoken --keep findings --json fuzz.json
    tiktoken: 20,000 inputs, 16,102 refused, 3,898 opened, 0 findings
"""

import json as jsonlib
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz_targets import Target, targets
from nanollama.cli import run

LIMIT_S = 2.0
LIMIT_BYTES = 300 << 20
HANGS_S = 20  # a reader in C hears no signal: its process is ended
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
    started = time.perf_counter()
    try:
        line = target.attempt(data)
    except BaseException as error:  # a panic of Rust's is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "finding", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    taken = time.perf_counter() - started
    if taken > LIMIT_S:
        return "finding", f"took {taken:.1f} s"
    return ("opened", "") if line is None else ("refused", line)


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, resource.RLIM_INFINITY))


def batch(name: str, target: Target, original: bytes, seed: int, numbers: range, out: int) -> None:
    """In a process of its own: a line of each input's outcome, written before the next is tried."""
    limit_memory()
    for i in numbers:
        os.write(out, f"{i}\t".encode())
        kind, what = try_one(target, changed(name, target, original, seed, i))
        os.write(out, f"{kind}\t{what.encode('ascii', 'backslashreplace').decode()}\n".encode())


def fork_batch(name: str, target: Target, original: bytes, seed: int, numbers: range) -> list[tuple[int, str, str]]:
    """(input, outcome, what) of each; one that ends its process is a finding, and the last of the list."""
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(into)
        signal.alarm(0)
        try:
            batch(name, target, original, seed, numbers, out)
        finally:
            os._exit(0)
    os.close(out)
    os.set_blocking(into, False)
    said, heard = b"", time.monotonic()
    while True:
        try:
            more = os.read(into, 1 << 16)
        except BlockingIOError:
            if time.monotonic() - heard > HANGS_S:
                os.kill(pid, signal.SIGKILL)
                heard = time.monotonic() + 3600
            time.sleep(0.005)
            continue
        if not more:
            break
        said, heard = said + more, time.monotonic()
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
    name: str, target: Target, inputs: int, seed: int, seconds: float, keep: Path | None, report: Callable[[str], None]
) -> Tally:
    """All inputs, or as many as the seconds allow."""
    tally, original, started, i = Tally(), target.file.read_bytes(), time.monotonic(), 0
    while i < inputs and time.monotonic() - started < seconds:
        for number, kind, what in fork_batch(name, target, original, seed, range(i, min(i + BATCH, inputs))):
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
        found = targets(Path(folder))
        chosen = [name for name in found if name in readers or not readers]
        for target in found.values():  # everything is imported before a limit is set
            if line := target.attempt(target.file.read_bytes()):
                raise ValueError(f"a valid file is refused: {line}")
        for name in chosen:
            tallies[name] = fuzz(name, found[name], inputs, seed, seconds / len(chosen), keep, print)
            print(tallies[name].line(name), flush=True)
    if json is not None:
        command = f"python tests/support/fuzz.py --seconds {seconds:g} --inputs {inputs} --seed {seed}"
        counts = {name: asdict(tally) for name, tally in tallies.items()}
        json.write_text(jsonlib.dumps({"command": command, "readers": counts}, indent=1) + "\n")
    return int(any(tally.findings for tally in tallies.values()))


if __name__ == "__main__":
    run(main)
