"""Adapters of strangers: what would make another model without a word is refused by its name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollama.checkpoint import CheckpointError
from nanollama.checkpoint.adapter import Adapter, read_adapter, target_names, write_adapter
from nanollama.checkpoint.names import weight_shapes
from tiny import config

CONFIG = config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of rank 2 of every wq and wv."""
    shapes = weight_shapes(CONFIG)
    names = target_names(CONFIG, ("wq", "wv"))
    pairs = {name: (torch.ones(2, shapes[name][1]), torch.ones(shapes[name][0], 2)) for name in names}
    write_adapter(tmp_path, Adapter(pairs, dict.fromkeys(names, 4.0)), CONFIG, base="BASE")
    return tmp_path


def settings(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def text(old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        said = path.read_text()
        assert old in said
        path.write_text(said.replace(old, new))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return edit


def a_pipe(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "alpha infinite": (text('"lora_alpha": 4.0', '"lora_alpha": Infinity'), "Infinity is not a JSON number"),
    "alpha beyond a number": (text('"lora_alpha": 4.0', '"lora_alpha": 1e999'), "beyond 64 bits"),
    "alpha NaN": (text('"lora_alpha": 4.0', '"lora_alpha": NaN'), "NaN is not a JSON number"),
    "alpha a text": (settings(lora_alpha="4"), "lora_alpha is '4'"),
    "alpha negative": (settings(lora_alpha=-4), "lora_alpha is -4"),
    "alpha of a module infinite": (settings(alpha_pattern={"q_proj": 1e300}), "alpha_pattern.q_proj is 1e+300"),
    "rank of 2^62": (settings(r=2**62), "r is 4611686018427387904"),
    "rank another": (settings(r=3), "has shape"),
    "lora_bias": (settings(lora_bias=True), "lora_bias is True"),
    "bias all": (settings(bias="all"), "bias is 'all'"),
    "layer_replication": (settings(layer_replication=[[0, 2], [1, 2]]), "layer_replication is"),
    "DoRA without its lengths": (settings(use_dora=True), "lora_magnitude_vector is missing"),
    "an unknown setting of a megabyte": (settings(ghost="z" * 1_000_000), "ghost is|more than"),
    "another kind": (settings(peft_type="IA3"), "peft_type is 'IA3'"),
    "an initialisation that changes the base": (settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "targets of a broken expression": (settings(target_modules="("), "no regular expression"),
    "targets that backtrack": (settings(target_modules=r"(\w|\w|.)*[^\w.]"), "takes more than"),
    "ranks that backtrack": (settings(rank_pattern={r"(\w|\w|.)*[^\w.]": 2}), "takes more than"),
    "layers that backtrack": (
        settings(layers_pattern=[r"(\w|\w|.)*[^\w.]"], layers_to_transform=[0]),
        "takes more than",
    ),
    "an expression of a megabyte": (settings(target_modules="(a|" * 200_000), "no regular expression|more than"),
    "an expression nested deep": (settings(target_modules="(" * 2000 + ")" * 2000), "no regular expression"),
    "settings a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds a JSON list"),
    "settings 10^5 deep": (lambda f: (f / "adapter_config.json").write_text('{"a":' * 100_000), "nested more than"),
    "settings a pipe": (a_pipe, "is a pipe|holds no adapter_config.json"),
    "a tensor of integers": (tensors(lambda t: t.update({FIRST: t[FIRST].int()})), "no tensor of floating-point"),
    "a tensor of a broadcastable shape": (tensors(lambda t: t.update({FIRST: t[FIRST][:1].clone()})), "has shape"),
    "a tensor too many": (tensors(lambda t: t.update({"x.lora_bias": torch.ones(2)})), "x.lora_bias"),
    "a tensor that is no number": (tensors(lambda t: t[FIRST].fill_(torch.nan)), "no finite numbers"),
    "a tensor missing": (tensors(lambda t: t.pop(FIRST)), "is missing"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_adapter_is_refused_by_name(kind: str, folder: Path) -> None:
    edit, part = KINDS[kind]
    edit(folder)
    with pytest.raises(CheckpointError, match=part.replace("(", r"\(").replace("+", r"\+")) as refused:
        read_adapter(folder, CONFIG)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 900


def test_the_adapter_itself_is_read(folder: Path) -> None:
    assert set(read_adapter(folder, CONFIG).alphas.values()) == {4.0}
