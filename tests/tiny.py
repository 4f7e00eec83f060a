"""Small things that many tests need, each with what matters to the test named and the rest left at a default."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanollama.generation.llama import Row, Sampling
from nanollama.model import ModelConfig, Transformer
from nanollama.tokenizer import Tokenizer
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES, Shape

DIMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 400}


def config(vocab_size: int = 61, **changes: Any) -> ModelConfig:
    """Two layers of width 32, two queries a key, a context of 400: `config(n_layers=1, tied=True)`."""
    return ModelConfig(vocab_size=vocab_size, **{**DIMS, **changes})


def model(vocab_size: int = 61, seed: int = 0, **changes: Any) -> Transformer:
    """A seeded model, for inference, with weights so large that its next token is rarely close to another."""
    made = Transformer(config(vocab_size, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 3 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.eval()


def row(
    ids: Sequence[int] = (1,),
    sampling: Sampling | None = None,
    tokenizer: Tokenizer | None = None,
    context: int = 400,
) -> Row:
    """The first answer to the first prompt, which is `ids`."""
    return Row(0, 0, list(ids), sampling or Sampling(), tokenizer, context)


def shape(name: str = "tiny", **changes: Any) -> Shape:
    """One of `parity.synth`, smaller: two layers, 512 tokens, heads of 8 numbers."""
    return replace(SHAPES[name], **{"vocab_size": 512, "n_layers": 2, "n_heads": 16, "n_kv_heads": 4, **changes})


def checkpoint(folder: Path, format: str = "meta", **changes: Any) -> Path:
    """A seeded checkpoint of such a shape, without a tokenizer, in `folder`."""
    synthesise(shape(**changes), folder, format=format)
    return folder
