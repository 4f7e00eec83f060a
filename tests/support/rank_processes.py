"""Whole runs of several gloo ranks, each a process forked from one that has torch loaded already.

ranks = Ranks(2, ["--data", ...], log)
ranks.wait_for_step(out, 5)
ranks.kill(1)
codes = ranks.join()
"""

import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from finetune.metrics import read_metrics
from finetune.run import run_entry
from finetune.text import ENTRY


def child(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    """One rank: its output goes to `log`."""
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["text", *argv]
    run_entry(ENTRY)


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
