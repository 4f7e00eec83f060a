"""tinygrad's own Llama (tinygrad.llm, from PyPI) on a .gguf, weights and cache in float32. It compiles with clang."""

import os

import numpy as np
import torch
from torch import Tensor

os.environ["HALF"] = "0"  # else it rounds what the file holds to float16; read when the file is
import tinygrad
from tinygrad.llm.model import Transformer, precompute_freqs_cis

POSITIONS, STEP = 640, 320  # lengths are padded: each is compiled


class Port:
    dtypes = ("fp32",)
    max_positions = POSITIONS

    def __init__(self, model: Transformer) -> None:
        self.model = model
        for block in model.blk:  # its caches are float16, unless they are there before the first call
            c = block.config
            size = (2, 1, c.n_kv_heads, c.max_context, c.head_dim)
            block.cache_kv = tinygrad.Tensor.zeros(*size, dtype=tinygrad.dtypes.float32).contiguous().realize()
            block.freqs_cis = precompute_freqs_cis(c.rope_dim, c.max_context, c.rope_theta)

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.cat([self._row(row) for row in tokens])

    def _row(self, ids: Tensor) -> Tensor:
        """(1, T, V): forward() would give the last token alone."""
        padded = torch.nn.functional.pad(ids, (0, -len(ids) % STEP)).tolist()
        x = self.model.token_embd(tinygrad.Tensor([padded])).float()
        for block in self.model.blk:
            x = block(x, 0)
        logits = self.model.output(self.model.output_norm(x)).numpy()
        return torch.from_numpy(np.array(logits, dtype=np.float32)[:, : len(ids)])


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(Transformer.from_gguf(checkpoint, POSITIONS)[0])
