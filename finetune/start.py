"""Where a run starts: an architecture with fresh weights (llama2.c's shapes and initialization), or a checkpoint's.

python -m finetune.tinystories --init 15M          python -m finetune.text --data notes.txt --ckpt Llama-3.2-1B
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.config import TrainConfig, init_shape
from nanollama.checkpoint import Checkpoint, open_checkpoint
from nanollama.model import ModelConfig, Transformer

LLAMA2C_STD = 0.02
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def init_std(dim: int) -> float:
    """llama2.c's 0.02; more for small models, which it leaves near zero (260K: see docs/finetune.md)."""
    return LLAMA2C_STD if dim >= 256 else 0.8 / math.sqrt(dim)


@dataclass(frozen=True)
class Start:
    checkpoint: Checkpoint | None = None  # None: from scratch

    @property
    def tokenizer(self) -> Path | None:
        return self.checkpoint.tokenizer if self.checkpoint else None

    @property
    def rows(self) -> int:
        """Of the checkpoint's embedding; 0 where there is none."""
        return self.checkpoint.config.vocab_size if self.checkpoint else 0


def open_start(config: TrainConfig) -> Start:
    """Opens what `--ckpt` names; reads no weights yet."""
    return Start(open_checkpoint(config.ckpt) if config.ckpt else None)


def build_model(start: Start, config: TrainConfig, vocab_size: int, device: torch.device) -> Transformer:
    """The model on the device, weights as `--weights` says, in memory of its own. vocab_size: of one from scratch.

    Raises ValueError for rows that are longer than the checkpoint's context.
    """
    if start.checkpoint is None:
        shape = init_shape(config, vocab_size)
        weights = fresh_weights(shape, torch.Generator().manual_seed(config.seed))
        return _own(shape, weights, device, WEIGHTS[config.weights])
    shape = start.checkpoint.config
    if config.seq_len > shape.max_seq_len:
        raise ValueError(f"--seq_len {config.seq_len}: {config.ckpt} was made for at most {shape.max_seq_len} tokens")
    stored = {name: start.checkpoint.weights[name] for name in start.checkpoint.weights}
    return _own(shape, stored, device, WEIGHTS[config.weights])


def _own(shape: ModelConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Transformer:
    # copy=True: an optimizer must never write into a memory-mapped file.
    owned = {name: weight.to(device, dtype, copy=True) for name, weight in weights.items()}
    return Transformer.from_weights(shape, owned, dtype=dtype, device=device)


def fresh_weights(shape: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """llama2.c's initialization (`Transformer._init_weights`): normal, narrower for wo and w3, norms 1."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(shape).state_dict().items()}
    weights = {}
    for name, size in shapes.items():
        is_residual = name.endswith(("wo.weight", "w3.weight"))
        std = init_std(shape.dim) / (math.sqrt(2 * shape.n_layers) if is_residual else 1)
        norm = len(size) == 1
        weights[name] = torch.ones(size) if norm else torch.empty(size).normal_(0, std, generator=generator)
    return weights
