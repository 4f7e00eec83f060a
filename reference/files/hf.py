"""Hugging Face folders: config.json and model.safetensors, or several files with an index.

Reads the scaling under `rope_scaling` (transformers 4) and under `rope_parameters` (transformers 5). Tied models have
no lm_head. Names are translated to Meta's; the rows of q_proj and k_proj stay in file order until they are read.

    from reference.files import open_folder
    open_folder("Llama-3.2-1B").config["tied"]    # True
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanollama import gate
from reference.files.checkpoint import (
    Checkpoint,
    Config,
    check_config,
    check_names,
    check_weights,
    flag,
    number,
    read_json,
)
from reference.files.weights import Source, Unusable, Weights, through_gate

LAYER_NAMES = {  # Hugging Face name inside a layer -> Meta name
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
STARTS = ("embed_tokens", "layers", "norm", "rotary_emb", "lm_head")

USED = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
}
USED |= {"vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"}
# Bookkeeping that every release carries.
SILENT = {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "torch_dtype", "dtype", "use_cache"}
SILENT |= {"transformers_version", "initializer_range", "max_position_embeddings", "attention_dropout", "name_or_path"}
SILENT |= {"pretraining_tp", "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states"}
SILENT |= {"tokenizer_class"}
# What changes the forward pass of transformers' Llama, with the values at which it is the dense text Llama.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"]),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "is_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "use_sliding_window": (False,),
}
SPECIAL = ("layer_types", "per_layer_config", "auto_map", "original_max_position_embeddings")
# In the names of other keys: words of the forward pass.
WORDS = {"act", "activation", "attention", "attn", "bias", "clip", "expert", "experts", "factor", "layernorm", "mamba"}
WORDS |= {"logit", "logits", "moe", "multiplier", "norm", "pruned", "qk", "qkv", "quantization", "residual", "rmsnorm"}
WORDS |= {"rope", "rotary", "router", "scale", "scaled", "scaling", "softcap", "softcapping", "sparse", "ssm", "window"}
HARMLESS_WORDS = {"dropout", "pdrop", "implementation", "flash"}


def open_hf(folder: Path) -> Checkpoint:
    config_path = folder / "config.json"
    raw = read_json(config_path)
    notices = _check_keys(raw, config_path)
    tensors = _open_tensors(folder)
    config = _config(raw, config_path)
    weights = Weights(_sources(tensors, config, folder), layout="hf", head_dim=config["head_dim"])
    check_weights(weights, config, folder)
    return Checkpoint(folder, "hf", config, weights, notices)


def hf_name(name: str) -> str:
    """Meta name -> Hugging Face name."""
    top = {meta: hf for hf, meta in TOP_NAMES.items()}
    if name in top:
        return top[name]
    _, layer, rest = name.split(".", 2)
    inner = {meta: hf for hf, meta in LAYER_NAMES.items()}[rest.removesuffix(".weight")]
    return f"model.layers.{layer}.{inner}.weight"


def meta_name(name: str) -> str | None:
    """Hugging Face name -> Meta name; None for buffers that old exports carry."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    if name.endswith(".rotary_emb.inv_freq"):
        return None
    pieces = name.removeprefix("model.layers.").split(".", 1)
    known = name.startswith("model.layers.") and len(pieces) == 2 and pieces[0].isdigit() and name.endswith(".weight")
    inner = LAYER_NAMES.get(pieces[1].removesuffix(".weight")) if known else None
    return f"layers.{int(pieces[0])}.{inner}.weight" if inner else name


def unwrapped(name: str) -> str:
    """A name without what torch.compile, FSDP, DDP, DeepSpeed and peft put into it, and with one `model.`."""
    parts = [part for part in name.split(".") if not (part.startswith("_") and part in WRAPPERS)]
    start = next((i for i, part in enumerate(parts) if part in STARTS), None)
    if start is None or set(parts[:start]) - {"module", "base_model", "model"}:
        return name
    return ".".join(parts[start:] if parts[start] == "lm_head" else ["model", *parts[start:]])


def _check_keys(raw: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Refuse what is computed otherwise than by the dense text Llama; a notice names what nothing reads."""
    unread = []
    for key, value in raw.items():
        if key in USED | SILENT or key.startswith("_") or value in (None, False, "", [], {}):
            continue
        shown = gate.shown(value)
        if key in FIXED:
            if value not in FIXED[key]:
                raise Unusable(f"{path}: {key} is {shown}; only {FIXED[key][0]!r} is a dense text Llama")
        elif key == "quantization_config":
            raise Unusable(f"{path}: quantization_config {shown} is not computed here; get the unquantised weights")
        elif not is_about_the_pass(key):
            unread.append(repr(key[:60]))
        elif not is_neutral(key, value, raw):
            raise Unusable(f"{path}: key {key[:60]!r} is {shown}, which may change the computation")
    return (f"{path.name}: no Llama reads {', '.join(unread[:8])}{' and more' * (len(unread) > 8)}",) if unread else ()


def is_about_the_pass(key: str) -> bool:
    """Whether a key that is not known here may be about the forward pass: by the words that its name is made of."""
    words = set(re.split(r"[_.]", key.lower()))
    return key in SPECIAL or bool(words & WORDS and not words & HARMLESS_WORDS)


def is_neutral(key: str, value: Any, raw: dict[str, Any]) -> bool:
    """Whether a key about the forward pass leaves the dense text Llama as it is."""
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if key == "auto_map":
        return isinstance(value, dict) and not any("AutoModel" in name for name in value)
    if key == "original_max_position_embeddings":  # transformers reads this one before the scaling's own
        scaled = [s for s in (raw.get("rope_scaling"), raw.get("rope_parameters")) if isinstance(s, dict)]
        return all(s.get(key, value) == value for s in scaled)
    is_factor = re.search("multiplier|scal|factor", key)
    return type(value) in (int, float) and value == (1 if is_factor else 0)


def _config(raw: dict[str, Any], path: Path) -> Config:
    dim, n_heads = number(raw, "hidden_size", path), number(raw, "num_attention_heads", path)
    rope = _rope(raw, path)
    config = {
        "dim": dim,
        "n_layers": number(raw, "num_hidden_layers", path),
        "n_heads": n_heads,
        "n_kv_heads": number(raw, "num_key_value_heads", path, default=n_heads),
        "head_dim": number(raw, "head_dim", path, default=max(1, dim // n_heads)),
        "hidden_dim": number(raw, "intermediate_size", path),
        "vocab_size": number(raw, "vocab_size", path),
        "norm_eps": number(raw, "rms_norm_eps", path, float),
        "rope_theta": number(rope, "rope_theta", path, float, default=number(raw, "rope_theta", path, float, 10000.0)),
        "rope_scaling": _rope_scaling(rope, raw, path),
        "tied": flag(raw, "tie_word_embeddings", path),
    }
    check_config(config, path)
    return config


def _rope(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise Unusable(f"{path}: {key} should be a JSON object or null, not {gate.shown(value)}")
    shared = old.keys() & new.keys()
    if any(old[key] != new[key] for key in shared):
        raise Unusable(f"{path}: rope_scaling and rope_parameters disagree; keep one of them")
    return {**old, **new}


def _rope_scaling(rope: dict[str, Any], raw: dict[str, Any], path: Path) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise Unusable(f"{path}: partial_rotary_factor is not 1; only whole heads are rotated here")
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return None  # no other key is read
    if kind != "llama3":
        raise Unusable(f"{path}: rope_type {gate.shown(kind)} is not computed here; only 'default' and 'llama3' are")
    context = "original_max_position_embeddings"
    known = {"factor", "low_freq_factor", "high_freq_factor", context, "rope_type", "type", "rope_theta"}
    if unknown := {key for key in rope.keys() - known - {"partial_rotary_factor"} if rope[key] is not None}:
        raise Unusable(f"{path}: unknown RoPE parameter {gate.shown(min(unknown))}, which may change the computation")
    outside = raw.get(context) or raw.get("max_position_embeddings")
    return {
        "factor": number(rope, "factor", path, float),
        "low_freq_factor": number(rope, "low_freq_factor", path, float),
        "high_freq_factor": number(rope, "high_freq_factor", path, float),
        "original_context": number(rope, context, path, default=outside),
    }


def _open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by its own name: views of the mapped files."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        return _open_file(folder / "model.safetensors")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise Unusable(f"{index_path}: lacks a weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise Unusable(f"{index_path}: file name {gate.shown(file_name)} leads out of the folder")
        tensors |= _open_file(folder / file_name)
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise Unusable(f"{folder / file_name}: tensor {name} is missing, though the index names it")
    return tensors


def _open_file(path: Path) -> dict[str, Tensor]:
    through_gate(gate.require_file, path)
    if not path.is_file():
        raise Unusable(f"{path}: no such file; download the checkpoint again")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{path}: not a readable safetensors file ({gate.reason(error)}); download it again") from None


def _sources(tensors: dict[str, Tensor], config: Config, folder: Path) -> dict[str, Source]:
    named: dict[str | None, Tensor] = {}
    for name, tensor in tensors.items():
        if (meta := meta_name(unwrapped(name))) in named and meta is not None:
            raise Unusable(f"{folder}: tensor {unwrapped(name)} is there twice, also as {name}; save the model again")
        named[meta] = tensor
    if config["tied"] and "output.weight" in named:  # a file may keep one of the two names for the matrix
        named.setdefault("tok_embeddings.weight", named["output.weight"])
    sources = {name: Source((tensor,), label=name) for name, tensor in named.items() if name is not None}
    if config["tied"] and "output.weight" in sources:
        head, embedding = sources.pop("output.weight").parts[0], sources.get("tok_embeddings.weight")
        if embedding is None or not torch.equal(head, embedding.parts[0]):
            raise Unusable(f"{folder}: config.json ties the embeddings, but lm_head.weight differs from embed_tokens")
    check_names(set(sources), config, folder)
    return sources
