"""mlx-lm on MLX's CPU build, as it opens a Hugging Face folder; its cache."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from torch import Tensor

DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}


class Port:
    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    def _logits(self, tokens: Tensor, cache: Any) -> Tensor:
        logits = self.model(mx.array(tokens.numpy()), cache=cache)
        return torch.from_numpy(np.array(logits.astype(mx.float32)))

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens, None)

    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache = make_prompt_cache(self.model)
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens, self.cache)


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    model, _ = load_model(Path(checkpoint))
    model.update(tree_map(lambda w: w.astype(DTYPES[dtype]), model.parameters()))
    return Port(model)
