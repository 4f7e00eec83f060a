"""A Llama written once more to try the harness: right in ways, and wrong in ways, that its authors did not plan.

    python -m parity.check --candidate tests/ports/held_out.py:blocked_softmax       # passes
    python -m parity.check --candidate tests/ports/held_out.py:hot                   # fails

Every step of the forward pass is a method, a variant replaces one. nanollama's reader opens the checkpoint.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama.checkpoint import open_checkpoint

BLOCK = 24  # keys of a blocked softmax


class Port:
    """tokens (B, T) -> logits (B, T, V), with taps. Rounds where Meta's code does."""

    def __init__(self, checkpoint: str, dtype: torch.dtype) -> None:
        opened = open_checkpoint(checkpoint)
        self.cfg, self.dtype = opened.config, dtype
        self.w = {name.removesuffix(".weight"): opened.weights[name].to(dtype) for name in opened.weights}
        self.w.setdefault("output", self.w["tok_embeddings"])
        self.last = self.cfg.n_layers - 1

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.run(tokens)["logits"]

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        return self.run(tokens)

    def run(self, tokens: Tensor) -> dict[str, Tensor]:
        taps = {"embed": self.embed(tokens)}
        x = taps["embed"]
        for i in range(self.cfg.n_layers):
            x = self.block(x, i, taps)
        taps["final_norm"] = self.norm(x, "norm")
        taps["logits"] = self.linear(taps["final_norm"], "output")
        return taps

    def block(self, x: Tensor, i: int, taps: dict[str, Tensor]) -> Tensor:
        def note(name: str, value: Tensor) -> Tensor:
            taps[f"layers.{i}.{name}"] = value
            return value

        at = f"layers.{i}"
        h = note("attn_norm", self.norm(x, f"{at}.attention_norm"))
        q, k, v = (note(n, self.heads(self.linear(h, f"{at}.attention.w{n}"))) for n in "qkv")  # (B, T, heads, D)
        q, k = note("q_rope", self.rotate(q)), note("k_rope", self.rotate(k))
        mix = note("attn_mix", self.attend(q, k, v, i).flatten(2))
        middle = x + note("attn_out", self.linear(mix, f"{at}.attention.wo"))
        h = note("ffn_norm", self.norm(middle, f"{at}.ffn_norm"))
        gate, up = (note(n, self.linear(h, f"{at}.feed_forward.{w}")) for n, w in (("gate", "w1"), ("up", "w3")))
        ffn_mix = note("ffn_mix", self.activate(gate) * up)
        return note("out", middle + note("ffn_out", self.linear(ffn_mix, f"{at}.feed_forward.w2")))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.w["tok_embeddings"][tokens]

    def norm(self, x: Tensor, name: str) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps(name))
        return (x32 * scale).to(self.dtype) * self.w[name]

    def eps(self, name: str) -> float:
        return self.cfg.norm_eps

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[name])

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.cfg.head_dim))

    def frequencies(self) -> Tensor:
        half = torch.arange(0, self.cfg.head_dim, 2).float() / self.cfg.head_dim
        return self.scaled(1.0 / self.cfg.rope_theta**half)

    def scaled(self, f: Tensor) -> Tensor:
        s = self.cfg.rope_scaling
        if s is None:
            return f
        turns = s.original_context * f / (2 * math.pi)
        kept = self.blend((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor))
        return kept * f + (1 - kept) * (f / s.factor)

    def blend(self, share: Tensor) -> Tensor:
        return share.clamp(0, 1)

    def positions(self, length: int) -> Tensor:
        return torch.arange(length)

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin: (T, D/2)."""
        angles = torch.outer(self.positions(length).float(), self.frequencies())
        return angles.cos(), angles.sin()

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = (t[:, None].float() for t in self.table(x.shape[1]))
        a, b = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)

    def seen(self, length: int, layer: int) -> Tensor:
        """(T, S): whether position t sees position s."""
        return torch.ones(length, length, dtype=torch.bool).tril()

    def groups(self) -> Tensor:
        """The kv head of each query head, (H,)."""
        return torch.arange(self.cfg.n_heads) // (self.cfg.n_heads // self.cfg.n_kv_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """(B, T, H, D)."""
        k, v = k[:, :, self.groups()], v[:, :, self.groups()]
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.cfg.head_dim)
        scores = scores.float().masked_fill(~self.seen(q.shape[1], layer), -math.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v)

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


# --- Right -----------------------------------------------------------------------------------------------------------


class Float64Angles(Port):
    def frequencies(self) -> Tensor:
        half = torch.arange(0, self.cfg.head_dim, 2).double() / self.cfg.head_dim
        return self.scaled(self.cfg.rope_theta**-half)

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length).double(), self.frequencies())
        return angles.cos().float(), angles.sin().float()


class CoarsePow(Port):
    """theta^(-x) in two pieces, each rounded, as a table of whole powers and a remainder gives it."""

    def frequencies(self) -> Tensor:
        half = torch.arange(0, self.cfg.head_dim, 2).float() / self.cfg.head_dim
        root = torch.tensor(self.cfg.rope_theta).sqrt()
        return self.scaled(1.0 / (root**half * root**half))


class RepeatedProducts(Port):
    def frequencies(self) -> Tensor:
        step = torch.tensor(self.cfg.rope_theta ** (-2.0 / self.cfg.head_dim))
        found = [torch.tensor(1.0)]
        while len(found) < self.cfg.head_dim // 2:
            found.append(found[-1] * step)
        return self.scaled(torch.stack(found))


class SplitSums(Port):
    """Three uneven parts of the inner dimension, the last one first."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        w, width = self.w[name], x.shape[-1]
        cuts = [0, width // 5, width // 2, width]
        parts = [F.linear(x[..., a:b].float(), w[:, a:b].float()) for a, b in pairwise(cuts)]
        return (parts[2] + parts[1] + parts[0]).to(x.dtype)


class FusedQkv(Port):
    """One product for q, k and v, another for gate and up."""

    def __init__(self, checkpoint: str, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, dtype)
        self.ready: dict[str, Tensor] = {}

    def linear(self, x: Tensor, name: str) -> Tensor:
        head, _, last = name.rpartition(".")
        parts = {"wq": ("wq", "wk", "wv"), "w1": ("w1", "w3")}.get(last)
        if parts:
            weights = [self.w[f"{head}.{part}"] for part in parts]
            out = F.linear(x, torch.cat(weights)).split([len(w) for w in weights], -1)
            self.ready = {f"{head}.{part}": y for part, y in zip(parts, out, strict=True)}
        return self.ready.pop(name) if name in self.ready else super().linear(x, name)


class BlockedSoftmax(Port):
    """Blocks of keys with a running maximum and sum, as flash attention; one kv head for its group of queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        length = q.shape[1]
        queries = q.unflatten(2, (self.cfg.n_kv_heads, -1)).float()  # (B, T, K, G, D)
        top = torch.full(queries.shape[:-1], -math.inf)
        total, out = torch.zeros_like(top), torch.zeros_like(queries)
        for start in range(0, length, BLOCK):
            keys, values = (x[:, start : start + BLOCK].float() for x in (k, v))
            scores = torch.einsum("btkgd,bskd->btkgs", queries, keys) * self.cfg.head_dim**-0.5
            hidden = ~self.seen(length, layer)[:, start : start + BLOCK]
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
            larger = torch.maximum(top, scores.amax(-1))
            shrink, weights = (top - larger).exp(), (scores - larger[..., None]).exp()
            total = total * shrink + weights.sum(-1)
            out = out * shrink[..., None] + torch.einsum("btkgs,bskd->btkgd", weights, values)
            top = larger
        return (out / total[..., None]).flatten(2, 3).to(q.dtype)


class WideResidual(Port):
    """The residual stream in float32, whatever the dtype."""

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens).float()


class WideActivations(Port):
    """Weights in the dtype, all else in float32."""

    def __init__(self, checkpoint: str, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, dtype)
        self.w = {name: w.float() for name, w in self.w.items()}
        self.dtype = torch.float32


class OtherOrder(Port):
    """Queries scaled before the product, softmax in float64, SiLU by its exponential, the norm by a division."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = k[:, :, self.groups()], v[:, :, self.groups()]
        scores = torch.einsum("bthd,bshd->bhts", q * self.cfg.head_dim**-0.5, k).double()
        weights = scores.masked_fill(~self.seen(q.shape[1], layer), -math.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)

    def activate(self, gate: Tensor) -> Tensor:
        return (gate.float() / (1 + (-gate.float()).exp())).to(gate.dtype)

    def norm(self, x: Tensor, name: str) -> Tensor:
        x32 = x.float()
        return (x32 / (x32.square().mean(-1, keepdim=True) + self.eps(name)).sqrt()).to(self.dtype) * self.w[name]


# --- Wrong -----------------------------------------------------------------------------------------------------------


class Hot(Port):
    """Scores 1% too large."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q * 1.01, k, v, layer)


class LastHead(Port):
    """The last query head reads the first kv head."""

    def groups(self) -> Tensor:
        found = super().groups()
        found[-1] = 0
        return found


class ForgetsFirst(Port):
    """From position 20 on, position 0 is out of sight."""

    def seen(self, length: int, layer: int) -> Tensor:
        found = super().seen(length, layer)
        found[20:, 0] = False
        return found


class LooksAhead(Port):
    """The last layer sees the next token."""

    def seen(self, length: int, layer: int) -> Tensor:
        found = super().seen(length, layer)
        return found | torch.ones_like(found).tril(1) if layer == self.last else found


class QuickGelu(Port):
    def activate(self, gate: Tensor) -> Tensor:
        return gate * torch.sigmoid(1.702 * gate)


class SwappedNorms(Port):
    """Layer 1's two norms have each other's weight."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        other = {"layers.1.attention_norm": "layers.1.ffn_norm", "layers.1.ffn_norm": "layers.1.attention_norm"}
        return super().norm(x, other.get(name, name))


class StuckPositions(Port):
    """No angle is larger than position 30's."""

    def positions(self, length: int) -> Tensor:
        return super().positions(length).clamp(max=30)


class HardBands(Port):
    """The scaling's two bands meet without a blend."""

    def blend(self, share: Tensor) -> Tensor:
        return (share > 0.5).to(share.dtype)


class TransposedOutput(Port):
    """The last layer's wo is transposed: it is square where heads fill the width."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        w = self.w[name]
        turned = name == f"layers.{self.last}.attention.wo" and w.shape[0] == w.shape[1]
        return F.linear(x, w.t()) if turned else super().linear(x, name)


class NoFinalEps(Port):
    def eps(self, name: str) -> float:
        return 0.0 if name == "norm" else super().eps(name)


class HalfLogits(Port):
    """Logits by way of float16."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = super().linear(x, name)
        return out.half().to(out.dtype) if name == "output" else out


def has_scaling(cfg: Any) -> bool:
    return cfg.rope_scaling is not None


def is_square(cfg: Any) -> bool:
    return cfg.n_heads * cfg.head_dim == cfg.dim


@dataclass(frozen=True)
class Wrong:
    """`tap`: the first that is wrong ({last}: the last layer). `words`: a cause that is told has one of them.
    `fits`: the configs that have something to get wrong there."""

    kind: type[Port]
    tap: str
    words: tuple[str, ...]
    fits: Callable[[Any], bool] = lambda cfg: True


def loader(kind: type[Port]) -> Callable[[str, torch.dtype, str], Any]:
    return lambda checkpoint, dtype, device: kind(checkpoint, dtype)


class Bare:
    """Of a port, its logits alone."""

    def __init__(self, port: Port) -> None:
        self.port = port

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.port(tokens)


def bare(load: Callable[[str, torch.dtype, str], Any]) -> Callable[[str, torch.dtype, str], Any]:
    return lambda checkpoint, dtype, device: Bare(load(checkpoint, dtype, device))


RIGHT = {
    "plain": Port, "float64_angles": Float64Angles, "coarse_pow": CoarsePow, "repeated_products": RepeatedProducts,
    "split_sums": SplitSums, "fused_qkv": FusedQkv, "blocked_softmax": BlockedSoftmax, "wide_residual": WideResidual,
    "wide_activations": WideActivations, "other_order": OtherOrder,
}  # fmt: skip
WRONG = {
    "hot": Wrong(Hot, "layers.0.attn_mix", ("1.01", "scale", "temperature")),
    "last_head": Wrong(LastHead, "layers.0.attn_mix", ("kv head", "heads")),
    "forgets_first": Wrong(ForgetsFirst, "layers.0.attn_mix", ("mask", "first one")),
    "looks_ahead": Wrong(LooksAhead, "layers.{last}.attn_mix", ("sees the next", "mask")),
    "quick_gelu": Wrong(QuickGelu, "layers.0.ffn_mix", ("quick GELU",)),
    "swapped_norms": Wrong(SwappedNorms, "layers.1.attn_norm", ("exchanged", "weight")),
    "stuck_positions": Wrong(StuckPositions, "layers.0.q_rope", ("position",)),
    "hard_bands": Wrong(HardBands, "layers.0.q_rope", ("blend", "freq_factor", "smooth"), has_scaling),
    "transposed_output": Wrong(TransposedOutput, "layers.{last}.attn_out", ("transposed",), is_square),
    "no_final_eps": Wrong(NoFinalEps, "final_norm", ("eps",)),
    "half_logits": Wrong(HalfLogits, "logits", ("fp16", "float16")),
}
globals().update({name: loader(kind) for name, kind in RIGHT.items()})
globals().update({name: loader(wrong.kind) for name, wrong in WRONG.items()})
