"""GGUF, llama.cpp's format: one file of typed keys, vocabulary and tensors (F32, F16, BF16, Q8_0; Q8_0 reads as fp32).

Files are written through the `gguf` package (extra `gguf`); reading needs torch only. The rows of wq and wk are
Meta's. Llama 3.1's RoPE scaling is the tensor rope_freqs.weight, without which long contexts come out wrong
(llama.cpp#8676); the numbers behind it are kept in keys of our own, which llama.cpp ignores.

    python -m nanollama inspect model.gguf

Sources: ggml's docs/gguf.md, llama.cpp's convert_hf_to_gguf.py (LlamaModel) and llama-model.cpp for keys and names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama.checkpoint import gguf_header
from nanollama.checkpoint.fields import Fields
from nanollama.checkpoint.names import gguf_name, meta_from_gguf
from nanollama.checkpoint.staging import staged
from nanollama.checkpoint.weights import (
    Checkpoint,
    CheckpointError,
    Lazy,
    Weights,
    check_weights,
    make_config,
    row_blocks,
    to_write,
)
from nanollama.model import ModelConfig, RopeScaling, rope_frequencies
from nanollama.vocabulary import read
from nanollama.vocabulary.write import gguf_keys

FILE_TYPES = {"fp32": 0, "fp16": 1, "q8_0": 7, "bf16": 32}  # general.file_type (llama.cpp's LlamaFileType)
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Q8_BLOCK, Q8_BYTES = 32, 34  # weights; bytes: an fp16 scale, then int8 values
ROPE_FREQS = "rope_freqs.weight"


def open_gguf(path: Path) -> Checkpoint:
    """Read a .gguf of architecture llama. Raises CheckpointError unless its keys and tensors fit each other exactly."""
    header = gguf_header.read(path)
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = dict(header.tensors)
    rope_freqs = tensors.pop(ROPE_FREQS, None)
    stored = {}
    for name, tensor in tensors.items():
        meta = meta_from_gguf(name)
        if meta is None:
            raise CheckpointError(path, f"tensor {name} is unknown: no Llama has it")
        stored[meta] = _entry(data, tensor)
    factors = None if rope_freqs is None else _entry(data, rope_freqs)
    notices: list[str] = []
    config = _read_config(path, header.keys, stored, factors, notices)
    entries = _narrow_norms(check_weights(path, config, stored, "its header"))
    tokenizer = path if isinstance(header.keys.get("tokenizer.ggml.tokens"), list) else None  # opened from the header
    return Checkpoint(config, Weights(entries), tokenizer, "gguf", path, notices)


def _entry(data: Tensor, tensor: gguf_header.Tensor) -> Lazy:
    stored = data[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.type == "Q8_0":
        return _dequantized(stored, tensor.shape)
    dtype = TORCH_TYPES[tensor.type]
    if tensor.offset % dtype.itemsize:
        stored = stored.clone()  # an alignment of 1 is legal, torch's views need their own
    whole = stored.view(dtype).view(tensor.shape)
    return Lazy(tensor.shape, dtype, lambda start, stop: whole[start:stop])


def _dequantized(stored: Tensor, shape: tuple[int, ...]) -> Lazy:
    """Q8_0: each row is blocks of 32 weights, an fp16 scale before int8 values."""
    row_bytes = shape[-1] // Q8_BLOCK * Q8_BYTES
    n_rows = stored.numel() // row_bytes

    def read(start: int, stop: int) -> Tensor:
        blocks = stored.view(n_rows, row_bytes)[start:stop].reshape(-1, Q8_BYTES)
        scales = blocks[:, :2].contiguous().view(torch.float16).float()  # (blocks, 1)
        return (blocks[:, 2:].view(torch.int8).float() * scales).view(-1, *shape[1:])

    return Lazy(shape, torch.float32, read)


def _narrow_norms(entries: dict[str, Lazy]) -> dict[str, Lazy]:
    """llama.cpp wants norms as F32 beside bf16 matrices: give them their own dtype back if no bit is lost."""
    dtype = entries["tok_embeddings.weight"].dtype
    norms = {name: entry.read(0, entry.shape[0]) for name, entry in entries.items() if len(entry.shape) == 1}
    narrow = {name: norm.to(dtype) for name, norm in norms.items()}
    if not all(torch.equal(narrow[name].to(norm.dtype), norm) for name, norm in norms.items()):
        return entries

    def view(tensor: Tensor) -> Lazy:
        return Lazy(tuple(tensor.shape), dtype, lambda start, stop: tensor[start:stop])

    return {name: view(narrow[name]) if name in narrow else entry for name, entry in entries.items()}


def _read_config(
    path: Path, keys: dict[str, Any], stored: dict[str, Lazy], factors: Lazy | None, notices: list[str]
) -> ModelConfig:
    architecture = keys.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(path, f"is of architecture {architecture!r}: only llama can be read")
    if keys.get("split.count", 0) not in (0, 1):
        raise CheckpointError(path, "is one part of a split model: join the parts with llama-gguf-split --merge")
    fields = Fields(path, {k[6:]: v for k, v in keys.items() if k.startswith("llama.")}, "llama.")
    n_heads = fields.integer("attention.head_count")
    dim = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.error(key, f"differs from the head dimension {head_dim}: not computed by this implementation")
    for key in ("expert_count", "expert_used_count"):
        if fields.integer(key, 0, low=0):
            raise fields.error(key, "is not 0: mixtures of experts are not computed by this implementation")
    if fields.take("rope.scaling.type", "none") != "none":
        raise fields.error("rope.scaling.type", "is not none: only Llama 3.1's scaling (rope_freqs) can be computed")
    embedding = stored.get("tok_embeddings.weight")
    config = {
        "dim": dim,
        "n_layers": fields.integer("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("attention.head_count_kv", n_heads),
        "vocab_size": fields.integer("vocab_size", 0 if embedding is None else embedding.shape[0]),
        "hidden_dim": fields.integer("feed_forward_length"),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "tied": "output.weight" not in stored,
        "head_dim": head_dim,
        "max_seq_len": fields.integer("context_length"),
    }
    fields.finish()
    plain = make_config(path, **config)
    return plain if factors is None else _with_scaling(path, plain, keys, config, factors, notices)


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
    """Write a .gguf that llama.cpp runs, streaming. dtype: fp32, fp16, bf16, q8_0; None keeps the stored one.

    tokenizer: a file of any kind, whose vocabulary goes into the file.

    Norms are always F32. A q8_0 matrix whose rows are no multiple of 32 becomes F16, as in llama.cpp's converter.
    """
    path = Path(path)
    quantized = dtype == "q8_0"
    target = {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float32}
    if dtype not in target:
        raise CheckpointError(path, f"dtype {dtype!r} is unknown: choose fp32, fp16, bf16 or q8_0")
    entries = to_write(path, config, weights, target[dtype])
    types = {n: _stored_type(entry, quantized) for n, entry in entries.items()}
    keys: dict[str, Any] = {"tokenizer.ggml.model": "none"}
    if tokenizer is not None:
        keys = gguf_keys(read(tokenizer), config.vocab_size)
    package, writer = _new_writer(config, keys, name)
    writer.add_file_type(
        FILE_TYPES[dtype or {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[types["tok_embeddings.weight"]]]
    )
    if config.rope_scaling is not None:
        entries[ROPE_FREQS] = _factors_entry(config)
        types[ROPE_FREQS] = "F32"
    for meta, entry in entries.items():
        stored_name = meta if meta == ROPE_FREQS else gguf_name(meta)
        type_ = package.GGMLQuantizationType[types[meta]]
        writer.add_tensor_info(stored_name, entry.shape, None, _nbytes(entry.shape, types[meta]), raw_dtype=type_)
    with staged(path.parent) as stage, stage.open(path.name) as file:
        _write_header(writer, file)
        for meta, entry in entries.items():
            for block in row_blocks(entry):
                file.write(_encode(package, block, types[meta]))
            file.write(b"\0" * (-file.tell() % writer.data_alignment))


def _stored_type(entry: Lazy, quantized: bool) -> str:
    if len(entry.shape) == 1:
        return "F32"
    if quantized:
        return "F16" if entry.shape[-1] % Q8_BLOCK else "Q8_0"
    return GGML_TYPES[entry.dtype]


def _factors_entry(config: ModelConfig) -> Lazy:
    factors = scaling_factors(config)
    return Lazy(tuple(factors.shape), torch.float32, lambda start, stop: factors[start:stop])


def _nbytes(shape: tuple[int, ...], type_name: str) -> int:
    block, block_bytes = {entry[0]: entry[1:] for entry in gguf_header.TYPES.values()}[type_name]
    numel = 1
    for n in shape:
        numel *= n
    return numel // block * block_bytes


def _encode(package: Any, block: Tensor, type_name: str) -> Any:
    """Rows as the bytes of a ggml type."""
    if type_name == "Q8_0":
        return package.quantize(block.float().numpy(), package.GGMLQuantizationType.Q8_0).data
    dtype = TORCH_TYPES[type_name]
    return block.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data


def _write_header(writer: Any, file: Any) -> None:
    """Header, keys and tensor table, through the package, into a file that we hold open."""
    writer.fout = [file]
    writer.state = type(writer.state).EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file.write(b"\0" * (-file.tell() % writer.data_alignment))


def _new_writer(config: ModelConfig, vocabulary: dict[str, Any], name: str) -> tuple[Any, Any]:
    try:
        import gguf as package
    except ImportError:
        raise CheckpointError("gguf", "writing GGUF needs the gguf package: pip install 'nanollama[gguf]'") from None
    writer = package.GGUFWriter(None, "llama")
    writer.add_name(name)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling is not None:
        for key, value in vars(config.rope_scaling).items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"nanollama.rope_scaling.{key}", value)
    for key, value in vocabulary.items():
        item = value[0] if isinstance(value, list) else value
        kind = {bool: "BOOL", int: "INT32" if isinstance(value, list) else "UINT32", float: "FLOAT32", str: "STRING"}[
            type(item)
        ]
        types = [getattr(package.GGUFValueType, name) for name in (["ARRAY", kind] if item is not value else [kind])]
        writer.add_key_value(key, value, *types)
    return package, writer
