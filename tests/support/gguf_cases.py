"""GGUF files as others write them, made with the gguf package's own writer: any ggml type, keys, number of parts."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nanollama.checkpoint.names import gguf_name, weight_shapes
from nanollama.model import ModelConfig

TYPES = gguf.GGMLQuantizationType
# Rows of one block of 256 weights, the longest that there is; a head of its own, two layers.
WIDE = ModelConfig(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=24, hidden_dim=256, rope_theta=1e4, max_seq_len=64
)


def new_writer(path: Path | None, config: ModelConfig, keys: dict[str, Any] | None = None, **options: Any) -> Any:
    """A writer that has the keys of a plain Llama, and `keys`."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (keys or {}).items():
        adders.get(type(value), writer.add_array)(key, value)
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_random(path: Path, kind: Any, config: ModelConfig = WIDE, **options: Any) -> dict[str, np.ndarray]:
    """A model whose matrices are random bytes of the type; returns what the package makes of them, by GGUF name."""
    writer, rng, expected = new_writer(path, config, **options), np.random.default_rng(0), {}
    for name, shape in ((gguf_name(meta), shape) for meta, shape in weight_shapes(config).items()):
        if len(shape) == 1:
            expected[name] = rng.random(shape, np.float32)
            writer.add_tensor(name, expected[name])
            continue
        data = rng.integers(0, 256, gguf.quants.quant_shape_to_byte_shape(shape, kind), np.uint8)
        with np.errstate(all="ignore"):
            expected[name] = gguf.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return expected


def write_sparse(path: Path, config: ModelConfig, kind: Any) -> None:
    """A whole file of the type, of zeros that take no room on the disk."""
    writer = new_writer(path, config)
    for meta, shape in weight_shapes(config).items():
        type_ = TYPES.F32 if len(shape) == 1 else kind
        block, nbytes = gguf.GGML_QUANT_SIZES[type_]
        writer.add_tensor_info(gguf_name(meta), shape, None, int(np.prod(shape)) // block * nbytes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sizes = [-(-tensor.nbytes // 32) * 32 for tensor in writer.tensors[0].values()]
    writer.fout[0].truncate(writer.fout[0].tell() + 32 + sum(sizes))
    writer.close()
