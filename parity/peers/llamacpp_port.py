"""llama.cpp through llama-cpp-python, on a .gguf: its default cache, float16 (`load`), and one in float32 (`f32`)."""

from typing import Any

import llama_cpp
import torch
from torch import Tensor

POSITIONS = 1024


class Port:
    dtypes = ("fp32",)
    max_positions = POSITIONS

    def __init__(self, path: str, cache: int, **more: Any) -> None:
        options = {"type_k": cache, "type_v": cache, "logits_all": True, "verbose": False, **more}
        self.llama = llama_cpp.Llama(path, n_ctx=POSITIONS, n_batch=POSITIONS, n_threads=1, **options)

    def _logits(self, ids: list[int]) -> Tensor:
        before = self.llama.n_tokens
        self.llama.eval(ids)
        return torch.from_numpy(self.llama.scores[before : self.llama.n_tokens].copy())  # (T, V)

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.prefill(row[None]) for row in tokens])

    def prefill(self, tokens: Tensor) -> Tensor:
        self.llama.reset()
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens[0].tolist())[None]


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(checkpoint, llama_cpp.GGML_TYPE_F16)


def f32(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(checkpoint, llama_cpp.GGML_TYPE_F32)


def f32_flash(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(checkpoint, llama_cpp.GGML_TYPE_F32, flash_attn=True)
