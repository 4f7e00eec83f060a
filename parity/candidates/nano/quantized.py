"""nanollama with integer weights: judged by what such rounding costs the oracle."""

from typing import Any

import torch
from torch import Tensor

from nanollama.checkpoint import open_checkpoint
from nanollama.model import KVCache
from nanollama.speed.quantize import GROUP_INPUTS, load_quantized, weight_bytes
from parity.candidates.nano.model import config_echo
from parity.candidates.nano.taps import taps_of


class Quantized:
    """A quantised model: logits and taps, prefill and decode through the cache."""

    def __init__(self, checkpoint: str, dtype: torch.dtype, device: str, scheme: str) -> None:
        opened = open_checkpoint(checkpoint)
        self.notices = opened.notices
        self.integers = scheme if scheme == "int8" else f"{scheme}/{GROUP_INPUTS}"
        self.model = load_quantized(opened.config, opened.weights, scheme, dtype=dtype, device=device).eval()
        self.weight_bytes = weight_bytes(self.model)
        self.cache: KVCache | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens, None)

    def prefill(self, tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        weight = self.model.tok_embeddings.weight
        self.cache = KVCache(self.model.config, rows, length + 512, dtype=weight.dtype, device=weight.device)
        return self._logits(tokens, self.cache)

    def decode(self, token: Tensor) -> Tensor:
        return self._logits(token, self.cache)

    def config(self) -> dict[str, Any]:
        return config_echo(self.model.config)

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        return taps_of(self.model, tokens)

    def _logits(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        return self.model.logits(self.model.hidden(tokens, cache=cache))


def int8(checkpoint: str, dtype: torch.dtype, device: str) -> Quantized:
    return Quantized(checkpoint, dtype, device, "int8")


def int4(checkpoint: str, dtype: torch.dtype, device: str) -> Quantized:
    return Quantized(checkpoint, dtype, device, "int4")
