"""Taps of any module, by hooks on what holds its weights: a linear layer's output and input, a norm's, a block's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parity.candidates.module.matching import FUSED, Choice, Layout
from parity.candidates.nano.opening import ModelConfig

OUTPUTS = {"attention.wq": "q", "attention.wk": "k", "attention.wv": "v", "attention.wo": "attn_out"}
OUTPUTS |= {"feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "ffn_out"}
OUTPUTS |= {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
INPUTS = {"attention.wo": "attn_mix", "feed_forward.w2": "ffn_mix"}
View = Callable[[Tensor], dict[str, Tensor]]


class Hooks:
    """Records the taps of one pass, whose layers may be called once or for each token."""

    def __init__(self, model: nn.Module, layout: Layout, choice: Choice, config: ModelConfig) -> None:
        self.model, self.choice, self.config = model, choice, config
        self.found: dict[str, list[Tensor]] = {}
        outer = dict(layout.outer)
        self.places: list[tuple[str, View | None, View | None]] = []  # module, of its output, of its input
        for name, weight in outer.items():
            tap = {"tok_embeddings": "embed", "norm": "final_norm"}.get(weight)
            if tap is not None:
                self._add(name, self._named(tap))
        for layer in range(config.n_layers):
            prefix = layout.block.format(layer)
            for name, weight in choice.blocks:
                self._add(prefix + name, self._outputs(layer, weight), self._inputs(layer, weight))
            self.places.append((prefix.rstrip("."), self._named(f"layers.{layer}.out"), None))

    def _add(self, parameter: str, output: View, given: View | None = None) -> None:
        """Of a module that holds this parameter and nothing else: what it returns is the weight's own work."""
        owner = parameter.rpartition(".")[0]
        module = self.model.get_submodule(owner)
        if owner and not list(module.children()) and len(list(module.parameters())) == 1:
            self.places.append((owner, output, given))

    def _named(self, tap: str) -> View:
        return lambda x: {tap: x}

    def _outputs(self, layer: int, weight: str) -> View:
        names = [f"layers.{layer}.{OUTPUTS[part]}" for part in FUSED.get(weight, (weight,))]
        if weight == "qkv":
            return lambda x: dict(zip(names, self._split(x), strict=True))
        if weight == "gate_up":
            return lambda x: dict(zip(names, x.chunk(2, -1)[:: -1 if self.choice.swapped else 1], strict=True))
        if weight in ("attention.wq", "attention.wk", "attention.wv"):
            return lambda x: {names[0]: self._heads(x, weight != "attention.wv")}
        return self._named(names[0])

    def _inputs(self, layer: int, weight: str) -> View | None:
        return self._named(f"layers.{layer}.{INPUTS[weight]}") if weight in INPUTS else None

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, K, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        if self.choice.grouped:
            q, k, v = x.unflatten(-1, (K, -1)).split((H // K * D, D, D), -1)
            q, k, v = (part.flatten(-2) for part in (q, k, v))
        else:
            q, k, v = x.split((H * D, K * D, K * D), -1)
        return self._heads(q, True), self._heads(k, True), self._heads(v, False)

    def _heads(self, x: Tensor, rotated: bool) -> Tensor:
        """(B, T, heads, D), q and k in Meta's order."""
        x = x.unflatten(-1, (-1, self.config.head_dim))
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if rotated and self.choice.half else x

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.found = {}
        handles = []
        for owner, output, given in self.places:
            module = self.model.get_submodule(owner)
            if output is not None:
                handles.append(module.register_forward_hook(lambda _m, _a, out, view=output: self._keep(view, out)))
            if given is not None:
                handles.append(module.register_forward_pre_hook(lambda _m, args, view=given: self._keep(view, args)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, view: View, value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(value, Tensor) and value.dim() == 3:
            for name, x in view(value.detach()).items():
                self.found.setdefault(name, []).append(x)

    def taps(self, length: int) -> dict[str, Tensor]:
        """(1, length, ...) each; what came in other lengths is no tap."""
        joined = {name: torch.cat(parts, 1) for name, parts in self.found.items()}
        return {name: x for name, x in joined.items() if tuple(x.shape[:2]) == (1, length)}
