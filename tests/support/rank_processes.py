"""Whole runs of several gloo ranks, each a process forked from one that has torch loaded already.

ranks = Ranks(2, ["--data", ...], log)
ranks.wait_for_step(out, 5)
ranks.kill(1)
codes = ranks.join()
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from finetune.metrics import StepMetrics, read_metrics
from finetune.run import run_entry
from finetune.text import ENTRY
from finetune.train import Loop

ROWS = "TEST_ROWS"  # where to note the rows of each step that each rank was given


def child(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    """One rank: its output goes to `log`."""
    os.environ.update(environment)
    if ROWS in environment:
        note_rows_(Path(environment[ROWS]))
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["text", *argv]
    run_entry(ENTRY)


def note_rows_(noted: Path) -> None:
    """From here on each step adds a line to the file: its number, this rank's place in the mesh, its tokens by row."""
    plain = Loop.step

    def step(loop: Loop, stop: int) -> tuple[StepMetrics, int]:
        loop.ahead = loop.ahead or loop._take(loop.progress.cursor)
        rows = [row for batch in loop.ahead.batches for row in batch.tokens.tolist() if any(row)]
        line = [loop.progress.step + 1, loop.world.data_rank, rows]
        with noted.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return plain(loop, stop)

    Loop.step = step  # type: ignore[method-assign]


def rows_of_steps(*runs: Path) -> dict[int, list[list[int]]]:
    """Of each step what all ranks saw of it, in one order; a later run does some steps of an earlier one again."""
    steps: dict[int, list[list[int]]] = {}
    for noted in runs:
        seen: dict[int, dict[int, list[list[int]]]] = {}
        for line in noted.read_text().splitlines():
            step, data_rank, rows = json.loads(line)
            seen.setdefault(step, {})[data_rank] = rows  # ranks that share a matrix see the same
        steps |= {step: sorted(row for rows in ranks.values() for row in rows) for step, ranks in seen.items()}
    return steps


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The processes of `python -m finetune.text` with these arguments."""

    def __init__(self, size: int, argv: list[str], log: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["finetune.text"])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        self.log = log
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            places = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
            process = context.Process(target=child, args=(argv, log, places if size > 1 else environment))
            process.start()
            self.processes.append(process)

    def wait_for_step(self, out: Path, step: int) -> None:
        while self.alive and steps_done(out) < step:
            time.sleep(0.002)
        assert self.alive, f"the run ended before step {step}:\n{self.said()}"

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()

    def join(self, timeout_s: float = 120) -> list[int | None]:
        """Exit codes; None for one that does not end."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self) -> str:
        return self.log.read_text()


def steps_done(out: Path) -> int:
    return max((entry["step"] for entry in read_metrics(out / "metrics.jsonl")), default=0)


def losses(out: Path) -> dict[int, float]:
    """Of each step, by its number."""
    return {entry["step"]: entry["loss"] for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry}
