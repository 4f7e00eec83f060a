"""The sizes of a mesh: what is inferred, what is refused, each in one line before anything is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config import TrainConfig
from finetune.errors import UserError
from finetune.mesh import MeshSizes, mesh_sizes
from finetune.run import run
from finetune.sharding import refuse_unshardable
from finetune.text import ENTRY
from nanollama.options import ModelOptions
from nanollama.tensor_parallel import refuse_uncuttable
from tests.tiny import config


@pytest.mark.parametrize(
    ("given", "ranks", "made"),
    [
        ((0, 0, 0), 4, MeshSizes(4, 1, 1)),
        ((0, 4, 0), 4, MeshSizes(1, 4, 1)),
        ((0, 2, 0), 4, MeshSizes(2, 2, 1)),
        ((2, 0, 0), 4, MeshSizes(2, 2, 1)),
        ((0, 0, 2), 4, MeshSizes(2, 1, 2)),
        ((0, 2, 2), 8, MeshSizes(2, 2, 2)),
        ((0, 0, 0), 1, MeshSizes(1, 1, 1)),
    ],
)
def test_what_is_left_out_of_the_mesh_is_inferred(given: tuple[int, int, int], ranks: int, made: MeshSizes) -> None:
    assert mesh_sizes(*given, world_size=ranks) == made


@pytest.mark.parametrize(("given", "ranks"), [((0, 2, 0), 1), ((2, 2, 2), 4), ((0, 3, 0), 4), ((3, 0, 0), 4)])
def test_a_wrong_product_is_refused_with_the_line_to_type(given: tuple[int, int, int], ranks: int) -> None:
    with pytest.raises(UserError, match=f"there are {ranks}: start torchrun --nproc_per_node"):
        mesh_sizes(*given, world_size=ranks)


def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = TrainConfig(data=str(tmp_path / "none.txt"), init="260K", out=str(out), fsdp=2)
    with pytest.raises(UserError, match="--dp 1 --fsdp 2 --tp 1"):
        run(ENTRY, given)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "sizes", "named"),
    [
        ({"method": "qlora"}, MeshSizes(fsdp=2), "--method qlora"),
        ({"optimizer": "adamw8bit"}, MeshSizes(tp=2), "--optimizer adamw8bit"),
        ({"compile": True}, MeshSizes(tp=2), "--compile"),
        ({"optimizer_in_backward": True, "grad_clip": 0.0}, MeshSizes(fsdp=2), "--optimizer_in_backward"),
    ],
)
def test_what_shards_cannot_do_is_refused_by_name(changes: dict[str, Any], sizes: MeshSizes, named: str) -> None:
    config = replace(TrainConfig(), **changes)
    with pytest.raises(UserError, match=named):
        refuse_unshardable("text", config, sizes)
    refuse_unshardable("text", config, MeshSizes(dp=2))
    refuse_unshardable("text", TrainConfig(), sizes)


def test_preferences_over_shards_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"finetune\.preference"):
        refuse_unshardable("preference", TrainConfig(), MeshSizes(fsdp=2))


@pytest.mark.parametrize(
    ("changes", "parts", "said"),
    [
        ({}, 4, "n_kv_heads is 2, which 4 ranks cannot share"),
        ({"hidden_dim": 49}, 2, "hidden_dim is 49"),
        ({"vocab_size": 5, "n_heads": 4, "n_kv_heads": 4}, 4, "leaves the last rank without a row"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(changes: dict[str, int], parts: int, said: str) -> None:
    refuse_uncuttable(config(), 2)
    with pytest.raises(ValueError, match=said):
        refuse_uncuttable(config(**changes), parts)


@pytest.mark.parametrize("name", ["quantize", "draft", "lookup", "compile"])
def test_decoding_over_parts_refuses_what_it_cannot_do(name: str) -> None:
    given: dict[str, Any] = {"quantize": "int8", "draft": "x", "lookup": True, "compile": "on"}
    with pytest.raises(ValueError, match=f"--{name} does not work over parts"):
        ModelOptions(tp=2, **{name: given[name]}).load("anywhere")
