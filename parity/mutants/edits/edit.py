"""How a mutant is made: nanollama loads as always, then one small edit is put into what it loaded.

    load = edited(lambda nano: override(nano.model.norm, "forward", lambda x: x))     # final norm skipped
    candidate = load("/tmp/tiny", torch.float32, "cpu")

An edited candidate has the whole interface of nanollama's own, so every check looks at it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import nanollama.model as model_module
from nanollama.model import ModelConfig
from parity.candidates.nano.model import Nano

Load = Callable[[str, torch.dtype, str], Any]
Edit = Callable[[Nano], None]


def override(owner: Any, name: str, value: Any) -> None:
    """Replace a method or attribute of one object alone."""
    setattr(owner, name, value)


def edited(edit: Edit, attention: str = "exact") -> Load:
    """A loader of nanollama with one edit."""

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
        nano = Nano(checkpoint, dtype, device, attention)
        edit(nano)
        return nano

    return load


class Patched:
    """A candidate that runs with some of nanollama.model's functions replaced, and nobody else does."""

    def __init__(self, inner: Nano, functions: dict[str, Callable[..., Any]]) -> None:
        self.inner, self.functions = inner, functions

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, function in self.functions.items():
                stack.enter_context(patch.object(model_module, name, function))
            yield

    def __call__(self, tokens: Tensor) -> Tensor:
        with self.active():
            return self.inner(tokens)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value

        def run(*args: Any) -> Any:
            with self.active():
                return value(*args)

        return run


def patched(functions: dict[str, Callable[..., Any]], edit: Edit = lambda nano: None) -> Load:
    """A loader of nanollama's exact path with some of model.py's functions replaced."""

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Patched:
        return Patched(edited(edit)(checkpoint, dtype, device), functions)

    return load


def linears(nano: Nano) -> Iterator[nn.Linear]:
    yield from (module for module in nano.model.modules() if isinstance(module, nn.Linear))


def norms(nano: Nano) -> Iterator[model_module.RMSNorm]:
    yield from (module for module in nano.model.modules() if isinstance(module, model_module.RMSNorm))


def with_table(table: Callable[[ModelConfig, Tensor], tuple[Tensor, Tensor]]) -> Edit:
    """Another RoPE table: table(config, positions (N,)) -> cos, sin (N, D/2)."""

    def edit(nano: Nano) -> None:
        rows = cache(lambda n: table(nano.cfg, torch.arange(n)))
        override(nano, "rope", lambda positions: table(nano.cfg, positions))
        override(nano.model, "_rope_rows", lambda n, device: rows(n))

    return edit


def with_attention(attend: Callable[..., Tensor]) -> Edit:
    """Another attention: attend(q (B, T, H, D), k, v (B, S, K, D), mask) -> (B, T, H, D)."""

    def edit(nano: Nano) -> None:
        for block in nano.model.layers:
            override(block.attention, "attend", attend)

    return edit


def with_config(config: Callable[[ModelConfig], ModelConfig]) -> Load:
    """The whole model built from another configuration, which the candidate also reports."""

    class Reconfigured(Nano):
        def _whole(self) -> Any:
            self.cfg = config(self.cfg)
            return super()._whole()

    return lambda checkpoint, dtype, device: Reconfigured(checkpoint, dtype, device, "exact")
