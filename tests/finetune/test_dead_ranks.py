"""Runs of several ranks that lose one: the others end with a line that names it, and the run goes on from its save."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.prepare.stories import stories
from finetune.resume import checkpoints
from rank_processes import ROWS, Ranks, losses, rows_of_steps, steps_done

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
MANY = "100000"  # steps: more than are waited for


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dead")
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories(60)))
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    return folder


def line(home: Path, out: Path, *flags: str) -> list[str]:
    data = ["--data", str(home / "stories.txt"), "--init", str(home / "shape.json"), "--cache", str(home / "cache")]
    small = "--vocab_size 300 --seq_len 64 --batch_size 1 --save_every 4 --eval_every 1000 --threads 1 --device cpu"
    return [*data, *small.split(), "--max_steps", "16", "--lr", "0.01", "--out", str(out), *flags]


@pytest.fixture(scope="module")
def straight(home: Path) -> dict[int, float]:
    """The losses of a run of one process that nothing interrupts; a step is four micro-batches."""
    alone = Ranks(1, line(home, home / "straight", "--accumulate", "4"), home / "straight.log")
    assert alone.join() == [0], alone.said()
    return losses(home / "straight")


def complaints(said: str) -> list[str]:
    return [text for text in said.splitlines() if text.startswith("error:")]


def test_a_killed_rank_is_named_and_other_numbers_of_ranks_go_on(home: Path, straight: dict[int, float]) -> None:
    out = home / "killed"
    two = Ranks(2, line(home, out, "--accumulate", "2"), home / "killed.log")
    two.wait_for_step(out, 5)
    two.kill(1)
    assert two.join(timeout_s=30) == [1, -signal.SIGKILL]
    [complaint] = complaints(two.said())
    assert complaint.startswith(f"error: rank 1 of 2 (process {two.processes[1].pid} on ")
    assert f"the last good checkpoint is {checkpoints(out)[-1]}: continue with " in complaint
    assert f"--out {out} --resume" in complaint
    three = Ranks(3, ["--out", str(out), "--resume"], home / "three.log")  # 4 micro-batches: 2, 1 and 1 of them
    three.wait_for_step(out, 9)
    three.kill(0)
    assert three.join(timeout_s=30) == [-signal.SIGKILL, 1, 1]
    assert [text.partition(" (")[0] for text in complaints(three.said())] == ["error: rank 0 of 3"]
    alone = Ranks(1, ["--out", str(out), "--resume"], home / "alone.log")
    assert alone.join() == [0], alone.said()
    assert losses(out) == pytest.approx(straight, rel=1e-5)


def test_shards_are_continued_on_other_meshes(home: Path, straight: dict[int, float]) -> None:
    out = home / "shards"
    two = Ranks(2, line(home, out, "--accumulate", "2", "--fsdp", "2", "--save", "async"), home / "shards2.log")
    two.wait_for_step(out, 9)
    two.kill(1)
    assert two.join(timeout_s=30) == [1, -signal.SIGKILL]
    assert {path.name for path in (checkpoints(out)[-1] / "shards").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }
    alone = Ranks(1, ["--out", str(out), "--resume", "--save", "sharded"], home / "shards1.log")
    alone.wait_for_step(out, 13)
    alone.kill(0)
    assert alone.join() == [-signal.SIGKILL]
    assert (checkpoints(out)[-1] / "shards" / ".metadata").exists()
    copies = Ranks(2, ["--out", str(out), "--resume", "--dp", "2"], home / "shards3.log")
    assert copies.join() == [0, 0], copies.said()
    assert losses(out) == pytest.approx(straight, rel=1e-5)


@pytest.mark.slow
def test_a_run_on_two_by_two_ranks_goes_on_on_two_one_and_four(home: Path, straight: dict[int, float]) -> None:
    out, resume = home / "meshes", ["--out", str(home / "meshes"), "--resume"]
    noted = [home / f"rows{n}" for n in range(5)]
    first = line(home, out, "--fsdp", "2", "--tp", "2", "--accumulate", "2", "--save", "sharded")
    runs = [(4, first), (2, [*resume, "--fsdp", "2"]), (1, [*resume, "--save", "whole"])]
    for n, (size, argv) in enumerate(runs):
        ranks = Ranks(size, argv, home / f"meshes{n}.log", **{ROWS: str(noted[n])})
        while ranks.alive and last_save(out) <= 4 * n:
            time.sleep(0.002)
        ranks.kill(size - 1)
        assert ranks.join(timeout_s=30) == [1] * (size - 1) + [-signal.SIGKILL], ranks.said()
    four = Ranks(4, [*resume, "--dp", "4"], home / "meshes3.log", **{ROWS: str(noted[3])})
    assert four.join() == [0] * 4, four.said()
    assert losses(out) == pytest.approx(straight, rel=1e-5)
    alone = Ranks(1, line(home, home / "noted", "--accumulate", "4"), home / "noted.log", **{ROWS: str(noted[4])})
    assert alone.join() == [0], alone.said()
    assert rows_of_steps(*noted[:4]) == rows_of_steps(noted[4])


@pytest.mark.slow
def test_ten_kills_of_a_random_rank_at_random_moments_lose_nothing(home: Path) -> None:
    rng, out, seed = random.Random(time.time_ns()), home / "ten", "the kills were"
    flags = ["--save_every", "2", "--max_steps", "80"]
    whole = Ranks(4, line(home, home / "whole", *flags), home / "whole.log")
    assert whole.join() == [0] * 4, whole.said()
    took_s = 4.0
    for n in range(10):
        resume = ["--resume"] if (out / "config.json").exists() else []
        size = rng.choice([4, 2, 1]) if resume else 4
        how = rng.choice(["whole", "sharded", "async"])
        shards = ["--fsdp", rng.choice(["1", "2"]), "--save", how] if size > 1 else ["--save", how]
        ranks = Ranks(size, line(home, out, *flags, *resume, *shards), home / f"ten{n}.log")
        while ranks.alive and not (ranks.log.exists() and "data:" in ranks.said()):  # they have met
            time.sleep(0.01)
        time.sleep(rng.uniform(0, took_s))
        dead = rng.randrange(size)
        seed += f" {dead} of {size} {shards} at step {steps_done(out)},"
        if not ranks.alive:
            assert ranks.join() == [0] * size, ranks.said()
            continue
        ranks.kill(dead)
        began = time.monotonic()
        assert ranks.join(timeout_s=30) == [-signal.SIGKILL if r == dead else 1 for r in range(size)], seed
        assert time.monotonic() - began < 30
        named = [text.partition(" (")[0] for text in complaints(ranks.said())]
        assert named == ([f"error: rank {dead} of {size}"] if size > 1 else []), seed
    last = Ranks(2, line(home, out, *flags, "--resume"), home / "last.log")
    assert last.join() == [0, 0], last.said()
    assert losses(out) == pytest.approx(losses(home / "whole"), rel=1e-4), seed


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(home: Path) -> None:
    out, log = home / "again", home / "again.log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [*launch, "--max-restarts", "2", "-m", "finetune.text", *line(home, out, "--max_steps", "60")]
    with log.open("wb") as file:
        launcher = subprocess.Popen(argv, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while launcher.poll() is None and steps_done(out) < 10:
        time.sleep(0.01)
    os.kill(child_of(launcher.pid, "1"), signal.SIGKILL)
    assert launcher.wait(120) == 0, log.read_text()
    [complaint] = complaints(log.read_text())
    assert complaint.startswith("error: rank 1 of 2 (process ")
    typed = " ".join(argv[3:])
    assert complaint.endswith(f"continue with torchrun {typed} --resume")
    assert sorted(losses(out)) == list(range(1, 61))


def last_save(out: Path) -> int:
    """Its step."""
    return max((int(path.name.removeprefix("step_")) for path in checkpoints(out)), default=0)


def child_of(launcher: int, rank: str) -> int:
    """The process that torchrun started for this rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"torchrun has no rank {rank}")
