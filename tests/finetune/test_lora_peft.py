"""Adapters as peft writes them: settings that are read give peft's sum, every other one is refused by name.

What is expected is computed here from peft's formula, on Hugging Face's rows; tests/interop/test_peft.py asks peft.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from checkpoint_cases import LLAMA31, LLAMA32
from finetune.build import fresh_weights
from finetune.lora import adapter_of, wear_
from nanollama.checkpoint import CheckpointError
from nanollama.checkpoint.adapter import CONFIG, PICKLE, TENSORS, merged, read_adapter, write_adapter
from nanollama.checkpoint.names import hf_name, is_rotary, to_hf_rows, weight_shapes
from nanollama.model import ModelConfig, Transformer

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
FULL = "base_model.model."
Sizes = dict[str, tuple[int, float]]  # module -> rank and scale of its change


def hf_weights(config: ModelConfig) -> dict[str, Tensor]:
    weights = fresh_weights(config, torch.Generator().manual_seed(1))
    return {hf_name(n): to_hf_rows(w, config.head_dim) if is_rotary(n) else w for n, w in weights.items()}


def modules(config: ModelConfig, pattern: str) -> list[str]:
    names = [hf_name(n).removesuffix(".weight") for n, shape in weight_shapes(config).items() if len(shape) == 2]
    return [name for name in names if re.fullmatch(pattern, name)]


def pairs_of(config: ModelConfig, sizes: Sizes) -> dict[str, Tensor]:
    """Tensors of an adapter by peft's names, all away from zero."""
    weights, generator = hf_weights(config), torch.Generator().manual_seed(2)
    tensors = {}
    for module, (rank, _) in sizes.items():
        outputs, inputs = weights[f"{module}.weight"].shape
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensors[f"{module}.lora_{name}.weight"] = torch.empty(shape).uniform_(-0.3, 0.3, generator=generator)
    return tensors


def save(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **settings}))
    stored = {FULL + name: t.contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(stored, folder / TENSORS)
    return folder


def check_sum(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], sizes: Sizes) -> None:
    """Our merged weights are W + scale B A of peft, in Hugging Face's rows, and otherwise the base."""
    weights = fresh_weights(config, torch.Generator().manual_seed(1))
    found, before = merged(weights, read_adapter(folder, config)), hf_weights(config)
    for name in weights:
        module = hf_name(name).removesuffix(".weight")
        wanted = before[hf_name(name)]
        if module in sizes:
            a, b = (tensors[f"{module}.lora_{part}.weight"].float() for part in "AB")
            wanted = wanted + sizes[module][1] * (b @ a)
        mine = to_hf_rows(found[name], config.head_dim) if is_rotary(name) else found[name]
        assert torch.allclose(mine, wanted, atol=1e-6), name


Q_DOWN = r".*(q_proj|down_proj)"
VARIANTS: dict[str, tuple[dict[str, Any], str, int, float]] = {  # settings, modules, rank, scale
    "plain": ({}, Q_DOWN, 4, 2.0),
    "rslora": ({"use_rslora": True}, Q_DOWN, 4, 8 / math.sqrt(4)),
    "regex": ({"target_modules": r".*\.1\..*(v|o)_proj"}, r".*\.1\..*(v|o)_proj", 4, 2.0),
    "all-linear": ({"target_modules": "all-linear"}, r".*_proj", 4, 2.0),
    "full names": ({"target_modules": ["model.layers.0.mlp.up_proj"]}, r"model\.layers\.0\.mlp\.up_proj", 4, 2.0),
    "no targets": ({"target_modules": None}, r".*(q|v)_proj", 4, 2.0),
    "excluded": ({"exclude_modules": ["0.self_attn.q_proj"]}, r".*(1.*q_proj|down_proj)", 4, 2.0),
    "excluded regex": ({"exclude_modules": r".*\.1\..*"}, r".*0.*(q_proj|down_proj)", 4, 2.0),
    "some layers": ({"layers_to_transform": [1]}, r".*1.*(q_proj|down_proj)", 4, 2.0),
    "one layer": ({"layers_to_transform": 0, "layers_pattern": "layers"}, r".*0.*(q_proj|down_proj)", 4, 2.0),
    "gaussian": ({"init_lora_weights": "gaussian", "fan_in_fan_out": False, "loftq_config": {}}, Q_DOWN, 4, 2.0),
    "notes of training programs": (
        {"unsloth_fixed": True, "loraplus_lr_ratio": 16.0, "init_lora_weights": "orthogonal"},
        Q_DOWN,
        4,
        2.0,
    ),
    "rank above a dimension": ({"r": 200}, Q_DOWN, 200, 0.04),
}


@pytest.mark.parametrize("config", [LLAMA31, LLAMA32], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_lora_of_peft_is_summed_as_peft_sums_it(tmp_path: Path, variant: str, config: ModelConfig) -> None:
    settings, pattern, rank, scale = VARIANTS[variant]
    sizes = dict.fromkeys(modules(config, pattern), (rank, scale))
    tensors = pairs_of(config, sizes)
    assert sizes
    check_sum(save(tmp_path / "a", tensors, **settings), config, tensors, sizes)


@pytest.mark.parametrize("stabilised", [False, True])
def test_each_module_has_its_own_rank_and_alpha(tmp_path: Path, stabilised: bool) -> None:
    patterns = {"rank_pattern": {"down_proj": 6, "^model.layers.0.self_attn.q_proj": 2}}
    patterns["alpha_pattern"] = {r"layers\.1\.self_attn\.q_proj": 3}
    said = {"model.layers.0.self_attn.q_proj": (2, 8), "model.layers.1.self_attn.q_proj": (4, 3)}
    said |= {f"model.layers.{i}.mlp.down_proj": (6, 8) for i in range(2)}
    sizes = {m: (rank, alpha / (math.sqrt(rank) if stabilised else rank)) for m, (rank, alpha) in said.items()}
    tensors = pairs_of(LLAMA31, sizes)
    folder = save(tmp_path / "a", tensors, use_rslora=stabilised, **patterns)
    check_sum(folder, LLAMA31, tensors, sizes)
    # Trained on and written again, it is the same adapter.
    model = Transformer.from_weights(LLAMA31, fresh_weights(LLAMA31, torch.Generator().manual_seed(1)))
    wear_(model, read_adapter(folder, LLAMA31), 0.0, torch.Generator())
    write_adapter(tmp_path / "again", adapter_of(model), LLAMA31, base="base")
    check_sum(tmp_path / "again", LLAMA31, tensors, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_of_other_dtypes_and_pickles_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = dict.fromkeys(modules(LLAMA31, Q_DOWN), (4, 2.0))
    tensors = {name: t.to(dtype) for name, t in pairs_of(LLAMA31, sizes).items()}
    folder = save(tmp_path / "a", tensors)
    check_sum(folder, LLAMA31, tensors, sizes)
    (folder / TENSORS).unlink()
    # A state dict saved by hand: the adapter's name and a compiled model's prefix are still in the keys.
    torch.save(
        {f"{FULL}_orig_mod.{n.replace('.weight', '.default.weight')}": t for n, t in tensors.items()}, folder / PICKLE
    )
    check_sum(folder, LLAMA31, tensors, sizes)


def test_whole_matrices_stand_in_place_of_the_base(tmp_path: Path) -> None:
    """modules_to_save of embedding and head, as training new words does."""
    sizes = dict.fromkeys(modules(LLAMA31, Q_DOWN), (4, 2.0))
    size = (LLAMA31.vocab_size, LLAMA31.dim)
    copies = {
        f"{name}.weight": torch.full(size, value) for name, value in (("model.embed_tokens", 0.5), ("lm_head", 0.25))
    }
    settings = {"modules_to_save": ["embed_tokens", "lm_head"]}
    weights = fresh_weights(LLAMA31, torch.Generator().manual_seed(1))
    adapter = read_adapter(save(tmp_path / "a", pairs_of(LLAMA31, sizes) | copies, **settings), LLAMA31)
    found = merged(weights, adapter)
    assert (found["tok_embeddings.weight"] == 0.5).all()
    assert (found.rows("output.weight", 3, 7) == 0.25).all()
    with pytest.raises(CheckpointError, match="lm_head alone, but its base ties them to one matrix"):
        read_adapter(save(tmp_path / "b", pairs_of(LLAMA32, sizes) | copies, **settings), LLAMA32)
    del copies["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        read_adapter(save(tmp_path / "c", pairs_of(LLAMA31, sizes) | copies, **settings), LLAMA31)
    model = Transformer.from_weights(LLAMA31, weights)
    with pytest.raises(ValueError, match="convert --adapter merges it into a base"):
        wear_(model, adapter, 0.0, torch.Generator())


def test_an_adapted_embedding_has_its_sides_swapped(tmp_path: Path) -> None:
    a, b = torch.rand(4, LLAMA31.vocab_size), torch.rand(LLAMA31.dim, 4)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    base = hf_weights(LLAMA31)["model.embed_tokens.weight"]
    tensors["model.embed_tokens.base_layer.weight"] = base + 1  # peft stores and restores the base beside it
    folder = save(tmp_path / "a", tensors, target_modules=["embed_tokens"])
    weights = fresh_weights(LLAMA31, torch.Generator().manual_seed(1))
    found = merged(weights, read_adapter(folder, LLAMA31))["tok_embeddings.weight"]
    assert torch.allclose(found, base + 1 + 2 * (b @ a).T, atol=1e-5)
    with pytest.raises(CheckpointError, match="its base ties them to one matrix"):
        read_adapter(folder, LLAMA32)


def test_rows_of_the_embedding_alone_are_read(tmp_path: Path) -> None:
    sizes = dict.fromkeys(modules(LLAMA31, Q_DOWN), (4, 2.0))
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.full((2, LLAMA31.dim), 3.0)}
    folder = save(tmp_path / "a", pairs_of(LLAMA31, sizes) | rows, trainable_token_indices=[9, 5])
    weights = fresh_weights(LLAMA31, torch.Generator().manual_seed(1))
    found = merged(weights, read_adapter(folder, LLAMA31))
    assert (found["tok_embeddings.weight"][[5, 9]] == 3).all()
    assert torch.equal(found["tok_embeddings.weight"][:5], weights["tok_embeddings.weight"][:5])
    assert torch.equal(found["output.weight"], weights["output.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        *(({"init_lora_weights": kind}, f"is '{kind}'") for kind in ("olora", "corda", "loftq", "eva", "lora_ga")),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"target_parameters": ["x"]}, "target_parameters is"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True"),
        ({"of_the_next_release": 0.5}, "of_the_next_release is 0.5"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"peft_type": None}, "peft_type is 'missing'"),
        ({"r": 2**40}, "r is 1099511627776"),
        ({"r": -1}, "r is -1"),
        ({"lora_alpha": 1e999}, "not a JSON number"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj is missing"),
        ({"alpha_pattern": {"(": 4}}, r"'\(' is no regular expression"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\]"),
        ({"target_modules": "*q"}, "is no regular expression"),
        ({"target_modules": {"q_proj": 1}}, "expected names of modules"),
        ({"target_modules": ["c_attn"]}, "target_modules names no matrix"),
        ({"target_modules": ["q_proj"]}, "tensor model.layers.0.mlp.down_proj.lora_A.weight is nothing that"),
        ({"target_modules": ["q_proj", "k_proj", "down_proj"]}, "k_proj.lora_A.weight is missing"),
        ({"layers_to_transform": ["1"]}, "expected whole numbers"),
        ({"trainable_token_indices": [True]}, "expected whole numbers"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    tensors = pairs_of(LLAMA31, dict.fromkeys(modules(LLAMA31, Q_DOWN), (4, 2.0)))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(save(tmp_path / "a", tensors, **settings), LLAMA31)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_more_tokens_says_how_to_enlarge_the_base(tmp_path: Path) -> None:
    tensors = pairs_of(LLAMA31, dict.fromkeys(modules(LLAMA31, Q_DOWN), (4, 2.0)))
    tensors["model.embed_tokens.weight"] = torch.zeros(LLAMA31.vocab_size + 2, LLAMA31.dim)
    folder = save(tmp_path / "a", tensors, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=rf"its {LLAMA31.vocab_size + 2} rows first .*resize_token_embeddings"):
        read_adapter(folder, LLAMA31)


def test_an_adapter_of_mlx_says_how_to_fuse_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {}, fine_tune_type="lora", lora_parameters={"rank": 8, "scale": 20.0})
    with pytest.raises(CheckpointError, match=r"mlx_lm\.fuse"):
        read_adapter(folder, LLAMA31)
