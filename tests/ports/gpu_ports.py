"""nanollama on a GPU as somebody else's port: right, and wrong in two ways that only numbers show."""

import torch

from parity.candidates.nano.model import Nano


def right(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
    return Nano(checkpoint, dtype, device, "fast")


def wrong(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
    """The epsilon of one norm of eight is another code's default."""
    nano = Nano(checkpoint, dtype, device, "fast")
    nano.model.layers[1].ffn_norm.eps = 1e-3
    return nano


def tf32(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
    """Products of fp32 numbers with 10 bits of their fractions, as many a script's first line allows."""
    torch.backends.cuda.matmul.allow_tf32 = True
    return Nano(checkpoint, dtype, device, "fast")
