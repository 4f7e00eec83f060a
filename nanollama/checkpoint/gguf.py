"""GGUF, llama.cpp's format: typed keys, vocabulary and tensors in one file or several; quantized ones read as fp32.

Writing, and reading quantized types, goes through the `gguf` package (extra `gguf`). The rows of wq and wk are
Meta's. Llama 3.1's RoPE scaling is the tensor rope_freqs.weight, without which long contexts come out wrong
(llama.cpp#8676); the numbers behind it are kept in keys of our own, which llama.cpp ignores.

    python -m nanollama inspect model.gguf

Sources: ggml's docs/gguf.md, llama.cpp's convert_hf_to_gguf.py (LlamaModel) and llama-model.cpp for keys and names.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama import gguf_header
from nanollama.checkpoint import gguf_types
from nanollama.checkpoint.fields import Fields
from nanollama.checkpoint.gguf_types import DTYPES, F16, F32, GgmlType
from nanollama.checkpoint.names import EMBEDDING, HEAD, gguf_name, meta_from_gguf
from nanollama.checkpoint.staging import staged
from nanollama.checkpoint.weights import (
    Checkpoint,
    CheckpointError,
    Lazy,
    Weights,
    as_weights,
    cast,
    check_weights,
    lazy,
    make_config,
    row_blocks,
)
from nanollama.model import ModelConfig, RopeScaling, rope_frequencies
from nanollama.vocabulary import read
from nanollama.vocabulary.write import gguf_keys

# Ours -> the keys llama.*; the last two may be left out. A head's size is said three times.
SIZES = {"n_heads": "attention.head_count", "dim": "embedding_length", "n_layers": "block_count"}
SIZES |= {"hidden_dim": "feed_forward_length", "max_seq_len": "context_length"}
OPTIONAL_SIZES = {"n_kv_heads": "attention.head_count_kv", "vocab_size": "vocab_size"}
HEAD_DIMS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
ROPE_FREQS = "rope_freqs.weight"
# Beginnings of the keys llama.* that may change the computation, and the values besides 0 with which they do not.
# What nothing reads opens: tensor_data_layout, pooling_type, a vendor's note.
COMPUTES = re.compile(
    "attention\\.|attn_|rope\\.|expert|moe_|interleave_moe_|use_parallel_residual|swin_norm|swiglu_|hidden_act|activation|"
    "embedding_scale|residual_scale|logit_scale|final_logit_"
)
NEUTRAL = {"rope.scaling.attn_factor": 1.0, "logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0}


def open_gguf(path: Path) -> Checkpoint:
    """Read a .gguf of architecture llama; of a split model, any part.

    Raises CheckpointError unless its keys and tensors fit each other exactly.
    """
    parts = gguf_header.read_parts(path)
    keys = next(iter(parts.values())).keys
    _refuse_other_models(path, keys)
    types, stored = _stored_tensors(parts)
    factors, notices = stored.pop(ROPE_FREQS, None), list[str]()
    config = _read_config(path, keys, stored, factors, notices)
    entries = _one_dtype(check_weights(path, config, stored, "its header", gguf_name))
    if any(kind.dtype is None for kind in types):
        counted = ", ".join(f"{count} {kind.name}" for kind, count in types.most_common())
        notices.append(f"the weights are quantized (tensors: {counted}) and read as fp32")
    # The vocabulary is opened from the header, which the first part has.
    tokenizer = next(iter(parts)) if isinstance(keys.get("tokenizer.ggml.tokens"), list) else None
    return Checkpoint(config, Weights(entries), tokenizer, "gguf", path, notices)


def _stored_tensors(parts: dict[Path, gguf_header.Header]) -> tuple[Counter[GgmlType], dict[str, Lazy]]:
    """How many tensors of each type there are; Meta's name (or ROPE_FREQS) -> tensor, memory-mapped."""
    stored, types = {}, Counter[GgmlType]()
    for part, header in parts.items():
        data = torch.from_file(str(part), shared=False, size=part.stat().st_size, dtype=torch.uint8)
        for name, (kind, place) in gguf_types.placed(part, header).items():
            meta = name if name == ROPE_FREQS else meta_from_gguf(name)
            if meta is None:
                raise CheckpointError(part, f"tensor {name} is unknown: no Llama has it")
            stored[meta] = gguf_types.read_tensor(data[place], kind, header.tensors[name].shape)
            types[kind] += 1
    return types, stored


def _refuse_other_models(path: Path, keys: dict[str, Any]) -> None:
    kind, architecture = keys.get("general.type", "model"), keys.get("general.architecture")
    if architecture == "clip":
        raise CheckpointError(
            path, "holds what a model sees pictures with (mmproj): give the .gguf of the model itself"
        )
    if architecture != "llama":
        raise CheckpointError(path, f"is of architecture {architecture!r}: only llama can be read")
    if kind != "model":
        raise CheckpointError(path, f"holds no model, its general.type is {kind!r}: give the .gguf of the model itself")
    if experts := keys.get("llama.expert_count"):
        what = f"llama.expert_count is {experts}: mixtures of experts are not computed by this implementation"
        raise CheckpointError(path, what)


def _one_dtype(entries: dict[str, Lazy]) -> dict[str, Lazy]:
    """The matrices in the one dtype that they have, else in fp32; norms too, if that loses no bit.

    llama.cpp wants norms as F32 beside bf16 matrices, and keeps some matrices of a quantized file in F16.
    """
    dtypes = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    norms = {name: entry.read(0, entry.shape[0]) for name, entry in entries.items() if len(entry.shape) == 1}
    narrow = {name: norm.to(dtype) for name, norm in norms.items()}
    whole = cast(Weights(entries), dtype)
    if not all(torch.equal(narrow[name].to(norm.dtype), norm) for name, norm in norms.items()):
        narrow = norms
    return {name: lazy(narrow[name]) if name in narrow else whole.entry(name) for name in entries}


def _read_config(
    path: Path, keys: dict[str, Any], stored: dict[str, Lazy], factors: Lazy | None, notices: list[str]
) -> ModelConfig:
    llama = {key[6:]: _one_of_equals(value) for key, value in keys.items() if key.startswith("llama.")}
    fields = Fields(path, llama, "llama.")
    _refuse_other_scaling(fields)
    sizes = {name: fields.integer(key) for name, key in SIZES.items()}
    head_dim = fields.integer(HEAD_DIMS[0], sizes["dim"] // sizes["n_heads"])
    for key in HEAD_DIMS[1:]:
        if fields.integer(key, head_dim) != head_dim:
            raise fields.error(key, f"differs from the head dimension {head_dim}: not computed by this implementation")
    embedding = stored.get(EMBEDDING)
    defaults = {"n_kv_heads": sizes["n_heads"], "vocab_size": 0 if embedding is None else embedding.shape[0]}
    config = sizes | {
        **{name: fields.integer(OPTIONAL_SIZES[name], default) for name, default in defaults.items()},
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "tied": HEAD not in stored,
        "head_dim": head_dim,
    }
    ignored = {k for k, v in llama.items() if not COMPUTES.match(k) or v in (0, NEUTRAL.get(k))}
    fields.finish(frozenset(ignored | {"attention.layer_norm_epsilon"}))
    plain = make_config(path, **config)
    return plain if factors is None else _with_scaling(path, plain, keys, config, factors, notices)


def _one_of_equals(value: Any) -> Any:
    """Some converters write a number for each layer, all the same."""
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value


def _refuse_other_scaling(fields: Fields) -> None:
    """As llama.cpp reads them: no type means linear, a factor of 0 or 1 does nothing."""
    kind, old = fields.take("rope.scaling.type", "linear"), fields.take("rope.scale_linear", 1.0)
    factor = fields.take("rope.scaling.factor", old)
    if kind != "none" and (kind != "linear" or factor not in (0, 1)):
        what = f"is {kind!r}, by a factor of {factor}: only Llama 3.1's scaling (the tensor {ROPE_FREQS}) is computed"
        raise fields.error("rope.scaling.type", what)
    for key in ("original_context_length", "finetuned", "yarn_log_multiplier"):
        fields.take(f"rope.scaling.{key}", None)
    if not fields.take("attention.causal", True):
        raise fields.error("attention.causal", "is false: only causal attention is computed")


def _with_scaling(
    path: Path, plain: ModelConfig, keys: dict[str, Any], config: dict[str, Any], factors: Lazy, notices: list[str]
) -> ModelConfig:
    """The scaling whose factors the file holds: by our own keys, else by Llama 3.1's published numbers."""
    if factors.shape != (plain.head_dim // 2,):
        raise CheckpointError(path, f"{ROPE_FREQS} has shape {factors.shape}, expected ({plain.head_dim // 2},)")
    found = factors.read(0, factors.shape[0]).float()
    own = Fields(path, {k[23:]: v for k, v in keys.items() if k.startswith("nanollama.rope_scaling.")})
    scaling = RopeScaling(
        factor=own.number("factor", None) or gguf_header.shortest(float(found.max())),
        low_freq_factor=own.number("low_freq_factor", 1.0),
        high_freq_factor=own.number("high_freq_factor", 4.0),
        original_context=own.integer("original_context", 8192),
    )
    scaled = make_config(path, **config, rope_scaling=scaling)
    if not torch.allclose(scaling_factors(scaled), found, rtol=1e-4):
        raise CheckpointError(path, f"{ROPE_FREQS} is not Llama 3.1's scaling of RoPE: not computed here")
    if "nanollama.rope_scaling.factor" not in keys:
        notices.append(
            f"RoPE scaling factor {scaling.factor:g} is taken from {ROPE_FREQS}, the other numbers from Llama 3.1"
        )
    return scaled


def scaling_factors(config: ModelConfig) -> Tensor:
    """rope_freqs.weight: what each frequency is divided by, (head_dim/2,) float32."""
    plain = ModelConfig(**{**vars(config), "rope_scaling": None})
    return rope_frequencies(plain) / rope_frequencies(config)


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    name: str = "nanollama",
) -> None:
    """Write a .gguf that llama.cpp runs, streaming. dtype: one of DTYPES or `writable()`; None keeps the stored one.

    tokenizer: a file of any kind, whose vocabulary goes into the file.

    Norms are always F32. Quantized, the head (of a tied model the embedding; of a ternary type both) is Q8_0, where
    llama.cpp's quantizer takes Q6_K, and a matrix whose rows are no whole blocks F16, as in llama.cpp's converter.
    """
    path = Path(path)
    package = gguf_types.package(path, "writing it")
    named, whole = gguf_types.named(path, dtype), as_weights(weights)
    types = {name: _type_to_write(config, whole, name, named) for name in whole}
    casts = {as_: cast(whole, as_) for as_ in {kind.dtype or torch.float32 for kind in types.values()}}
    entries = {name: casts[kind.dtype or torch.float32].entry(name) for name, kind in types.items()}
    entries = check_weights(path, config, entries, "the config")
    keys = gguf_keys(read(tokenizer), config.vocab_size) if tokenizer else {"tokenizer.ggml.model": "none"}
    writer = _new_writer(package, config, keys, name)
    writer.add_file_type(gguf_types.file_type(named or types[EMBEDDING]))
    if config.rope_scaling is not None:
        entries[ROPE_FREQS], types[ROPE_FREQS] = lazy(scaling_factors(config)), F32
    for meta, entry in entries.items():
        stored_name, kind = meta if meta == ROPE_FREQS else gguf_name(meta), types[meta]
        number = package.GGMLQuantizationType[kind.name]
        writer.add_tensor_info(stored_name, entry.shape, None, kind.size(entry.shape), raw_dtype=number)
    with staged(path.parent) as stage, stage.open(path.name) as file:
        _write_header(writer, file)
        for meta, entry in entries.items():
            for block in row_blocks(entry):
                file.write(gguf_types.encode(block, types[meta]))
            file.write(b"\0" * (-file.tell() % writer.data_alignment))


def _type_to_write(config: ModelConfig, weights: Weights, name: str, named: GgmlType | None) -> GgmlType:
    shape = weights.shapes[name]
    if len(shape) == 1:
        return F32
    kind = named or {kind.dtype: kind for kind in DTYPES.values()}.get(weights.dtypes[name], F32)
    is_head = name == (EMBEDDING if config.tied else HEAD)
    if kind.dtype is None and (is_head or (name == EMBEDDING and kind.name.startswith("TQ"))):
        kind = gguf_types.Q8_0
    return F16 if shape[-1] % kind.block else kind


def _write_header(writer: Any, file: Any) -> None:
    """Header, keys and tensor table, through the package, into a file that we hold open."""
    writer.fout = [file]
    writer.state = type(writer.state).EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file.write(b"\0" * (-file.tell() % writer.data_alignment))


def _new_writer(package: Any, config: ModelConfig, vocabulary: dict[str, Any], name: str) -> Any:
    writer = package.GGUFWriter(None, "llama")
    writer.add_name(name)
    sizes = {key: getattr(config, name) for name, key in (SIZES | OPTIONAL_SIZES).items()}
    sizes |= dict.fromkeys(HEAD_DIMS, config.head_dim)
    floats = {"attention.layer_norm_rms_epsilon": float(config.norm_eps), "rope.freq_base": float(config.rope_theta)}
    scaling = vars(config.rope_scaling) if config.rope_scaling else {}
    keys = {f"llama.{key}": value for key, value in (sizes | floats).items()}
    keys |= {f"nanollama.rope_scaling.{key}": value for key, value in scaling.items()}
    for key, value in (keys | vocabulary).items():
        one = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}.get(type(value), "ARRAY")
        inner = {int: "INT32", float: "FLOAT32", str: "STRING"}[type(value[0])] if one == "ARRAY" else None
        kinds = [package.GGUFValueType[kind] for kind in (one, inner) if kind]
        writer.add_key_value(key, value, *kinds)
    return writer
