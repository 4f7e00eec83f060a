"""Features that wrap the model from outside: dropout, activation checkpointing and its offload, compiling. The model
knows of none.

add_dropout_(model, 0.1)
checkpoint_blocks_(model)
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from nanollama.model import Context, Transformer


def add_dropout_(model: Transformer, p: float) -> None:
    """Zero a share `p` of the embedding and of what each attention and feed-forward adds, in training mode only."""

    def drop(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return F.dropout(output, p, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("tok_embeddings", "attention.wo", "feed_forward.w2")):
            module.register_forward_hook(drop)


def checkpoint_blocks_(model: Transformer, *, offload: bool = False) -> None:
    """Keep only each block's input, offload: in the CPU's memory, and run the block again in the backward pass."""
    for block in model.layers:
        kept = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = partial(_offloaded, kept) if offload else kept


def _offloaded(block: Callable[[Tensor, Context], Tensor], x: Tensor, ctx: Context) -> Tensor:
    with save_on_cpu(pin_memory=x.device.type == "cuda"):
        return block(x, ctx)


def compile_blocks_(model: Transformer) -> None:
    """Compile the block once for all layers, which are alike: minutes less to wait for than for the whole model."""
    for block in model.layers:
        block.compile()
