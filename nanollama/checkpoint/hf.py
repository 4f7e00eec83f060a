"""Hugging Face's format: config.json with model.safetensors, or shards and model.safetensors.index.json.

The rows of q_proj and k_proj are put back into Meta's order as they are read.

    python -m nanollama inspect Llama-3.1-8B-hf

Sources: `transformers` LlamaConfig and modeling_llama (keys and defaults, 4.x `rope_scaling`, 5.x `rope_parameters`).
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama import gate
from nanollama.checkpoint.fields import REQUIRED, Fields, read_json
from nanollama.checkpoint.names import EMBEDDING, HEAD, hf_name, is_rotary, meta_from_hf, to_hf_rows, to_meta_rows
from nanollama.checkpoint.spellings import QUANTIZED, plain, stored_as, unknown
from nanollama.checkpoint.staging import refuse_occupied, staged
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import (
    STORED_DTYPES,
    Checkpoint,
    CheckpointError,
    Lazy,
    make_config,
    opened,
    same_numbers,
    to_write,
)
from nanollama.model import ModelConfig, RopeScaling
from nanollama.vocabulary import read
from nanollama.vocabulary.write import fitting, hf_files, token_ids

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Ours -> config.json's, of the sizes that every file states.
SIZES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
SIZES |= {"vocab_size": "vocab_size", "hidden_dim": "intermediate_size"}
FACTORS, CONTEXT = ("factor", "low_freq_factor", "high_freq_factor"), "original_max_position_embeddings"  # of scaling
# Describe the training, the files or the generation defaults, not the forward pass.
HARMLESS = frozenset(
    ("attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id")
    + ("name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "return_dict")
    + ("tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache")
)
# What transformers' LlamaConfig and modeling_llama read: the values that are computed here, and what they mean.
COMPUTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("llama",), "only Llama models are computed"),
    "architectures": ((["LlamaForCausalLM"], ["LLaMAForCausalLM"], None), "only LlamaForCausalLM is computed"),
    "hidden_act": (("silu", "swish", None), "silu is the only activation that is computed"),
    "attention_bias": ((False, None), "linear layers have no bias here"),
    "mlp_bias": ((False, None), "linear layers have no bias here"),
    "partial_rotary_factor": ((1.0, 1, None), "whole heads are rotated here"),
}
# Of keys that no Llama reads, those whose names speak of the computation are refused: the model may be another one.
SUSPECT = re.compile(
    r"scal|multipl|factor|window|soft_?cap|norm(?!al)|bias|expert|moe|rope|rotary|(^|_)act(_|$|iv)|attn|attention|logit"
    r"|qkv|clip|mup|quant|per_layer|original_max_position|router|sparse|mamba|ssm|pruned"
)
TECHNICAL = re.compile(r"^_|dropout|pdrop|implementation|flash|experimental")


def open_hf(folder: Path) -> Checkpoint:
    """Read a Hugging Face folder. Raises CheckpointError unless config.json and the tensors fit each other exactly."""
    notices: list[str] = []
    config = read_config(folder / "config.json", notices)
    stored = {}
    for name, entry in _by_plain_name(folder, _stored_tensors(folder), notices).items():
        meta = meta_from_hf(name)
        if meta is None and not name.endswith(".rotary_emb.inv_freq"):  # old exports keep that buffer
            raise CheckpointError(folder, unknown(name))
        if meta is not None:
            stored[meta] = _reordered(entry, config.head_dim, to_meta_rows) if is_rotary(meta) else entry
    if config.tied and HEAD in stored:
        stored.setdefault(EMBEDDING, stored[HEAD])  # of two names for one matrix, safetensors may have kept the other
        _refuse_untied_head(folder, stored)
    if not config.tied and HEAD not in stored and EMBEDDING in stored:
        what = "lm_head.weight is missing: if the embedding is the head too, say so in config.json"
        raise CheckpointError(folder, f'{what} ("tie_word_embeddings": true); else download the weights again')
    return opened("hf", folder, config, stored, "config.json", notices, hf_name)


def _by_plain_name(folder: Path, stored: dict[str, Lazy], notices: list[str]) -> dict[str, Lazy]:
    """The tensors by transformers' names, which other programs put wrappers around. Raises CheckpointError."""
    found: dict[str, Lazy] = {}
    for name, entry in stored.items():
        if plain(name) in found:
            raise CheckpointError(folder, f"weight {plain(name)} is there twice, also as {name}: save the model again")
        found[plain(name)] = entry
    if renamed := sorted(stored.keys() - found.keys()):
        notices.append(f"weights have names such as {renamed[0]}, read as {plain(renamed[0])}")
    return found


def read_config(path: Path, notices: list[str]) -> ModelConfig:
    """config.json -> config; refuses by name what is not computed here, and notes the keys that nothing reads."""
    fields = Fields(path, read_json(path))
    _refuse_other_models(fields)
    rope_theta, scaling = _read_rope(fields)
    sizes = {name: fields.integer(key) for name, key in SIZES.items()}
    config = sizes | {
        "n_kv_heads": fields.integer("num_key_value_heads", sizes["n_heads"]),
        "norm_eps": fields.number("rms_norm_eps"),
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "tied": fields.flag("tie_word_embeddings"),
        "head_dim": fields.integer("head_dim", 0),
        "max_seq_len": fields.integer("max_position_embeddings", 2048),
    }
    if unread := _unread(fields, scaling):
        notices.append(f"{path.name}: no Llama reads {', '.join(unread[:8])}{' and more' * (len(unread) > 8)}")
    return make_config(path, **config)


def _refuse_other_models(fields: Fields) -> None:
    for key, (allowed, why) in COMPUTED.items():
        value = fields.take(key, None)
        if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            raise fields.error(key, f"is {gate.shown(value)}: {why}")
    if quantized := fields.take("quantization_config", None):
        found = quantized if isinstance(quantized, dict) else {}
        named = {"quant_method": "an unnamed method", **found}
        method = ", ".join(str(named[key])[:40] for key in ("quant_method", "bits", "weight_dtype") if key in named)
        raise fields.error("quantization_config", f"says {method}: {QUANTIZED}")
    if fields.take("quantization", None):  # of mlx
        raise fields.error("quantization", f"is there: {QUANTIZED}")
    code = fields.take("auto_map", None)
    if code and not (isinstance(code, dict) and all("AutoModel" not in name for name in code)):
        raise fields.error(
            "auto_map", f"is {gate.shown(code)}: the folder brings code of its own for its model, which is not run"
        )
    layers = fields.take("layer_types", None)
    if layers and not (isinstance(layers, list) and all(kind == "full_attention" for kind in layers)):
        raise fields.error("layer_types", "is not full_attention throughout: only that is computed")


def _unread(fields: Fields, scaling: RopeScaling | None) -> list[str]:
    """The keys that are left. Raises CheckpointError for one that may change the computation, unless it is off."""
    found = []
    for key, value in fields.left():
        known = key in HARMLESS or key.startswith("_")
        if key == CONTEXT:  # transformers prefers it to the scaling's own
            off = scaling is None or value == scaling.original_context
        else:
            off = not value if not isinstance(value, (int, float)) else _is_neutral(key, value)
        if not known and not off and SUSPECT.search(key) and not TECHNICAL.search(key):
            raise fields.error(
                key, f"is {gate.shown(value)}, which this implementation does not know: it may change the model"
            )
        if not known and not off:
            found.append(repr(key[:60]))
    return found


def _is_neutral(key: str, value: float) -> bool:
    """False, a factor of 1, or else a 0."""
    return value is False or (type(value) is not bool and value == bool(re.search("scal|multipl|factor", key)))


def _read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from transformers 4's keys or 5's; both may be there if they agree."""
    top_theta = fields.number("rope_theta", None)
    said = (fields.raw(key) for key in (CONTEXT, "max_position_embeddings"))  # where the scaling does not say it
    context = next((value for value in said if type(value) is int and value > 0), REQUIRED)
    parts = [fields.section(key) for key in ("rope_parameters", "rope_scaling")]
    found = [_read_rope_section(part, context) for part in parts if part]
    thetas = {theta for theta, _ in [(top_theta, None), *found] if theta is not None}
    if len(thetas) > 1 or (len(found) == 2 and found[0][1] != found[1][1]):
        raise fields.error("rope_parameters", "disagrees with rope_theta or rope_scaling in the same file: remove one")
    return thetas.pop() if thetas else 10_000.0, found[0][1] if found else None


def _read_rope_section(part: Fields, context: Any) -> tuple[float | None, RopeScaling | None]:
    theta = part.number("rope_theta", None)
    kinds = [part.take(key, None) for key in ("rope_type", "type")]
    kind = next((kind for kind in kinds if kind is not None), "default")  # transformers prefers rope_type
    if kind == "linear" and part.raw("factor") == 1:
        kind = "default"
    if kind not in ("default", "llama3"):
        raise part.error("rope_type", f"is {gate.shown(kind)}: only default and llama3 can be computed")
    if not math.isclose(part.number("partial_rotary_factor", 1.0), 1.0):
        raise part.error("partial_rotary_factor", "is not 1: whole heads are rotated")
    if kind == "default":
        return theta, None  # which no other key changes
    scaling = RopeScaling(**{key: part.number(key) for key in FACTORS}, original_context=part.integer(CONTEXT, context))
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise part.error("high_freq_factor", "is not above low_freq_factor")
    part.finish()
    return theta, scaling


def _stored_tensors(folder: Path) -> dict[str, Lazy]:
    """Every tensor of the folder's safetensors files by its own name."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise CheckpointError(folder, f"holds both {SINGLE} and {INDEX}: remove the one that is not the model")
    others = sorted(
        path.name for path in folder.glob("*.safetensors") if not path.name.startswith((".", "adapter_model"))
    )
    if not index.exists() and not single.exists() and others:
        of_several = re.fullmatch(r"model-\d+-of-\d+\.safetensors", others[0])
        mend = "download it, too" if of_several else f"if {others[0]} is the whole model, name it {SINGLE}"
        raise gate.missing(index if of_several else single, f"is missing beside {others[0]}: {mend}")
    if not index.exists():
        return _open_safetensors(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(index, "has no weight_map of tensor names to file names: get the index of this model")
    stored: dict[str, Lazy] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(index, f"weight_map names {gate.shown(file)}, outside of the folder: refused")
        tensors = _open_safetensors(folder / file)
        promised = {name for name, where in weight_map.items() if where == file}
        for name in sorted(promised ^ tensors.keys()):
            what = "lacks" if name in promised else "holds, unknown to the index,"
            raise CheckpointError(folder / file, f"{what} tensor {name}; download the folder again")
        stored |= tensors
    return stored


def _open_safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors file, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise gate.missing(path, "is missing; download it again, or save the model as safetensors")
    try:
        opened = safe_open(path, framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        gate.refuse_strangers(path)
        raise CheckpointError(
            path, f"is truncated or not a safetensors file ({gate.reason(error)}); download it again"
        ) from None
    return {name: _entry(path, name, opened.get_tensor, *described[name]) for name in described}


def _entry(path: Path, name: str, get: Callable[[str], Tensor], shape: tuple[int, ...], dtype: str) -> Lazy:
    if dtype not in STORED_DTYPES:
        raise CheckpointError(path, f"tensor {name} {stored_as(dtype)}")
    if not shape:
        raise CheckpointError(path, f"tensor {name} is a scalar: no Llama has one")
    # get_tensor returns a view of the memory-mapped file, so slicing it reads only those rows.
    return Lazy(shape, STORED_DTYPES[dtype], lambda start, stop: get(name)[start:stop])


def _reordered(entry: Lazy, head_dim: int, reorder: Callable[[Tensor, int], Tensor]) -> Lazy:
    """wq or wk in another row order."""
    if entry.shape[0] % head_dim:
        return entry  # misshapen: refused by name later

    def read(start: int, stop: int) -> Tensor:
        # A range of whole heads maps onto itself, so only those heads are read.
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        return reorder(entry.read(first, last), head_dim)[start - first : stop - first]

    return Lazy(entry.shape, entry.dtype, read)


def _refuse_untied_head(folder: Path, stored: dict[str, Lazy]) -> None:
    """A tied model may store its head again; a different head contradicts the config."""
    head, embedding = stored.pop(HEAD), stored.get(EMBEDDING)
    alike = embedding and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not (embedding and alike and same_numbers(head, embedding)):
        what = "config.json says tie_word_embeddings but lm_head.weight differs from model.embed_tokens.weight"
        mend = "set it to false if the head was trained by itself, else remove the head"
        raise CheckpointError(folder, f"{what}: {mend}")


def write_hf(
    folder: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder that transformers opens, streaming; weights as `open_checkpoint` gives, or a dict.

    tokenizer: a file of any kind, written as tokenizer.json and tokenizer_config.json. Weights of more than
    max_shard_bytes are split into shards with an index. A tied model gets no lm_head.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # takes a while, and reading needs none of it

    folder = Path(folder)
    refuse_occupied(folder)
    entries = {}
    for name, entry in to_write(folder, config, weights, dtype).items():
        entries[hf_name(name)] = _reordered(entry, config.head_dim, to_hf_rows) if is_rotary(name) else entry
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=SINGLE.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    vocabulary = None if tokenizer is None else fitting(read(tokenizer), config.vocab_size)
    with staged(folder) as stage:
        for file_name, names in split.filename_to_tensors.items():
            with stage.open(file_name) as file:
                write_safetensors(file, {name: entries[name] for name in names})
        if split.is_sharded:
            stage.text(INDEX, _json({"metadata": split.metadata, "weight_map": split.tensor_to_filename}))
        for file_name, data in hf_files(vocabulary).items() if vocabulary else ():
            stage.bytes(file_name, data)
        ids = token_ids(vocabulary) if vocabulary else {}
        stage.text("config.json", _json(make_hf_config(config, entries[hf_name(EMBEDDING)].dtype) | ids))


def make_hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json with transformers 4's keys, which 5 reads too."""
    scaling = config.rope_scaling
    factors = {key: getattr(scaling, key) for key in FACTORS} if scaling else {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": scaling and {"rope_type": "llama3", **factors, CONTEXT: scaling.original_context},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{key: getattr(config, name) for name, key in SIZES.items()},
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
