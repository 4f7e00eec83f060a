"""Tiny checkpoints of every family and in every format, for the tests of nanollama.checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanollama.checkpoint import Checkpoint, write_bin, write_gguf, write_hf, write_meta
from nanollama.checkpoint.names import weight_shapes
from nanollama.model import ModelConfig, RopeScaling

LLAMA2 = ModelConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=64, hidden_dim=80, rope_theta=10_000.0, max_seq_len=32
)
LLAMA31 = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=96,
    hidden_dim=160,
    norm_eps=2e-5,
    rope_scaling=RopeScaling(),
)
LLAMA32 = replace(LLAMA31, tied=True, rope_scaling=RopeScaling(factor=32.0), max_seq_len=131_072)
FAMILIES = {"llama2": LLAMA2, "llama3.1": LLAMA31, "llama3.2": LLAMA32}
FORMATS = ("meta", "hf", "gguf", "llama2c")


def make_weights(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights that bf16 and fp16 both hold exactly, so that no conversion between dtypes loses a bit."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(-127, 128, shape, generator=generator) / 64).to(dtype)
        for name, shape in weight_shapes(config).items()
    }


def write(path: Path, format: str, config: ModelConfig, weights: dict[str, Tensor], **options: object) -> Path:
    """Write in any format; returns the path to open."""
    writer = {"meta": write_meta, "hf": write_hf, "gguf": write_gguf, "llama2c": write_bin}[format]
    path = path / {"meta": "meta", "hf": "hf", "gguf": "x.gguf", "llama2c": "x.bin"}[format]
    writer(path, config, weights, **options)  # type: ignore[operator]
    return path


def holds(format: str, config: ModelConfig) -> bool:
    """Whether the format can say this config: llama2.c fixes the epsilon and the RoPE base."""
    return format != "llama2c" or (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 10_000.0, None)


def assert_same(opened: Checkpoint, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Config equal, weights bit-equal in the expected dtype, in the model's order; rows equal slices."""
    assert opened.config == config
    assert list(opened.weights) == list(weights)
    for name, expected in weights.items():
        found = opened.weights[name]
        assert opened.weights.shapes[name] == tuple(found.shape)
        assert opened.weights.dtypes[name] == found.dtype == (dtype or expected.dtype), name
        assert torch.equal(found, expected.to(found.dtype)), name
        assert torch.equal(opened.weights.rows(name, 3, 21), found[3:21]), name
