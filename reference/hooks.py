"""What both references are recorded with: hooks on their modules, a stand-in for their layers, their embedding by row.

A reference says which of its modules computes which tap of a block; q_rope and k_rope leave no module, so each wraps
the function that rotates them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

INPUTS = {"attn_out": "attn_mix", "ffn_out": "ffn_mix"}  # tap -> the tap that its module is given


@dataclass
class Recorder:
    """Where hooks send what they see; they see nothing while no sink is set."""

    sink: Callable[[str, Tensor], None] | None = None
    layer: int = 0  # of the block that is running

    def __call__(self, name: str, value: Tensor) -> None:
        if self.sink is not None:
            self.sink(name, value)


@dataclass
class Stream:
    """One sequence on its way through the layers, with the arguments that the implementation hands its blocks."""

    hidden: Tensor  # (1, T, dim)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Capture(nn.Module):
    """Stands for the layers and keeps what the model hands to them."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = Stream(hidden, args, kwargs)
        return hidden


class Rows(nn.Module):
    """The embedding, read row by row from the file."""

    def __init__(self, read: Callable[[Tensor], Tensor]):
        super().__init__()
        self.read = read

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(tokens)


def hook_block(
    block: nn.Module,
    layer: int,
    recorder: Recorder,
    modules: dict[str, str],
    arranged: Callable[[str, Tensor], Tensor] = lambda tap, value: value,
) -> None:
    """Record the taps of a block. modules: tap -> the module that computes it; arranged: its value in Meta's order."""

    def enter(*_: Any) -> None:
        recorder.layer = layer

    block.register_forward_pre_hook(enter)
    for tap, module in modules.items():
        hook(block.get_submodule(module), f"layers.{layer}.", tap, recorder, arranged)


def hook(
    module: nn.Module,
    prefix: str,
    tap: str,
    recorder: Recorder,
    arranged: Callable[[str, Tensor], Tensor] = lambda tap, value: value,
) -> None:
    """Record a module's output, and its input where that is a tap, too."""

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if recorder.sink is None:
            return
        if given := INPUTS.get(tap):
            recorder(prefix + given, inputs[0])
        recorder(prefix + tap, arranged(tap, output))

    module.register_forward_hook(record)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block: how a reference is recorded, or corrected, while it runs."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
