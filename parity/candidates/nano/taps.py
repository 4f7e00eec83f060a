"""nanollama's taps: where each is in a block, and what may see or replace it while the block's own code runs.

with at_taps(block, lambda tap, value: print(tap, tuple(value.shape))):
    block(x, context)                                    # attn_norm (1, 5, 64) ...
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

import nanollama.model as model_module
from nanollama.model import Transformer

# Tap -> the module of the block whose output it is.
OUTPUTS = {
    "attn_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "attn_out": "attention.wo",
    "ffn_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "ffn_out": "feed_forward.w2",
    "out": "",
}
INPUTS = {"attn_mix": "attention.wo", "ffn_mix": "feed_forward.w2"}  # whose input it is
ROTATED = ("q_rope", "k_rope")  # what the calls of apply_rope return, in turn
WITH_HEADS = ("q", "k", "v")  # (B, T, heads * head_dim) there, (B, T, heads, head_dim) as taps
See = Callable[[str, Tensor], Tensor | None]


@contextmanager
def at_taps(block: nn.Module, see: See) -> Iterator[None]:
    """`see(tap, value)` at each tap of the block; what it returns, if anything, is used in the value's place."""
    original, turns = model_module.apply_rope, iter(ROTATED)

    def apply_rope(*args: Tensor) -> Tensor:
        out = original(*args)
        put = see(next(turns), out)
        return out if put is None else put

    def at_output(tap: str, _module: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
        put = see(tap, out)
        return None if put is None else put.reshape(out.shape)

    def at_input(tap: str, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        put = see(tap, args[0])
        return None if put is None else (put,)

    with ExitStack() as stack:
        for tap, name in INPUTS.items():
            hook = block.get_submodule(name).register_forward_pre_hook(partial(at_input, tap))
            stack.callback(hook.remove)
        for tap, name in OUTPUTS.items():
            hook = block.get_submodule(name).register_forward_hook(partial(at_output, tap))
            stack.callback(hook.remove)
        stack.enter_context(patch.object(model_module, "apply_rope", apply_rope))
        yield


def keep_in(found: dict[str, Tensor], prefix: str, head_dim: int) -> See:
    """Records every tap under its whole name, (B, T, ...) each."""

    def keep(tap: str, value: Tensor) -> None:
        found[prefix + tap] = value.unflatten(-1, (-1, head_dim)) if tap in WITH_HEADS else value

    return keep


def put_from(given: dict[str, Tensor]) -> See:
    """Puts the given taps, by the last part of their names, in the place of what the block computed.

    So only what follows from them is the block's own, and a slip in how it wires its operations is seen where it is.
    """
    by_tap = {name.rsplit(".", 1)[-1]: value for name, value in given.items()}
    return lambda tap, _value: by_tap.get(tap)


def taps_of(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Every tap but the logits of tokens (B, T); linear layers may be of any kind."""
    ctx, h = model.context(tokens), model.tok_embeddings(tokens)
    found = {"embed": h}
    for i, layer in enumerate(model.layers):
        with at_taps(layer, keep_in(found, f"layers.{i}.", model.config.head_dim)):
            h = layer(h, ctx)
    found["final_norm"] = model.norm(h)
    return found
