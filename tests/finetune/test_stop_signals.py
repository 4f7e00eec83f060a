"""One rank of several is asked to stop, and all of them stop by its signal."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.parallelize import World

STEP = """
import signal, sys
from pathlib import Path

import numpy as np
import torch

from finetune.build import fresh_weights
from finetune.config import TrainConfig, resolve
from finetune.parallelize import open_world
from finetune.resume import RunFolder
from finetune.train import Loop, Setup
from nanollama.model import ModelConfig, Transformer


class Letters:
    bos_id, lengths, special_ids = 1, np.full(8, 9), {}

    def tokens(self, document, start, stop):
        return np.arange(1 + start, 1 + stop)

    def decode(self, ids):
        return "a" * len(ids)


torch.set_num_threads(1)
world = open_world("cpu")
shape = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=11, hidden_dim=24)
setup = Setup(
    folder=RunFolder(Path(sys.argv[1]), resolve(TrainConfig(init="260K", seq_len=16, batch_size=1), "cpu", 1)),
    model=Transformer.from_weights(shape, fresh_weights(shape, torch.Generator().manual_seed(0))),
    tokenizer=Letters(), train=Letters(), val=Letters(), fingerprint="", world=world, sample=str,
)
caught = signal.SIGTERM if world.rank == 1 else 0
metrics, stop = Loop(setup).step(caught)
print(int(stop), metrics.tokens, metrics.loss)
world.close()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_signal_that_one_rank_caught_stops_both(tmp_path: Path) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STEP, str(tmp_path)],
            env={**os.environ, **meeting, "RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    first, second = (out.split() for out, _ in said)
    assert first[0] == second[0] == str(int(signal.SIGTERM)), "half of SIGTERM would be SIGFPE, an eighth nothing"
    assert first[1:] == second[1:], "both ranks count the labels, and the loss, of both"


@pytest.mark.parametrize("stop", [0, int(signal.SIGINT), int(signal.SIGTERM)])
def test_one_rank_stops_by_its_own_signal(stop: int) -> None:
    assert World(torch.device("cpu")).max(stop) == stop
