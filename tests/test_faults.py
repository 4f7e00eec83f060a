"""The small form of `python -m benchmarks.faults`, and what it stands on: locks, files cut while they are mapped."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import faults
from benchmarks.fault_child import Fault
from finetune.errors import UserError
from finetune.lock import held
from finetune.parallelize import World
from nanollama.mapped import LINE

CUT = """
import os, sys
import numpy as np, torch
from nanollama import cli

def read(how: str, path: str) -> None:
    numbers = np.memmap(path, dtype="f4", mode="r")
    tensor = torch.from_numpy(numbers)
    os.truncate(path, 4096)
    {"numpy": numbers.sum, "torch": lambda: tensor * 2, "bytes": lambda: bytes(numbers)}[how]()

torch.set_num_threads(2)
print("started", flush=True)
cli.run(read, sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems send other signals")
def test_a_file_cut_while_it_is_mapped_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * (1 << 22))
    line = [sys.executable, "-W", "ignore", "-c", CUT, "torch", str(file)]
    done = subprocess.run(line, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, b"started\n", LINE.strip())


def test_a_folder_is_one_processs_until_it_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    world = World(torch.device("cpu"))
    with held(tmp_path, world):
        (tmp_path / "new").write_text("{}")
        os.replace(tmp_path / "new", tmp_path / "config.json")  # as a run does that goes on
        with pytest.raises(UserError, match="another process trains in it"), held(tmp_path, world):
            pytest.fail("two hold it")
    with held(tmp_path, world):  # it was given back
        assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.slow
def test_killed_and_hurt_runs_lose_nothing_and_end_the_same(tmp_path: Path) -> None:
    bench, found = faults.Bench(tmp_path), faults.Found()
    faults.kill(bench, 6, random.Random(5), found)
    assert (found.troubles, sum(found.tried.values())) == ([], 6)
    assert faults.fill_disk(bench, 30_000) == []
    assert faults.lock_folder(bench) == []
    assert faults.turn_clock(bench, 1) == []
    assert faults.meet(bench) == []
    assert faults.lose_folder(bench, "async") == []
    assert faults.refuse_writes(bench, Fault("quota", 40), "quota", "async") == []
    assert faults.take_data(bench, "cut") == [] and faults.take_data(bench, "replaced") == []


@pytest.mark.slow
def test_a_checkpoint_that_is_not_the_unbroken_runs_is_noticed(tmp_path: Path) -> None:
    bench, out = faults.Bench(tmp_path), tmp_path / "out"
    assert bench.run(out, Fault("step", 0.0, 5))[0] == -9
    newest = faults.newest_step(out)
    assert newest > 0 and bench.compare(out, newest) == [] and bench.compare(out, newest + 2) != []
    weights = out / "checkpoints" / f"step_{newest:08d}" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert bench.compare(out, newest) != [] and bench.go_on(out) != []
