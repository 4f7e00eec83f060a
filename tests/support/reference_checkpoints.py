"""Tiny seeded checkpoints in Meta's and Hugging Face's format, written with plain loops for the tests of `reference`.

The q/k rows are moved one by one here, so that the permutation under test is not checked against itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 176  # what Meta's formula gives for dim 64, multiple_of 16
    vocab_size: int = 301
    norm_eps: float = 2e-5
    rope_theta: float = 500000.0
    factor: float | None = 8.0  # of RoPE scaling; None: not scaled
    tied: bool = False
    head_dim: int = 16


def make_weights(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights by Meta names: peaked q and k, norm weights away from 1, a few small embedding rows."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=rng) * gain / columns**0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.3 * torch.randn(shape.dim, generator=rng)).to(dtype)

    q_rows, kv_rows = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    embedding = torch.randn(shape.vocab_size, shape.dim, generator=rng)
    embedding[::7] *= 0.01
    weights = {"tok_embeddings.weight": embedding.to(dtype)}
    for i in range(shape.n_layers):
        weights |= {
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.attention.wq.weight": matrix(q_rows, shape.dim, 2),
            f"layers.{i}.attention.wk.weight": matrix(kv_rows, shape.dim, 2),
            f"layers.{i}.attention.wv.weight": matrix(kv_rows, shape.dim),
            f"layers.{i}.attention.wo.weight": matrix(shape.dim, q_rows),
            f"layers.{i}.ffn_norm.weight": norm(),
            f"layers.{i}.feed_forward.w1.weight": matrix(shape.hidden_dim, shape.dim),
            f"layers.{i}.feed_forward.w2.weight": matrix(shape.dim, shape.hidden_dim),
            f"layers.{i}.feed_forward.w3.weight": matrix(shape.hidden_dim, shape.dim),
        }
    weights["norm.weight"] = norm()
    weights["output.weight"] = (
        weights["tok_embeddings.weight"] if shape.tied else matrix(shape.vocab_size, shape.dim, 4)
    )
    return weights


def params_json(shape: Shape, **changes: Any) -> dict[str, Any]:
    params: dict[str, Any] = {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "vocab_size": shape.vocab_size,
        "multiple_of": 16,
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "use_scaled_rope": shape.factor is not None,
    }
    if shape.factor not in (None, 8.0):
        params["rope_scaling_factor"] = shape.factor
    params |= changes
    return {key: value for key, value in params.items() if value is not ...}


def write_meta(
    folder: Path, shape: Shape, weights: dict[str, Tensor], *, shards: int = 1, llama2: bool = False, **changes: Any
) -> Path:
    """`llama2`: the embedding split along dim, rope.freqs in every shard, vocab_size -1 and no rope_theta."""
    folder.mkdir(parents=True)
    if llama2:
        changes = {"vocab_size": -1, "rope_theta": ..., "use_scaled_rope": ..., **changes}
    (folder / "params.json").write_text(json.dumps(params_json(shape, **changes)))
    for shard in range(shards):
        part = {name: _shard(name, weight, shard, shards, shape, llama2) for name, weight in weights.items()}
        if llama2:
            part["rope.freqs"] = torch.ones(shape.head_dim // 2)
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")
    return folder


def _shard(name: str, weight: Tensor, shard: int, shards: int, shape: Shape, llama2: bool) -> Tensor:
    if weight.dim() == 1:
        return weight
    if name.endswith((".wk.weight", ".wv.weight")) and shards > shape.n_kv_heads:
        head = shard * shape.n_kv_heads // shards
        return weight[head * shape.head_dim : (head + 1) * shape.head_dim].clone()
    split_inputs = name.endswith((".wo.weight", ".w2.weight")) or (llama2 and name == "tok_embeddings.weight")
    return torch.tensor_split(weight, shards, dim=1 if split_inputs else 0)[shard].clone()


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "norm": "model.norm",
}


def write_hf(
    folder: Path, shape: Shape, weights: dict[str, Tensor], *, files: int = 1, old_rope: bool = False, **changes: Any
) -> Path:
    """`old_rope`: rope_scaling and rope_theta as transformers 4 wrote them, else rope_parameters."""
    folder.mkdir(parents=True)
    tensors = {_hf_name(name): _hf_rows(name, weight, shape) for name, weight in weights.items()}
    if shape.tied:
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(_config_json(shape, old_rope) | changes))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    places = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file_name in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file_name}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _config_json(shape: Shape, old_rope: bool) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "default"}
    if shape.factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 8192
    rope = (
        {"rope_theta": shape.rope_theta, "rope_scaling": scaling if shape.factor else None}
        if old_rope
        else {"rope_parameters": scaling | {"rope_theta": shape.rope_theta}}
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        **rope,
    }


def _hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return HF_NAMES[stem] + ".weight"
    _, layer, rest = stem.split(".", 2)
    return f"model.layers.{layer}.{HF_NAMES[rest]}.weight"


def _hf_rows(name: str, weight: Tensor, shape: Shape) -> Tensor:
    """Meta keeps the rotary pair j of a head in rows 2j and 2j+1, Hugging Face in rows j and j + D/2."""
    if not name.endswith((".wq.weight", ".wk.weight")):
        return weight.clone()
    out, half = torch.empty_like(weight), shape.head_dim // 2
    for head in range(0, len(weight), shape.head_dim):
        for j in range(half):
            out[head + j] = weight[head + 2 * j]
            out[head + half + j] = weight[head + 2 * j + 1]
    return out
