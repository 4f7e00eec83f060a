"""transformers, whatever its attention: `sdpa`, `eager`. It reads a Hugging Face folder."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Port:
    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache = None
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits


def _load(checkpoint: str, dtype: torch.dtype, device: str, attention: str) -> Port:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
    return Port(model.to(device).eval())


def sdpa(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return _load(checkpoint, dtype, device, "sdpa")


def eager(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return _load(checkpoint, dtype, device, "eager")
