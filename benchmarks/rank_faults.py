"""Kills over ranks: one of two processes of a run is killed at a random moment, and two or one of them go on.

    python -m benchmarks.rank_faults --kills 40 --json benchmarks/results/rank_faults.json
    40 kills of one of 2 ranks, 9 of a run alone (21 whole, 15 sharded, 13 async): nothing lost, losses within 1e-4

After every kill the other rank has ended by itself, with one line that names the dead one, and no checkpoint is lost;
the run that goes on to its end has the losses of one that was left alone, but for the order of sums.
"""

import json as jsonlib
import multiprocessing
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.fault_child import child
from benchmarks.faults import PRELOADED, SAVES, SHAPE, newest_step
from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from nanollama.cli import run

STEPS = 24
SIZE = "--vocab_size 300 --seq_len 64 --save_every 2 --eval_every 1000 --threads 1 --device cpu --lr 0.01"
ENDS_S = 60  # for the rank that is left; the claim is 30 on a machine that does nothing else
WITHIN = 1e-4  # of a loss: other numbers of ranks sum in another order


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bench:
    """A folder with data, and the losses of a run of two ranks that nothing interrupts."""

    def __init__(self, work: Path) -> None:
        self.work, self.log = work, work / "log"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOADED, "torch.distributed.fsdp"])
        (work / "stories.txt").write_text("<|endoftext|>".join(stories(60)))
        (work / "shape.json").write_text(jsonlib.dumps(SHAPE))
        ranks = self.start(2, work / "whole", "whole")
        codes = self.join(ranks)
        if codes != [0, 0]:
            raise ValueError(f"the unbroken run ended with {codes}: {self.complaints()}")
        self.losses = losses(work / "whole")

    def start(self, size: int, out: Path, how: str, *flags: str) -> list[Any]:
        self.log.write_text("")
        begun = (out / "config.json").exists()
        named = ["--data", str(self.work / "stories.txt"), "--init", str(self.work / "shape.json")]
        named += ["--cache", str(self.work / "cache"), *SIZE.split(), "--max_steps", str(STEPS), "--batch_size", "1"]
        line = [*([] if begun else named), "--out", str(out), "--save", how, *(["--resume"] if begun else []), *flags]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        ranks = []
        for rank in range(size):
            places = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            ranks.append(self.context.Process(target=child, args=(line, out, self.log, None, places)))
            ranks[-1].start()
        return ranks

    def join(self, ranks: list[Any], limit_s: float = 600) -> list[int | None]:
        """Exit codes; None for one that had to be ended."""
        until = time.monotonic() + limit_s
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        return codes

    def complaints(self) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [text for text in lines if text.startswith("error: ") or "Traceback" in text]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line}


def stamp(out: Path) -> int:
    """Of the metrics, which the main rank writes anew when all of them begin to train; 0 before there are any."""
    return (out / "metrics.jsonl").stat().st_mtime_ns if (out / "metrics.jsonl").exists() else 0


def kill_one(bench: Bench, out: Path, rng: random.Random, tried: Counter[str]) -> tuple[bool, list[str]]:
    """(whether the run has ended by itself, what is wrong)."""
    before, size, how = newest_step(out), rng.choice((2, 2, 2, 1)) if out.exists() else 2, rng.choice(SAVES)
    mesh = ["--fsdp", rng.choice(("1", "2"))] if size > 1 else []
    was = stamp(out)
    ranks = bench.start(size, out, how, *mesh)
    while all(p.exitcode is None for p in ranks) and stamp(out) == was:
        time.sleep(0.005)  # until they have met: before, it is torchrun that ends the others
    time.sleep(rng.uniform(0, 3))
    dead = rng.randrange(size)
    if ranks[dead].exitcode is None:
        ranks[dead].kill()
    codes, where = bench.join(ranks, ENDS_S), f"{out.name}: rank {dead} of {size}, {how} {mesh}"
    if codes == [0] * size:
        return True, []
    tried[f"{how} of {size}"] += 1
    if codes[dead] != -signal.SIGKILL:
        return False, [f"{where} ended with {codes}: {bench.complaints()}"]
    said, left = bench.complaints(), [code for rank, code in enumerate(codes) if rank != dead]
    named = [text.startswith(f"error: rank {dead} of {size} ") for text in said]
    found = [] if size == 1 or (left in ([1], [0]) and named in ([True], [])) else [f"{where}: {codes}, {said}"]
    return False, found + ([f"{where}: step {before} is gone"] if newest_step(out) < before else [])


def compare(bench: Bench, out: Path) -> list[str]:
    mine = losses(out)
    far = [step for step, loss in bench.losses.items() if not abs(mine.get(step, 9e9) - loss) <= WITHIN * loss]
    return [f"{out.name}: losses differ from step {far[0]} on"] if far else []


def main(
    kills: int = 40,  # how many
    seed: int = 0,  # of their moments
    json: Path | None = None,  # where the result goes
) -> int:
    """Kill ranks of runs, and compare what is left with a run that was left alone."""
    began, rng, tried, troubles, runs = time.perf_counter(), random.Random(seed), Counter[str](), list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        while sum(tried.values()) < kills:
            runs += 1
            out, ended = Path(folder) / f"run-{runs}", False
            for _ in range(8):
                ended, found = kill_one(bench, out, rng, tried)
                troubles += found
                if ended or sum(tried.values()) >= kills:
                    break
            codes = [0] if ended else bench.join(bench.start(1, out, "whole"))
            troubles += compare(bench, out) if codes == [0] else [f"{out.name}: {codes}, {bench.complaints()}"]
            print(f"run {runs}: {sum(tried.values())} kills, {troubles or 'nothing lost'}", flush=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in tried.most_common())
    print(f"{sum(tried.values())} kills ({kinds}) of {runs} runs")
    print("\n".join(troubles) or f"nothing lost, losses within {WITHIN:g}")
    if json:
        command = f"python -m benchmarks.rank_faults --kills {kills} --seed {seed}"
        seconds = round(time.perf_counter() - began, 1)
        result = {"command": command, "kills": dict(tried), "runs": runs, "troubles": troubles, "seconds": seconds}
        json.write_text(jsonlib.dumps(result, indent=2) + "\n")
    return 1 if troubles else 0


if __name__ == "__main__":
    run(main)
