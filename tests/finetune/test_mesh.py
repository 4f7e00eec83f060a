"""No way to spread a run over ranks changes its numbers: losses, gradients, norms and weights are one process's within
G8, and each planted fault is outside of it. Two gloo ranks here, four under `slow`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel

import finetune.loss_shards
import mesh_cases
from finetune.parallelize import World
from mesh_cases import ALONE, Mesh, train, worst_gradient, worst_step
from rank_group import run_ranks

BOUND = 3.0  # G8: of the worst gradient and the worst loss, in noises

TWO = {
    "ddp": Mesh(),
    "fsdp": Mesh(fsdp=2),
    "tp": Mesh(tp=2),
    "fsdp lora": Mesh(fsdp=2, method="lora"),
    "tp lora": Mesh(tp=2, method="lora"),
    "tp norms, tied": Mesh(tp=2, method="norms", tied=True, steps=3),
    "fsdp no_embeddings, tied": Mesh(fsdp=2, method="no_embeddings", tied=True, steps=3),
    "tp checkpointed": Mesh(tp=2, changes={"activation_checkpointing": True}, steps=3),
    "fsdp checkpointed": Mesh(fsdp=2, changes={"activation_checkpointing": True}, steps=3),
}
FOUR = {
    "fsdp": Mesh(fsdp=4),
    "copies of shards": Mesh(fsdp=2),
    "fsdp x tp": Mesh(fsdp=2, tp=2),
    "copies of parts": Mesh(tp=2),
    "fsdp x tp lora": Mesh(fsdp=2, tp=2, method="lora"),
    "fsdp x tp, tied": Mesh(fsdp=2, tp=2, tied=True),
    "copies of parts, lora": Mesh(tp=2, method="lora"),
}


# --- Planted faults --------------------------------------------------------------------------------------------------


@contextmanager
def averaged() -> Iterator[None]:
    with patch.object(FSDPModule, "set_gradient_divide_factor", lambda module, factor: None):
        yield


@contextmanager
def no_sum_behind_rows() -> Iterator[None]:
    """The all-reduce after wo and w2 is missing."""
    right = RowwiseParallel._prepare_output_fn

    def wrong(layouts: Any, is_local: bool, module: torch.nn.Module, out: DTensor, mesh: Any) -> Any:
        return out.to_local() if isinstance(module, torch.nn.Linear) else right(layouts, is_local, module, out, mesh)

    with patch.object(RowwiseParallel, "_prepare_output_fn", staticmethod(wrong)):
        yield


@contextmanager
def vocabulary_from_zero() -> Iterator[None]:
    """Each rank takes its rows of the head for the first ones."""
    rows = finetune.loss_shards.part_of
    shifted = lambda tensor: (slice(0, rows(tensor)[0].stop - rows(tensor)[0].start),)
    with patch.object(finetune.loss_shards, "part_of", shifted):
        yield


@contextmanager
def labels_of_this_rank() -> Iterator[None]:
    """Each divides by its own number of labels."""
    with patch.object(World, "sum", lambda world, values: torch.as_tensor(values, dtype=torch.float64)):
        yield


@contextmanager
def the_same_rows() -> Iterator[None]:
    with patch.object(World, "data_rank", 0):
        yield


@contextmanager
def heads_apart() -> Iterator[None]:
    """wk and wv are cut, and then given to the other rank: query heads meet other heads' keys."""
    made = mesh_cases.wrap_

    def swapped(model: Any, config: Any, world: World) -> Any:
        wrapped = made(model, config, world)
        for layer in model.layers:
            for weight in (layer.attention.wk.weight, layer.attention.wv.weight):
                both = weight.detach().full_tensor().chunk(2)
                weight.detach().to_local().copy_(both[1 - world.rank])
        return wrapped

    with patch.object(mesh_cases, "wrap_", swapped):
        yield


@contextmanager
def norm_of_this_shard() -> Iterator[None]:
    def clipped(parameters: list[torch.nn.Parameter], largest: float) -> torch.Tensor:
        grads = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for grad in grads:
            grad.mul_(min(1.0, largest / float(norm)))
        return norm

    with patch.object(torch.nn.utils, "clip_grad_norm_", clipped):
        yield


FAULTS: dict[str, tuple[Callable[[], Any], Mesh]] = {
    "gradients averaged": (averaged, Mesh(fsdp=2, steps=1)),
    "no sum behind rows": (no_sum_behind_rows, Mesh(tp=2, steps=1)),
    "vocabulary from zero": (vocabulary_from_zero, Mesh(tp=2, steps=1)),
    "labels of this rank": (labels_of_this_rank, Mesh(fsdp=2, steps=1)),
    "the same rows on every rank": (the_same_rows, Mesh(fsdp=2, steps=1)),
    "query and key heads apart": (heads_apart, Mesh(tp=2, steps=1)),
}


# --- The runs --------------------------------------------------------------------------------------------------------


def run_all(meshes: dict[str, Mesh], with_faults: bool, folder: Path) -> dict[str, Any]:
    found = {name: train(mesh, mesh.world()) for name, mesh in meshes.items()}
    if with_faults:
        for name, (plant, mesh) in FAULTS.items():
            with plant():
                found[name] = train(mesh, mesh.world())
        with norm_of_this_shard():
            found["norm of this shard"] = train(Mesh(fsdp=2, steps=2), Mesh(fsdp=2).world())
        lean = Mesh(fsdp=2, changes={"weights": "bf16", "dtype": "bf16"})
        found["bf16 weights"] = train(lean, lean.world())
        half = Mesh(tp=2, changes={"dtype": "bf16"}, steps=3)
        found["bf16 tp"] = train(half, half.world())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, partial(run_all, TWO, True), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, partial(run_all, FOUR, False), tmp_path_factory.mktemp("four"))


Alone = Callable[[Mesh], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def alone() -> Alone:
    """One process: in fp32, in another layout of rows and micro-batches, and in float64, which is the truth."""
    kept: dict[str, Any] = {}

    def runs(mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        plain = dataclasses.replace(mesh, fsdp=0, tp=0, changes={})
        if str(plain) not in kept:
            kept[str(plain)] = (train(plain, ALONE), other_layout(plain), train(plain, ALONE, torch.float64))
        return kept[str(plain)]

    return runs


def other_layout(mesh: Mesh) -> dict[str, Any]:
    """All rows of a step in one batch."""
    apart = mesh_cases.batches_of

    def together(packer: Any, step: int, world: World, rows: int) -> list[Any]:
        listed = apart(packer, step, world, rows)
        one = {
            name: torch.cat([getattr(b, name) for b in listed]) for name in ("tokens", "labels", "positions", "doc_ids")
        }
        return [dataclasses.replace(listed[0], **one, valid=sum(b.valid for b in listed))]

    with patch.object(mesh_cases, "batches_of", together):
        return train(mesh, ALONE)


def assert_one_process(found: list[dict[str, Any]], name: str, mesh: Mesh, alone: Alone) -> None:
    one, other, exact = alone(mesh)
    mine = found[0][name]
    assert worst_gradient(mine, one, other, exact) <= BOUND
    for what in ("losses", "norms"):
        assert worst_step(what, mine, one, other, exact) <= BOUND, what
    assert mine["norms"][0] == pytest.approx(exact["norms"][0], rel=1e-5)
    for rank in found[1:]:
        assert rank[name]["losses"] == mine["losses"]
        assert all(torch.equal(rank[name]["weights"][n], w) for n, w in mine["weights"].items())


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_one_process(two: list[dict[str, Any]], name: str, alone: Alone) -> None:
    assert_one_process(two, name, TWO[name], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_as_one_process(four: list[dict[str, Any]], name: str, alone: Alone) -> None:
    assert_one_process(four, name, FOUR[name], alone)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(two: list[dict[str, Any]], name: str, alone: Alone) -> None:
    one, other, exact = alone(FAULTS[name][1])
    assert worst_gradient(two[0][name], one, other, exact) > 100 * BOUND


def test_a_norm_of_one_shard_is_seen(two: list[dict[str, Any]], alone: Alone) -> None:
    assert worst_step("norms", two[0]["norm of this shard"], *alone(Mesh(steps=2))) > 100 * BOUND


def test_bf16_over_parts_is_as_near_as_bf16_in_one_process(two: list[dict[str, Any]], alone: Alone) -> None:
    _, _, exact = alone(Mesh(steps=3))
    one = train(Mesh(steps=3, changes={"dtype": "bf16"}), ALONE)
    for name, truth in exact["grads"].items():
        assert rms_ratio(two[0]["bf16 tp"]["grads"][name], one["grads"][name], truth) <= BOUND, name


def rms_ratio(mine: torch.Tensor, one: torch.Tensor, truth: torch.Tensor) -> float:
    return mesh_cases.rms(mine - truth) / mesh_cases.rms(one - truth)


def test_sharded_bf16_weights_learn_and_draw_for_themselves(two: list[dict[str, Any]]) -> None:
    found = two[0]["bf16 weights"]
    assert found["losses"][-1] < found["losses"][0]
    halves = found["weights"]["output.weight"].float().chunk(2)
    assert not torch.equal(halves[0][:30], halves[1][:30])
