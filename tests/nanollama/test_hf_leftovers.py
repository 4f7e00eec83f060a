"""Hugging Face folders with leftovers of other programs: they open as in transformers, by both readers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_cases import LLAMA31, LLAMA32, assert_same, make_weights, write
from nanollama.checkpoint import CheckpointError, open_checkpoint
from nanollama.model import ModelConfig
from reference.files import open_folder
from reference.files.weights import Unusable

INDEX, SINGLE, SECOND = "model.safetensors.index.json", "model.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[ModelConfig], tuple[Path, dict[str, Tensor]]]:
    def made(config: ModelConfig) -> tuple[Path, dict[str, Tensor]]:
        weights = make_weights(config)
        return write(tmp_path, "hf", config, weights), weights

    return made


def opens(path: Path, config: ModelConfig, weights: dict[str, Tensor]) -> list[str]:
    """The notices."""
    opened = open_checkpoint(path)
    assert_same(opened, config, weights, None)
    theirs = open_folder(path)
    assert all(torch.equal(theirs.weights[name], tensor) for name, tensor in weights.items())
    return list(opened.notices)


def indexed(path: Path, files: list[str], more: dict[str, str]) -> None:
    """The weights in these files, with an index that names `more` tensors too."""
    stored = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    weight_map = {name: files[i % len(files)] for i, name in enumerate(sorted(stored))}
    for file in files:
        save_file({name: tensor for name, tensor in stored.items() if weight_map[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | more}))


def test_an_index_of_one_file_as_mlx_writes_it_opens(folder: Any) -> None:
    path, weights = folder(LLAMA31)
    indexed(path, [SINGLE], {})
    opens(path, LLAMA31, weights)


def test_an_index_that_still_names_a_tied_head_or_a_buffer_opens(folder: Any) -> None:
    path, weights = folder(LLAMA32)
    more = {"lm_head.weight": SECOND, "model.layers.0.self_attn.rotary_emb.inv_freq": SECOND}
    indexed(path, ["model-00001-of-00002.safetensors", SECOND], more)
    opens(path, LLAMA32, weights)


def test_an_index_that_names_a_head_of_its_own_misses_it(folder: Any) -> None:
    path, _ = folder(LLAMA31)
    stored = load_file(path / SINGLE)
    save_file({name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}, path / SINGLE)
    indexed(path, [SECOND], {"lm_head.weight": SECOND})
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "names",
    [
        ["FSDPLlamaForCausalLM"],
        ["LlamaModel"],
        [],
        ["LlamaForCausalLM", "LlamaModel"],
        ["AutoModelForCausalLMWithValueHead"],
    ],
)
def test_the_name_of_the_class_that_saved_a_llama_does_not_matter(folder: Any, names: list[str]) -> None:
    path, weights = folder(LLAMA31)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": names}))
    opens(path, LLAMA31, weights)


@pytest.mark.parametrize("names", [["LlamaForTokenClassification"], "LlamaForCausalLM", [["LlamaModel"]], {"a": 1}])
def test_a_llama_with_another_head_or_names_that_are_no_list_is_refused(folder: Any, names: Any) -> None:
    path, _ = folder(LLAMA31)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": names}))
    with pytest.raises(CheckpointError, match="architectures"):
        open_checkpoint(path)
    with pytest.raises(Unusable, match="architectures"):
        open_folder(path)


def test_a_window_that_is_switched_off_and_what_generation_keeps_change_nothing(folder: Any) -> None:
    """As in Llamas that were made of Qwen 2; transformers' Llama reads none of these."""
    path, weights = folder(LLAMA31)
    config = json.loads((path / "config.json").read_text())
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21, "num_logits_to_keep": 1}
    (path / "config.json").write_text(json.dumps(config | off))
    opens(path, LLAMA31, weights)
    (path / "config.json").write_text(json.dumps(config | off | {"use_sliding_window": True}))
    with pytest.raises(CheckpointError, match="window"):
        open_checkpoint(path)
    with pytest.raises(Unusable, match="window"):
        open_folder(path)


def test_cached_angles_and_trls_value_head_are_left_out(folder: Any) -> None:
    path, weights = folder(LLAMA31)
    more = {
        f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(1, 1, 8, 16) for name in ("cos_cached", "sin_cached")
    }
    more |= {"v_head.summary.weight": torch.ones(1, LLAMA31.dim), "v_head.summary.bias": torch.ones(1)}
    save_file(load_file(path / SINGLE) | more, path / SINGLE)
    assert any("value head" in notice for notice in opens(path, LLAMA31, weights))
