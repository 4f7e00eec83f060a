"""llama.cpp as a candidate of parity.check: a .gguf with the cache and the weights that a user has, declared or not."""

from collections.abc import Callable

import llama_cpp
import torch
from torch import Tensor

from engines import without_repacking

F16, F32 = llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_F32


class Port:
    """tokens (B, T) -> logits (B, T, V), row by row."""

    def __init__(self, path: str, cache: int, **conditions: str) -> None:
        with without_repacking(llama_cpp.llama_cpp):
            self.llama = llama_cpp.Llama(
                path, n_ctx=1024, n_batch=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
                type_k=cache, type_v=cache,
            )  # fmt: skip
        for name, value in conditions.items():
            setattr(self, name, value)

    def _eval(self, ids: list[int]) -> Tensor:
        before = self.llama.n_tokens
        self.llama.eval(ids)
        return torch.from_numpy(self.llama.scores[before : self.llama.n_tokens].copy())

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.prefill(row[None]) for row in tokens])

    def prefill(self, tokens: Tensor) -> Tensor:
        self.llama.reset()
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self._eval(tokens[0].tolist())[None]


def loader(cache: int, weights: str = "fp32", **conditions: str) -> Callable[..., Port]:
    """NAME.fp32.gguf, or its neighbour with other weights."""
    return lambda path, dtype, device: Port(path.replace(".fp32.", f".{weights}."), cache, **conditions)


Q8 = {"integers": "int8/32", "activations": "int8/32"}
default = loader(F16)
default_declared = loader(F16, kv="fp16", attention_dtype="fp16")
q8_0 = loader(F32, "q8_0")
q8_0_declared = loader(F32, "q8_0", **Q8)
q8_0_default_declared = loader(F16, "q8_0", **Q8, kv="fp16", attention_dtype="fp16")
q4_0_said_to_be_q8_0 = loader(F32, "q4_0", **Q8)
