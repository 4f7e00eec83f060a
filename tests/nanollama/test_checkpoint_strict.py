"""What does not fit is refused: one line, the file and the weight or key by name, before any model is built."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import LLAMA2, LLAMA31, LLAMA32, make_weights, write
from nanollama.checkpoint import (
    CheckpointError,
    open_checkpoint,
)
from nanollama.checkpoint.meta import read_params
from nanollama.model import RopeScaling


def refused(path: Path, *parts: str) -> None:
    """Opening fails with one short line that holds all the parts."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 600
    for part in parts:
        assert part in message


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... deletes."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def resave(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the state dict of a .pth or .safetensors file."""
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    else:
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})


NORM, HF_NORM = "layers.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop(NORM), [NORM, "is missing", "download"]),
        (lambda s: s.update({"layers.1.bias": torch.ones(2)}), ["layers.1.bias", "is unknown"]),
        (lambda s: s.update({NORM: torch.ones(63)}), [NORM, "(63,)", "(64,)", "params.json"]),
        (lambda s: s.update({NORM: torch.ones(64, dtype=torch.int8)}), [NORM, "int8"]),
        (lambda s: s.update({NORM: 3}), [NORM, "int"]),
        (lambda s: s.update({"layers.0.attention.wq.weight": torch.ones(64, 64).t()[:, :]}), ["wq", "contiguous"]),
        (lambda s: s.update({NORM: s["norm.weight"]}), [NORM, "same bytes"]),
    ],
)
def test_meta_weights(meta: Path, change: Callable[[dict[str, Any]], Any], parts: list[str]) -> None:
    resave(meta / "consolidated.00.pth", change)
    refused(meta, *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop(HF_NORM), [HF_NORM, "is missing"]),
        (lambda s: s.pop("lm_head.weight"), ["lm_head.weight", "is missing"]),
        (lambda s: s.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(2)}), ["q_proj.bias", "is a bias"]),
        (lambda s: s.update({HF_NORM: torch.ones(63)}), [HF_NORM, "(63,)", "(64,)", "config.json"]),
        (lambda s: s.update({HF_NORM: torch.ones(64, dtype=torch.float64)}), [HF_NORM, "F64"]),
        (lambda s: s.update({HF_NORM: torch.tensor(1.0)}), [HF_NORM, "scalar"]),
    ],
)
def test_hf_weights(hf: Path, change: Callable[[dict[str, Any]], Any], parts: list[str]) -> None:
    resave(hf / "model.safetensors", change)
    refused(hf, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dim": ...}, ["params.json", "dim", "missing"]),
        ({"dim": "64"}, ["dim", "'64'", "integer"]),
        ({"dim": True}, ["dim", "True"]),
        ({"dim": 10**400}, ["params.json", "dim"]),
        ({"n_heads": 0}, ["n_heads", "0"]),
        ({"n_heads": 7}, ["dim", "multiple of n_heads"]),
        ({"n_kv_heads": 3}, ["n_heads 8", "n_kv_heads 3"]),
        ({"n_layers": 3}, ["layers.2", "missing"]),
        ({"n_layers": 2_000_000_000}, ["2000000000 layers", "2"]),
        ({"vocab_size": 97}, ["tok_embeddings.weight", "(96, 64)", "(97, 64)"]),
        ({"multiple_of": 7}, ["w1.weight", "asks for"]),
        ({"norm_eps": "x"}, ["norm_eps"]),
        ({"rope_theta": -1}, ["rope_theta", "-1"]),
        ({"use_scaled_rope": 1}, ["use_scaled_rope", "true or false"]),
        ({"use_scaled_rope": False, "rope_scaling_factor": 8}, ["rope_scaling_factor", "remove one"]),
        ({"rope_high_freq_factor": 0.5}, ["rope_high_freq_factor"]),
        ({"moe_args": {"n_experts": 8}}, ["moe_args", "does not know"]),
        ({"quantization_args": {"scheme": "int4"}}, ["quantization_args"]),
        ({"vision_chunk_size": 448}, ["vision_chunk_size", "text models"]),
        ({"kv_head_repeats": 3}, ["kv_head_repeats"]),
    ],
)
def test_params_json(meta: Path, changes: dict[str, Any], parts: list[str]) -> None:
    edit(meta / "params.json", **changes)
    refused(meta, *parts)


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": ...}, ["config.json", "hidden_size", "missing"]),
        ({"rms_norm_eps": ...}, ["rms_norm_eps", "missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type", "'linear'", "llama3"]),
        ({"rope_scaling": {**SCALING, "factor": None}}, ["rope_scaling.factor", "missing"]),
        ({"rope_scaling": {**SCALING, "beta": 1}}, ["rope_scaling.beta"]),
        ({"rope_scaling": {**SCALING, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_scaling": 8}, ["rope_scaling", "object"]),
        ({"rope_parameters": {**SCALING, "rope_theta": 1.0}}, ["rope_parameters", "disagrees"]),
        ({"rope_parameters": {"rope_type": "default"}}, ["rope_parameters", "disagrees"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"model_type": "mistral"}, ["model_type", "'mistral'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "differs"]),
        ({"head_dim": 7}, ["head_dim 7", "odd"]),
        ({"head_dim": 16}, ["q_proj.weight", "(128, 64)"]),
        ({"torch_dtype": ..., "num_key_value_heads": 8}, ["k_proj.weight"]),
    ],
)
def test_config_json(hf: Path, changes: dict[str, Any], parts: list[str]) -> None:
    edit(hf / "config.json", **changes)
    refused(hf, *parts)


def test_config_json_in_the_form_of_transformers_5(hf: Path) -> None:
    edit(hf / "config.json", rope_scaling=..., rope_theta=..., rope_parameters={**SCALING, "rope_theta": 500_000.0})
    assert open_checkpoint(hf).config == LLAMA31


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"dim": 1, "dim": 2}', '{"dim": NaN}', "\udcff", "[" * 100_000, "1" * 9999]
)
def test_json_that_is_none(meta: Path, text: str) -> None:
    (meta / "params.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(meta, "params.json")


def test_pickled_code_is_not_run(meta: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"norm.weight": Payload()}, meta / "consolidated.00.pth")
    refused(meta, "consolidated.00.pth", "not a plain state dict")
    assert not (tmp_path / "executed").exists()


def test_meta_shards_that_disagree(tmp_path: Path) -> None:
    path = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31), shards=2)
    other = path / "consolidated.01.pth"
    good = other.read_bytes()
    resave(other, lambda s: s.update({"norm.weight": s["norm.weight"] + 1}))
    refused(path, "consolidated.01.pth", "norm.weight", "equal in all shards")
    other.write_bytes(good)
    resave(other, lambda s: s.pop(NORM))
    refused(path, "consolidated.01.pth", NORM)
    other.unlink()
    refused(path, "asks for")
    other.write_bytes(good)
    (path / "consolidated.00.pth").unlink()
    refused(path, "consolidated.00.pth", "missing")


def test_repeated_kv_heads_that_differ(tmp_path: Path) -> None:
    path = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31), shards=4)
    resave(path / "consolidated.01.pth", lambda s: s["layers.0.attention.wk.weight"].zero_())
    refused(path, "layers.0.attention.wk.weight", "copies of a kv head differ")


def test_published_quirks_load(tmp_path: Path) -> None:
    """Llama 2: vocab_size -1, no rope_theta, rope.freqs in the file. 405B on 16 shards: kv heads repeated."""
    config = replace(LLAMA2, max_seq_len=4096)
    path = write(tmp_path, "meta", config, make_weights(config), shards=2, embedding_split="columns")
    edit(path / "params.json", vocab_size=-1, rope_theta=..., use_scaled_rope=..., n_kv_heads=...)
    for shard in path.glob("*.pth"):
        resave(shard, lambda s: s.update({"rope.freqs": torch.ones(6)}))
    assert open_checkpoint(path).config == config
    path = write(tmp_path / "405B", "meta", LLAMA31, make_weights(LLAMA31), shards=8)
    assert json.loads((path / "params.json").read_text())["n_kv_heads"] == 8  # as Meta's code needs it
    edit(path / "params.json", n_kv_heads=2, kv_head_repeats=...)
    assert open_checkpoint(path).config == LLAMA31
    edit(path / "params.json", n_kv_heads=8)
    assert open_checkpoint(path).config == replace(LLAMA31, n_kv_heads=8)


@pytest.mark.parametrize(("extra", "factor", "told"), [({}, 32.0, 1), ({"rope_scaling_factor": 8}, 8.0, 0)])
def test_scaling_factor_of_llama_3_2(tmp_path: Path, extra: dict[str, Any], factor: float, told: int) -> None:
    shape = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 8, "multiple_of": 256}
    notices: list[str] = []
    config = read_params(tmp_path, {**shape, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True, **extra}, 0, notices)
    assert config.rope_scaling == RopeScaling(factor=factor)
    assert config.hidden_dim == 8192
    assert len(notices) == told


def test_tied_heads(tmp_path: Path) -> None:
    """Meta files hold both matrices, Hugging Face's one; a file that holds two equal ones is tied too."""
    weights = make_weights(LLAMA32)
    path = write(tmp_path, "meta", LLAMA32, weights)
    assert "output.weight" in torch.load(path / "consolidated.00.pth", weights_only=True)
    resave(path / "consolidated.00.pth", lambda s: s.update({"output.weight": s["output.weight"].clone()}))
    assert open_checkpoint(path).config == LLAMA32
    path = write(tmp_path, "hf", LLAMA32, weights)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    resave(path / "model.safetensors", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert open_checkpoint(path).config == LLAMA32


def test_index_files(tmp_path: Path) -> None:
    path = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31), max_shard_bytes=30_000)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = weight_map["model.norm.weight"]
    edit(index, weight_map={**weight_map, "model.norm.weight": "../other.safetensors"})
    refused(path, "'../other.safetensors'", "outside of the folder")
    edit(index, weight_map={name: file for name, file in weight_map.items() if name != "model.norm.weight"})
    refused(path, first, "model.norm.weight")
    edit(index, weight_map=[1])
    refused(path, "weight_map")
    edit(index, weight_map=weight_map)
    (path / first).unlink()
    refused(path, first, "is missing")


def test_folders_that_are_two_formats_or_none(tmp_path: Path, meta: Path, hf: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(meta, both)
    shutil.copytree(hf, both, dirs_exist_ok=True)
    refused(both, "params.json", "config.json", "separate them")
    shutil.copytree(meta, hf / "original")
    assert open_checkpoint(hf).format == "hf"
    assert open_checkpoint(hf / "original").format == "meta"
    (tmp_path / "hub" / "original").mkdir(parents=True)
    refused(tmp_path / "hub", "no checkpoint")
    (meta / "params.json").unlink()
    refused(meta, "params.json", "is missing")
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "no known format")


def test_hub_ids_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refused(Path("no-such-org/no-such-model"), "no-such-org/no-such-model", "cannot be reached")
    with pytest.raises(CheckpointError, match=r"^no-such-org/no-such-model: .* cannot be reached"):
        open_checkpoint("https://huggingface.co/no-such-org/no-such-model")
