"""Saving in shards: what is written is what is read, and the same documents come on any number of ranks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import tiny
from finetune.config import TrainConfig, resolve
from finetune.data.packing import Cursor, Packer
from finetune.mesh import MeshSizes
from finetune.optim import make_optimizer, trained
from finetune.parallelize import World
from finetune.resume import Progress, RunFolder, checkpoints
from finetune.save import Saver
from finetune.shards import disk_errors
from finetune.train import Loop
from nanollama.checkpoint import CheckpointError
from nanollama.model import Transformer

CPU = World(torch.device("cpu"))


def folder(path: Path, **changes: object) -> RunFolder:
    return RunFolder(path, resolve(TrainConfig(init="260K", **changes), "cpu", 1))  # type: ignore[arg-type]


def updated(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step of random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("how", ["sharded", "async"])
def test_a_state_in_shards_comes_back_bit_by_bit(tmp_path: Path, how: str, optimizer: str) -> None:
    run = folder(tmp_path, save=how, optimizer=optimizer)
    saved, restored = tiny.model(dim=64, hidden_dim=64), tiny.model(dim=64, hidden_dim=64, seed=1)
    first, second = make_optimizer(saved, run.config), make_optimizer(restored, run.config)
    updated(saved, first, seed=0)
    saver = Saver(run, CPU, "data", 0)
    saver.save(Progress(1, 7, Cursor(0, 1, 2)), saved, first, wait=False)
    saver.before_update()
    expected = {name: parameter.detach().clone() for name, parameter in trained(saved).items()}
    states = {name: dict(first.state[parameter]) for name, parameter in trained(saved).items()}
    states = {name: {key: value.clone() for key, value in state.items()} for name, state in states.items()}
    updated(saved, first, seed=1)  # while the thread still writes
    saver.save(Progress(1, 7, Cursor(0, 1, 2)), saved, first, wait=True)  # no second time
    saver.close()
    assert run.restore_(restored, second, "data") == Progress(1, 7, Cursor(0, 1, 2))
    for name, parameter in trained(restored).items():
        assert torch.equal(parameter, expected[name]), name
        assert second.state[parameter].keys() == states[name].keys()
        for key, value in second.state[parameter].items():
            assert torch.equal(value, states[name][key]), (name, key)


def test_an_older_checkpoint_stays_until_the_newer_is_whole(tmp_path: Path) -> None:
    run, model = folder(tmp_path, save="async"), tiny.model()
    optimizer = make_optimizer(model, run.config)
    saver = Saver(run, CPU, "data", 0)
    for step in (1, 2, 3):
        updated(model, optimizer, seed=step)
        saver.save(Progress(step), model, optimizer, wait=False)
        saver.before_update()
        whole = [int(path.name.removeprefix("step_")) for path in checkpoints(tmp_path)]
        assert step == 1 or whole[-1] >= step - 1
    saver.save(Progress(3), model, optimizer, wait=True)
    saver.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_disk_that_refuses_shards_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"), disk_errors(tmp_path):
        dcp.save({"a": torch.zeros(3)}, checkpoint_id=tmp_path / "file" / "shards", no_dist=True)


class Letters:
    """Documents of 3 to 12 tokens."""

    bos_id, lengths = 1, np.arange(60) % 10 + 3

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.arange(1 + start, 1 + stop)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_a_step_has_the_same_documents_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """Begun on 4 ranks; every rank has as many micro-batches as the others, some of them empty."""
    config = resolve(TrainConfig(init="260K", seq_len=16, batch_size=2), "cpu", 1)
    packer = Packer(Letters(), 16)  # type: ignore[arg-type]
    expected, behind = packer.take(Cursor(), 2 * 4)
    valid, numbers = 0, set()
    for rank in range(ranks):
        world = World(torch.device("cpu"), rank, ranks, MeshSizes(dp=ranks))
        loop = SimpleNamespace(config=config, world=world, packer=packer)
        loop.setup = SimpleNamespace(folder=RunFolder(tmp_path, config, micro_batches=4))
        data = Loop._take(loop, Cursor())  # type: ignore[arg-type]
        assert (data.rows, data.behind) == (expected, behind)
        valid += sum(batch.valid for batch in data.batches)
        numbers.add(len(data.batches))
    assert valid == packer.batch(expected).valid
    assert len(numbers) == 1
