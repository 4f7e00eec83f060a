"""How a module is asked for logits (B, T, V): what its forward is called, takes besides tokens, and returns.

Tried in turn on three tokens: the tokens alone, with arguments of the usual names (start_pos 0, input_pos 0..T-1); with
targets, where it gives the last position alone without them; and a token at a time, where a cache is all that it has.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parity.contract import UsageError

STARTS = ("start_pos", "start", "cur_pos", "pos", "offset", "past_length", "start_position")
AT = ("input_pos", "positions", "position_ids", "pos_ids", "cache_position")
TARGETS = ("targets", "target", "labels", "y")
Ask = Callable[[Tensor], Tensor]


def forward_of(model: nn.Module) -> Callable[..., Any]:
    """The module itself or, where it has no forward, its own method of such a name that needs no targets."""
    if type(model).forward is not nn.Module.forward:
        return model
    names = [n for n in dir(type(model)) if n.startswith("forward_") and not hasattr(nn.Module, n)]
    for name in names:
        parameters = list(inspect.signature(getattr(model, name)).parameters.values())
        if not any(p.name in TARGETS and p.default is p.empty for p in parameters):
            return getattr(model, name)
    raise UsageError(f"torch: {type(model).__name__} has no forward(tokens)")


@dataclass
class Caller:
    """Calls a module in one of the ways; `said` is a remark on it. positions: what its caches are made for."""

    model: nn.Module
    vocab_size: int
    positions: int
    way: str = "whole"
    rows: int = 0  # of the caches that were set up last

    WAYS = ("whole", "targets", "token by token")

    def __post_init__(self) -> None:
        self.forward = forward_of(self.model)
        function = self.forward.forward if isinstance(self.forward, nn.Module) else self.forward
        self.takes = list(inspect.signature(function).parameters.values())[1:]

    def settle(self, tokens: Tensor) -> None:
        """Find the way that gives logits of every token. Raises what the plainest way raises where none does."""
        first: Exception | None = None
        for way in self.WAYS:
            self.way = way
            try:
                self(tokens)
                return
            except Exception as error:
                first = first or error
        self.way = self.WAYS[0]
        assert first is not None
        raise first

    @property
    def said(self) -> str | None:
        return {
            "whole": None,
            "targets": "it gives the last position alone unless it has targets: it is given some",
        }.get(self.way, "it is asked token by token, since it does not take several")

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V). Raises ValueError for an answer of another shape."""
        self._set_up(tokens)
        if self.way == "token by token":
            steps = range(tokens.shape[1])
            return torch.cat([self._logits(tokens[:, i : i + 1], i) for i in steps], 1)
        return self._logits(tokens, 0)

    def _logits(self, tokens: Tensor, start: int) -> Tensor:
        out = self.forward(tokens, **self._more(tokens, start))
        out = getattr(out, "logits", out)
        parts = out if isinstance(out, tuple | list) else (out,)
        shape = (*tokens.shape, self.vocab_size)
        for part in parts:
            if isinstance(part, Tensor) and part.shape == shape:
                return part
        got = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        raise ValueError(f"{type(self.model).__name__} returned {got}: expected logits {shape}")

    def _more(self, tokens: Tensor, start: int) -> dict[str, Any]:
        cached = hasattr(self.model, "setup_caches")
        at = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        more: dict[str, Any] = {}
        for parameter in self.takes:
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if parameter.name in STARTS and (needed or self.way == "token by token"):
                more[parameter.name] = start
            elif parameter.name in AT and (needed or cached or self.way == "token by token"):
                more[parameter.name] = at
            elif parameter.name in TARGETS and (needed or self.way == "targets"):
                more[parameter.name] = tokens
            elif needed:
                raise UsageError(f"torch: forward takes {parameter.name}, whose meaning is not known; write a load()")
        return more

    def _set_up(self, tokens: Tensor) -> None:
        """Caches for as many rows, where the module wants them made."""
        if not hasattr(self.model, "setup_caches") or self.rows == len(tokens):
            return
        for name in ("max_batch_size", "max_seq_length"):  # made anew for what it thinks that it has
            if isinstance(getattr(self.model, name, None), int):
                setattr(self.model, name, -1)
        with torch.device(tokens.device):
            self.model.setup_caches(len(tokens), self.positions)  # type: ignore[operator]
        self.rows = len(tokens)
