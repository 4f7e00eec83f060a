"""tinygrad's own Llama (tinygrad.llm, from PyPI) on a .gguf, weights and cache in float32. It compiles with clang."""

import os
import sys
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ["HALF"] = "0"  # else it rounds what the file holds to float16; read when the file is
import tinygrad

# The wheel of 0.14.0 lacks this module: layers for AMD's graphics cards, which are nn.Linear elsewhere.
kernels: Any = types.ModuleType("tinygrad.llm.kernels.amd")
kernels.Linear, kernels.amd_custom_kernels_supported = tinygrad.nn.Linear, lambda device: False
kernels.gated_delta_prefill = kernels.flash_attention = None
sys.modules.setdefault("tinygrad.llm.kernels", types.ModuleType("tinygrad.llm.kernels"))
sys.modules.setdefault("tinygrad.llm.kernels.amd", kernels)
import tinygrad.llm.model as llm  # noqa: E402

POSITIONS, STEP = 640, 320  # lengths are padded: each is compiled


class Wide:
    """tinygrad's dtypes, but that its caches, which say `half`, are float32."""

    half = tinygrad.dtypes.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(tinygrad.dtypes, name)


class Port:
    dtypes = ("fp32",)
    max_positions = POSITIONS

    def __init__(self, model: Any) -> None:
        self.model = model

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
    llm.dtypes = Wide()
    return Port(llm.Transformer.from_gguf(checkpoint, POSITIONS)[0])
