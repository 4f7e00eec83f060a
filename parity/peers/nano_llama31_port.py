"""karpathy/nano-llama31, llama31.py, on a Meta folder. On the path: its clone."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# llama31.py imports its tokenizer, and fire, at its top; the model needs neither.
sys.modules.setdefault("tokenizer", types.SimpleNamespace(Tokenizer=None))  # type: ignore[arg-type]
sys.modules.setdefault("fire", types.SimpleNamespace())  # type: ignore[arg-type]
import llama31  # noqa: E402

POSITIONS = 1024


class Port:
    max_positions = POSITIONS

    def __init__(self, model: Any) -> None:
        self.model, self.position = model, 0

    def _caches(self, rows: int) -> None:
        p, like = self.model.params, self.model.output.weight
        size = (rows, POSITIONS, p.n_kv_heads, p.dim // p.n_heads)
        for block in self.model.layers:
            block.attention.cache = llama31.KVCache(*size, like.dtype, like.device) if rows else None

    def __call__(self, tokens: Tensor) -> Tensor:
        self._caches(0)
        return self.model.forward_inference(tokens, 0)

    def prefill(self, tokens: Tensor) -> Tensor:
        self._caches(tokens.shape[0])
        self.position = 0
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        start, self.position = self.position, self.position + tokens.shape[1]
        return self.model.forward_inference(tokens, start)


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    folder = Path(checkpoint)
    params = json.loads((folder / "params.json").read_text())
    model = llama31.Transformer(llama31.ModelArgs(max_seq_len=POSITIONS, **params))
    model.load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True), strict=True)
    return Port(model.to(device=device, dtype=dtype).eval())
