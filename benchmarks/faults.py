"""What a run survives: kills at chosen moments, a full disk, a read-only folder, a clock set back, a second process.

    python -m benchmarks.faults --kills 200 --json benchmarks/results/faults.json
    200 kills (63 in files, 31 in step, ...) of 31 runs (14 whole, 9 sharded, 8 async); 14 other faults
    nothing lost, nothing corrupt, nothing different

A run is killed until it ends: before a file is opened, renamed or removed or its bytes are flushed, within a step, an
evaluation or a sample; it saves whole, in shards, or in shards behind its back. After every kill each checkpoint that
is there must hold, byte for byte, what an unbroken run had at that step; the run that goes on to the end must have the
unbroken run's losses and weights bit for bit. Of two ranks one is killed, and two or one go on: losses within 1e-4.
Processes are forked from one that has torch loaded: a kill takes as long as the steps before it.
"""

import json as jsonlib
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.fault_child import Fault, child
from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from finetune.resume import SHARDS, checkpoints
from finetune.shards import read_shards
from nanollama.checkpoint import open_checkpoint
from nanollama.cli import run

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
STEPS = 16
SAVES = ("whole", "sharded", "async")
MESH = ("dp", "fsdp", "tp", "accumulate")
SIZE = "--vocab_size 300 --seq_len 128 --batch_size 2 --save_every 2 --eval_every 4 --sample_every 6 --threads 1"
LEFT_OUT = ("tokens_per_s", "peak_bytes")  # of metrics.jsonl: they differ from run to run
PRELOADED: tuple[str, ...] = (
    "benchmarks.fault_child",
    "finetune.text",
    "nanollama.generation.llama",
    "fire",
    "sentencepiece",
)
PRELOADED += ("matplotlib.figure", "matplotlib.backends.backend_agg", "torch._dynamo")
WAIT_S = 120  # for a run to end


@dataclass
class Found:
    """Counts of what was tried and what came of it."""

    tried: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    runs: int = 0
    ways: Counter[str] = field(default_factory=Counter)  # of saving


# --- Around it -------------------------------------------------------------------------------------------------------


class Bench:
    """A folder with data, an unbroken run with every checkpoint that it made, and processes to be hurt."""

    def __init__(self, work: Path) -> None:
        self.work, self.log = work, work / "log"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        (work / "stories.txt").write_text("<|endoftext|>".join(stories(60)))
        (work / "shape.json").write_text(jsonlib.dumps(SHAPE))
        self.whole = work / "whole"
        code, said = self.run(self.whole, Fault("keep"))
        if code != 0:
            raise ValueError(f"the unbroken run ended with {code}: {said}")
        self.numbers, self.weights = numbers(self.whole), weights(self.whole)
        self.kept = checkpoint_contents(Path(f"{self.whole}-kept"))

    def line(self, out: Path, *flags: str) -> list[str]:
        """Arguments of a run with dropout, so that random numbers count; --resume where there is one to go on with."""
        files = {"data": "stories.txt", "init": "shape.json", "cache": "cache"}
        named = [text for flag, name in files.items() for text in (f"--{flag}", str(self.work / name))]
        steps = ["--max_steps", str(STEPS), "--lr", "0.01", "--dropout", "0.1"]
        more = ["--resume"] if (out / "config.json").exists() else []
        return [*named, *SIZE.split(), *steps, "--out", str(out), *more, *flags]

    def start(self, out: Path, fault: Fault | None = None, *flags: str) -> Any:
        process = self.context.Process(target=child, args=(self.line(out, *flags), out, self.log, fault))
        process.start()
        return process

    def run(self, out: Path, fault: Fault | None = None, *flags: str) -> tuple[int | None, list[str]]:
        """The exit code (None of a run that had to be ended here), and the lines that complain."""
        self.log.write_text("")
        process = self.start(out, fault, *flags)
        process.join(WAIT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None, ["had to be ended"]
        return process.exitcode, self.complaints()

    def complaints(self) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [text for text in lines if text.startswith("error: ") or "Traceback" in text]

    def compare(self, out: Path, before: int) -> list[str]:
        """What is wrong with the checkpoints that are there; `before`: the newest step that was there before."""
        files = checkpoint_contents(out)
        found = [
            f"{out.name}: {name} is not that of the unbroken run" for name in files if files[name] != self.kept[name]
        ]
        return found + ([f"{out.name}: step {before} is gone"] if newest_step(out) < before else [])

    def compare_whole(self, out: Path) -> list[str]:
        """What is different in a run that has ended."""
        mine = weights(out)
        found = [] if numbers(out) == self.numbers else [f"{out.name}: losses differ"]
        same = mine.keys() == self.weights.keys() and all(torch.equal(mine[n], self.weights[n]) for n in mine)
        return found + ([] if same else [f"{out.name}: weights differ"])

    def go_on(self, out: Path, *flags: str) -> list[str]:
        """What is wrong with a run that is now left alone until its end."""
        code, said = self.run(out, None, *flags)
        return self.compare_whole(out) if code == 0 else [f"{out.name}: could not go on: exit code {code}, {said}"]


def numbers(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in LEFT_OUT} for line in read_metrics(out / "metrics.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(out / "final").weights
    return {name: opened[name].clone() for name in opened}


def newest_step(out: Path) -> int:
    return max((int(folder.name.removeprefix("step_")) for folder in checkpoints(out)), default=0)


def checkpoint_contents(out: Path) -> dict[str, dict[str, Any]]:
    """Name of each whole checkpoint -> its tensors' bytes and its state, in whichever way it was saved."""
    return {folder.name: content(folder) for folder in checkpoints(out)}


def content(folder: Path) -> dict[str, Any]:
    state = jsonlib.loads((folder / "state.json").read_text())
    state["config"] = {key: value for key, value in state["config"].items() if key not in ("out", "save", *MESH)}
    if (folder / SHARDS).exists():
        weights, states = read_shards(folder / SHARDS, {})
        tensors = weights | states
    else:
        tensors = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    numbers = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return {"state.json": state, **numbers}


# --- What is tried ---------------------------------------------------------------------------------------------------


def draw(rng: random.Random) -> Fault:
    """A kill: half of them amid files, the rest in a part of the run or at any time."""
    kind = rng.choice(("files", "files", "flush", "step", "evaluate", "sample", "any"))
    at = {"files": rng.randrange(70), "flush": rng.randrange(24), "any": rng.uniform(0, 2)}.get(
        kind, rng.uniform(0, 0.03)
    )
    return Fault(kind, at, {"step": rng.randrange(6), "evaluate": rng.randrange(3)}.get(kind, 0))


def kill(bench: Bench, kills: int, rng: random.Random, found: Found) -> None:
    """One run after the other, each killed up to ten times and then left to end."""
    while sum(found.tried.values()) < kills:
        found.runs += 1
        out, how = bench.work / f"killed-{found.runs}", rng.choice(SAVES)
        found.ways[how] += 1
        for _ in range(10):
            before, fault = newest_step(out), draw(rng)
            code, said = bench.run(out, fault, "--save", how)
            found.troubles += bench.compare(out, before)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                found.troubles.append(f"{out.name} ({how}): {fault} ended with {code}: {said}")
            found.tried[fault.kind] += 1
            if sum(found.tried.values()) >= kills:
                break
        found.troubles += bench.compare_whole(out) if code == 0 else bench.go_on(out)
        shutil.rmtree(out)


def fill_disk(bench: Bench, at_bytes: int, how: str = "whole") -> list[str]:
    """No file may grow beyond `at_bytes`: one line, exit code 1, and what was saved is left."""
    return refuse_writes(bench, Fault("disk", at_bytes), "File too large", how)


def refuse_writes(bench: Bench, fault: Fault, reason: str, how: str) -> list[str]:
    """The disk refuses what a save writes: one line with the reason, exit code 1, and what was saved is left."""
    out = bench.work / f"{fault.kind}-{fault.at}-{how}"
    bench.run(out, Fault("files", 45), "--save", how)
    before = newest_step(out)
    code, said = bench.run(out, fault, "--save", how)
    found = [] if (code, len(said)) == (1, 1) and reason in said[0] else [f"{out.name}: {code}, {said}"]
    return found + bench.compare(out, before) + bench.go_on(out)


def lose_folder(bench: Bench, how: str) -> list[str]:
    """The folder of the run is moved away while it trains: one line, and it goes on from where it was put."""
    out, put = bench.work / f"lost-{how}", bench.work / f"lost-{how}-put"
    bench.log.write_text("")
    process = bench.start(out, None, "--save", how)
    while process.exitcode is None and not newest_step(out):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    out.rename(put)
    os.kill(process.pid, signal.SIGCONT)
    process.join(WAIT_S)
    lines = bench.complaints()
    said = process.exitcode in (1, 2) and len(lines) == 1 and "Traceback" not in lines[0]
    shutil.rmtree(out, ignore_errors=True)
    put.rename(out)
    return [] if said and not bench.go_on(out) else [f"{out.name}: {process.exitcode}, {lines}"]


def lock_folder(bench: Bench) -> list[str]:
    """A folder that may not be written into: one line, and nothing is changed."""
    out = bench.work / "read-only"
    bench.run(out, Fault("files", 45))
    before = newest_step(out)
    folders = [out, *(path for path in out.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    code, said = bench.run(out, Fault("obeys"))
    for folder in folders:
        folder.chmod(0o755)
    found = [] if code in (1, 2) and len(said) == 1 and "ermission" in said[0] else [f"read-only: {code}, {said}"]
    return found + bench.compare(out, before) + bench.go_on(out)


def turn_clock(bench: Bench, seed: int) -> list[str]:
    """A clock that jumps, and checkpoints of tomorrow."""
    out = bench.work / f"clock-{seed}"
    bench.run(out, Fault("files", 45))
    for path in out.rglob("*"):
        os.utime(path, (2e9, 2e9))
    code, said = bench.run(out, Fault("clock", seed))
    return bench.compare_whole(out) if code == 0 else [f"{out.name}: {code}, {said}"]


def meet(bench: Bench) -> list[str]:
    """A second process on the folder of one that trains: it is refused, and the first one ends as if alone."""
    out = bench.work / "two"
    first = bench.start(out)
    while first.exitcode is None and not numbers(out):
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    code, said = bench.run(out)
    os.kill(first.pid, signal.SIGCONT)
    first.join(WAIT_S)
    refused = code == 2 and len(said) == 1 and "another process trains in it" in said[0]
    found = [] if refused else [f"two: the second ended with {code}, {said}"]
    return found + (
        bench.compare_whole(out) if first.exitcode == 0 else [f"two: the first ended with {first.exitcode}"]
    )


def take_data(bench: Bench, how: str) -> list[str]:
    """The tokens that a run has mapped are cut to nothing, or another file is put in their place."""
    out, cache = bench.work / how, bench.work / f"cache-{how}"
    shutil.copytree(bench.work / "cache", cache)
    bench.log.write_text("")
    process = bench.start(out, None, "--cache", str(cache))
    while process.exitcode is None and not numbers(out):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    for file in [path for path in cache.rglob("*.bin") if path.is_file()]:
        if how == "cut":
            os.truncate(file, 0)
        else:
            other = file.with_name("other")
            other.write_bytes(b"\0" * file.stat().st_size)
            other.replace(file)
    os.kill(process.pid, signal.SIGCONT)
    process.join(WAIT_S)
    lines = bench.complaints()
    if how == "replaced":
        return bench.compare_whole(out) if process.exitcode == 0 else [f"replaced: {process.exitcode}, {lines}"]
    said = process.exitcode == 2 and len(lines) == 1 and "became shorter" in lines[0]
    return bench.compare(out, 0) if said else [f"cut: {process.exitcode}, {lines}"]


def survey(work: Path, kills: int, seed: int) -> tuple[Found, dict[str, list[str]]]:
    """Everything: the kills, and the troubles of each other fault by name."""
    bench, found = Bench(work), Found()
    others: dict[str, Callable[[], list[str]]] = {
        **{f"full disk at {size:,} bytes": partial(fill_disk, bench, size) for size in (9_000, 30_000, 60_000, 90_000)},
        **{f"full disk, {how}": partial(fill_disk, bench, 30_000, how) for how in SAVES[1:]},
        **{f"quota, {how}": partial(refuse_writes, bench, Fault("quota", 40), "quota", how) for how in SAVES},
        **{
            f"no space left, {how}": partial(refuse_writes, bench, Fault("space", 41), "No space", how) for how in SAVES
        },
        **{f"folder moved away, {how}": partial(lose_folder, bench, how) for how in SAVES},
        "read-only folder": partial(lock_folder, bench),
        **{f"clock set back, {n}": partial(turn_clock, bench, n) for n in range(2)},
        "two processes": partial(meet, bench),
        "data cut while mapped": partial(take_data, bench, "cut"),
        "data replaced while mapped": partial(take_data, bench, "replaced"),
    }
    told = {}
    for name, attempt in others.items():
        told[name] = attempt()
        print(f"{name}: {told[name] or 'nothing lost'}", flush=True)
    kill(bench, kills, random.Random(seed), found)
    return found, told


def main(
    kills: int = 200,  # how many
    seed: int = 0,  # of their moments
    json: Path | None = None,  # where the result goes
) -> int:
    """Hurt training runs, and compare what is left with one that was left alone."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, told = survey(Path(folder), kills, seed)
    troubles = found.troubles + [text for texts in told.values() for text in texts]
    ways = ", ".join(f"{count} {how}" for how, count in found.ways.most_common())
    kinds = ", ".join(f"{count} in {kind}" for kind, count in found.tried.most_common())
    print(f"{sum(found.tried.values())} kills ({kinds}) of {found.runs} runs ({ways}); {len(told)} other faults")
    print("\n".join(troubles) or "nothing lost, nothing corrupt, nothing different")
    if json:
        result = {
            "benchmark": "faults",
            "command": f"python -m benchmarks.faults --kills {kills} --seed {seed}",
            "torch": torch.__version__,
            "kills": dict(found.tried),
            "runs": found.runs,
            "saved": dict(found.ways),
            "other_faults": sorted(told),
            "troubles": troubles,
            "seconds": round(time.perf_counter() - started, 1),
        }
        json.write_text(jsonlib.dumps(result, indent=2) + "\n")
    return 1 if troubles else 0


if __name__ == "__main__":
    run(main)
