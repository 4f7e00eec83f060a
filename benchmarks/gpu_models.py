"""The models of `benchmarks.gpu`: real shapes, random weights that are made on the device.

weights = seeded_weights(LLAMA_1B, torch.device("cuda"), torch.bfloat16)      # 2.5 GB, a tenth of a second
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanollama.model import ModelConfig, RopeScaling, Transformer

LLAMA_1B = ModelConfig(
    dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128_256, hidden_dim=8192, tied=True,
    rope_scaling=RopeScaling(factor=32.0), max_seq_len=131_072,
)  # fmt: skip
LLAMA_8B = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128_256, hidden_dim=14_336,
    rope_scaling=RopeScaling(), max_seq_len=131_072,
)  # fmt: skip
TINY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, hidden_dim=160, max_seq_len=1024)
REHEARSED = {"1B": ModelConfig(**TINY, tied=True), "8B": ModelConfig(**TINY)}  # type: ignore[arg-type]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bench(NamedTuple):
    """Where a section runs, and on which models."""

    device: torch.device
    shapes: dict[str, ModelConfig]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


Item = tuple[str, Callable[[], dict[str, Any]]]


def seeded_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights by Meta's names, made on the device; logits of a size as real ones have."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            weights[name].normal_(0.0, shape[-1] ** -0.5, generator=generator)
    return weights


def random_ids(config: ModelConfig, rows: int, length: int) -> list[list[int]]:
    return torch.randint(3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()
