"""llama.cpp through llama-cpp-python, on a .gguf: its default cache, float16 (`load`), and one in float32 (`f32`).

`declared` and `q8_0` say what they round: the default cache, and a Q8_0 file.
"""

import llama_cpp
import torch
from torch import Tensor

from parity.peers.ggml import without_repacking

POSITIONS = 1024


class Port:
    dtypes = ("fp32",)
    max_positions = POSITIONS

    def __init__(self, path: str, cache: int, **declared: str) -> None:
        vars(self).update(declared)
        with without_repacking(llama_cpp.llama_cpp):
            self.llama = llama_cpp.Llama(
                path, n_ctx=POSITIONS, n_batch=POSITIONS, n_threads=1, n_threads_batch=1, type_k=cache, type_v=cache,
                logits_all=True, verbose=False,
            )  # fmt: skip

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


def declared(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(checkpoint, llama_cpp.GGML_TYPE_F16, kv="fp16", attention_dtype="fp16")


def q8_0(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(checkpoint, llama_cpp.GGML_TYPE_F32, integers="int8/32", activations="int8/32")
