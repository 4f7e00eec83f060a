"""More ways to get a Llama wrong, as bug reports tell them, each planted in the port of held_out.py.

    python -m parity.check --candidate tests/ports/held_out_wrong.py:eps_outside

What each breaks first and by which words its cause may be named stand in WRONG.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ports.held_out import Port, Wrong, has_scaling, is_square, loader
from ports.held_out_right import Cached, Packed

Method = Callable[..., Any]


def port(base: type[Port] = Port, **methods: Method) -> type[Port]:
    """A port with other methods."""
    return type("Planted", (base,), methods)


# --- Norms, embedding, residuals -------------------------------------------------------------------------------------


def eps_outside(self: Port, x: Tensor, name: str) -> Tensor:
    return (x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + self.eps(name))).to(x.dtype) * self.w[name]


def norm_in_bf16(self: Port, x: Tensor, name: str) -> Tensor:
    return Port.norm(self, x.bfloat16().float(), name).bfloat16().to(x.dtype)


def weight_plus_one(self: Port, x: Tensor, name: str) -> Tensor:
    bare = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps(name))
    return bare.to(x.dtype) * (1 + self.w[name])


def last_norm_skipped(self: Port, x: Tensor, name: str) -> Tensor:
    return x if name == f"layers.{self.last}.ffn_norm" else Port.norm(self, x, name)


def other_eps_in_ffn(self: Port, name: str) -> float:
    return 1e-6 if "ffn_norm" in name else self.cfg.norm_eps


def bos_is_zero(self: Port, tokens: Tensor) -> Tensor:
    first = torch.arange(tokens.shape[1])[:, None] == 0
    return Port.embed(self, tokens).masked_fill(first, 0)


def scaled_embedding(self: Port, tokens: Tensor) -> Tensor:
    return Port.embed(self, tokens) * math.sqrt(self.cfg.dim)


def residual_in_half(self: Port, x: Tensor, i: int, taps: dict[str, Tensor]) -> Tensor:
    taps[f"layers.{i}.out"] = out = Port.block(self, x, i, taps).half().to(x.dtype)
    return out


def last_layer_twice(self: Port, x: Tensor, i: int, taps: dict[str, Tensor]) -> Tensor:
    x = Port.block(self, x, i, taps)
    return Port.block(self, x, i, taps) if i == self.last else x


# --- RoPE ------------------------------------------------------------------------------------------------------------


def table_through(dtype: torch.dtype) -> Method:
    def table(self: Port, length: int) -> tuple[Tensor, Tensor]:
        cos, sin = Port.table(self, length)
        return cos.to(dtype).float(), sin.to(dtype).float()

    return table


def swapped_bands(self: Port, f: Tensor) -> Tensor:
    s = self.cfg.rope_scaling
    if s is None:
        return f
    turns = s.original_context * f / (2 * math.pi)
    share = ((turns - s.high_freq_factor) / (s.low_freq_factor - s.high_freq_factor)).clamp(0, 1)
    return share * f + (1 - share) * f / s.factor


def unsmoothed(self: Port, share: Tensor) -> Tensor:
    return (share >= 1).to(share.dtype)


def half_the_exponent(self: Port) -> Tensor:
    half = torch.arange(self.cfg.head_dim // 2).float() / self.cfg.head_dim
    return self.scaled(1.0 / self.cfg.rope_theta**half)


def over_halves(self: Port, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in self.table(x.shape[1]))
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def turned_back(self: Port, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in self.table(x.shape[1]))
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2).to(x.dtype)


def wrapped_positions(self: Port, length: int) -> Tensor:
    return torch.arange(length) % 32


def base_without_config(self: Port) -> Tensor:
    half = torch.arange(0, self.cfg.head_dim, 2).float() / self.cfg.head_dim
    return self.scaled(1.0 / (10_000.0 if self.cfg.rope_theta != 10_000.0 else 500_000.0) ** half)


def decode_ahead(self: Cached, length: int) -> Tensor:
    return Cached.positions(self, length) + (1 if self.before() else 0)


# --- Attention -------------------------------------------------------------------------------------------------------


def scaled_by(scale: Callable[[Port], float]) -> Method:
    """Another scale of the scores."""

    def attend(self: Port, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return Port.attend(self, q * (scale(self) * math.sqrt(self.cfg.head_dim)), k, v, layer)

    return attend


def seen_by(see: Callable[[Tensor, Tensor], Tensor]) -> Method:
    """see(t (T, 1), s (T,)): another mask."""
    return lambda self, length, layer: see(torch.arange(length)[:, None], torch.arange(length))


def window(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, s: (s <= t) & (t - s < size)


def tiled(self: Port) -> Tensor:
    return torch.arange(self.cfg.n_heads) % self.cfg.n_kv_heads


def half_softmax(self: Port, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    k, v = k[:, :, self.groups()], v[:, :, self.groups()]
    scores = (torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.cfg.head_dim)).half()
    weights = scores.masked_fill(~self.seen(q.shape[1], layer), -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def capped(self: Port, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    k, v = k[:, :, self.groups()], v[:, :, self.groups()]
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() / math.sqrt(self.cfg.head_dim)
    scores = (50 * (scores / 50).tanh()).masked_fill(~self.seen(q.shape[1], layer), -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v)


def through_cache(change: Callable[[Tensor], Tensor]) -> Method:
    return lambda self, q, k, v, layer: Port.attend(self, q, change(k), change(v), layer)


def padding_seen(self: Port, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """One more key of zeros, which every token sees."""
    k, v = (torch.cat((torch.zeros_like(x[:, :1]), x), 1)[:, :, self.groups()] for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() / math.sqrt(self.cfg.head_dim)
    seen = F.pad(self.seen(q.shape[1], layer), (1, 0), value=True)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype), v)


def first_rows_keys(self: Port, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    return Port.attend(self, q, k[:1].expand_as(k), v, layer)


# --- Caches and documents --------------------------------------------------------------------------------------------


def overwritten_edge(self: Cached, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The first of a chunk takes the slot of the last one before it."""
    keys, values = Cached.keep(self, k, v, layer)
    if self.start:
        keys, values = keys.clone(), values.clone()
        keys[:, self.start - 1], values[:, self.start - 1] = keys[:, self.start], values[:, self.start]
    return keys, values


def stale(self: Cached, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys of the first text stay in its slots; values are new."""
    keys, values = Cached.keep(self, k, v, layer)
    old = self.__dict__.setdefault("old", {}).setdefault(layer, keys)
    n = min(old.shape[1], keys.shape[1], 5)
    return torch.cat((old[:, :n], keys[:, n:]), 1), values


def window_of_cache(self: Cached, length: int, layer: int) -> Tensor:
    at = torch.arange(self.before() + length)
    t = at[self.before() :, None]
    return (at <= t) & ((t - at < 24) | (self.before() == 0))


def top_left(self: Cached, length: int, layer: int) -> Tensor:
    found = Cached.seen(self, length, layer)
    return torch.ones_like(found).tril() if length > 1 else found


def leaking(self: Packed, length: int, layer: int) -> Tensor:
    return Cached.seen(self, length, layer)


# --- Weights ---------------------------------------------------------------------------------------------------------


def linear_of(rename: Callable[[Port, str], str]) -> Method:
    return lambda self, x, name: Port.linear(self, x, rename(self, name))


def transposed_wo(self: Port, x: Tensor, name: str) -> Tensor:
    return F.linear(x, self.w[name].t()) if name == "layers.0.attention.wo" else Port.linear(self, x, name)


def capped_logits(self: Port, x: Tensor, name: str) -> Tensor:
    out = Port.linear(self, x, name)
    return 30 * (out / 30).tanh() if name == "output" else out


def short_vocabulary(self: Port, x: Tensor, name: str) -> Tensor:
    out = Port.linear(self, x, name)
    return torch.cat((out[..., :-16], torch.zeros_like(out[..., -16:])), -1) if name == "output" else out


def int8_down(self: Port, x: Tensor, name: str) -> Tensor:
    w = self.w[name]
    if not name.endswith("w2"):
        return Port.linear(self, x, name)
    step = w.abs().amax(-1, keepdim=True) / 127
    return F.linear(x, (w / step).round() * step)


def half_ffn(self: Port, gate: Tensor) -> Tensor:
    return F.silu(gate).half().to(gate.dtype)


def grouped(cfg: Any) -> bool:
    return 1 < cfg.n_kv_heads < cfg.n_heads


def swapped_last(self: Port, name: str) -> str:
    pair = {
        f"layers.{self.last}.feed_forward.{a}": f"layers.{self.last}.feed_forward.{b}"
        for a, b in (("w1", "w3"), ("w3", "w1"))
    }
    return pair.get(name, name)


MASK = "mask"
WRONG = {
    "eps_outside": Wrong(port(norm=eps_outside), "layers.0.attn_norm", ("eps outside",)),
    "norm_in_bf16": Wrong(port(norm=norm_in_bf16), "layers.0.attn_norm", ("computed in bf16", "bf16")),
    "weight_plus_one": Wrong(port(norm=weight_plus_one), "layers.0.attn_norm", ("add 1", "adds 1")),
    "last_norm_skipped": Wrong(port(norm=last_norm_skipped), "layers.{last}.ffn_norm", ("skipped", "not applied")),
    "other_eps_in_ffn": Wrong(port(eps=other_eps_in_ffn), "layers.0.ffn_norm", ("eps",)),
    "bos_is_special": Wrong(port(embed=bos_is_zero), "embed", ("position 0", "first token", "BOS")),
    "scaled_embedding": Wrong(port(embed=scaled_embedding), "embed", ("sqrt(dim)",)),
    "residual_in_half": Wrong(port(block=residual_in_half), "layers.0.out", ("fp16", "float16")),
    "last_layer_twice": Wrong(port(block=last_layer_twice), "layers.{last}.attn_norm", ("runs twice",)),
    "bf16_table": Wrong(port(table=table_through(torch.bfloat16)), "layers.0.q_rope", ("bf16", "low precision")),
    "fp16_table": Wrong(port(table=table_through(torch.float16)), "layers.0.q_rope", ("fp16", "low precision")),
    "swapped_bands": Wrong(port(scaled=swapped_bands), "layers.0.q_rope", ("factor", "scaling"), has_scaling),
    "unsmoothed": Wrong(port(blend=unsmoothed), "layers.0.q_rope", ("blend", "freq_factor", "smooth"), has_scaling),
    "half_the_exponent": Wrong(port(frequencies=half_the_exponent), "layers.0.q_rope", ("exponent", "base")),
    "over_halves": Wrong(port(rotate=over_halves), "layers.0.q_rope", ("i + D/2", "halves", "half-split")),
    "turned_back": Wrong(port(rotate=turned_back), "layers.0.q_rope", ("direction",)),
    "wrapped_positions": Wrong(port(positions=wrapped_positions), "layers.0.q_rope", ("position",)),
    "base_without_config": Wrong(port(frequencies=base_without_config), "layers.0.q_rope", ("RoPE base",)),
    "scaled_by_dim": Wrong(port(attend=scaled_by(lambda p: p.cfg.dim**-0.5)), "layers.0.attn_mix", ("sqrt(dim)",)),
    "scaled_twice": Wrong(port(attend=scaled_by(lambda p: 1 / p.cfg.head_dim)), "layers.0.attn_mix", ("head_dim",)),
    "window": Wrong(port(seen=seen_by(window(32))), "layers.0.attn_mix", ("window of 32",)),
    "window_off_by_one": Wrong(port(seen=seen_by(window(33))), "layers.0.attn_mix", ("window",)),
    "sees_next": Wrong(port(seen=seen_by(lambda t, s: s <= t + 1)), "layers.0.attn_mix", (MASK,)),
    "not_itself": Wrong(
        port(seen=seen_by(lambda t, s: (s < t) | ((s == 0) & (t == 0)))), "layers.0.attn_mix", ("itself",)
    ),
    "no_mask": Wrong(port(seen=seen_by(lambda t, s: s >= 0 * t)), "layers.0.attn_mix", (MASK,)),
    "tiled_heads": Wrong(port(groups=tiled), "layers.0.attn_mix", ("h % K", "heads"), grouped),
    "half_softmax": Wrong(port(attend=half_softmax), "layers.0.attn_mix", ("fp16", "float16")),
    "capped_scores": Wrong(port(attend=capped), "layers.0.attn_mix", ("capped at 50",)),
    "cache_in_fp8": Wrong(
        port(attend=through_cache(lambda x: x.to(torch.float8_e4m3fn).to(x.dtype))), "layers.0.attn_mix", ("fp8",)
    ),
    "cache_in_bf16": Wrong(
        port(attend=through_cache(lambda x: x.bfloat16().to(x.dtype))), "layers.0.attn_mix", ("bf16",)
    ),
    "padding_seen": Wrong(port(attend=padding_seen), "layers.0.attn_mix", ("sink",)),
    "batch_rows_mixed": Wrong(port(attend=first_rows_keys), "logits@batch", ("other rows",)),
    "decode_ahead": Wrong(port(Cached, positions=decode_ahead), "logits@cached", ("position", "slots")),
    "overwritten_edge": Wrong(port(Cached, keep=overwritten_edge), "logits@cached", ("cache", "slots")),
    "stale_cache": Wrong(port(Cached, keep=stale), "logits@cached", ("cache", "slots")),
    "window_of_cache": Wrong(port(Cached, seen=window_of_cache), "logits@cached", ("cache", "slots", "window")),
    "top_left_mask": Wrong(port(Cached, seen=top_left), "logits@chunked", (MASK,)),
    "documents_leak": Wrong(port(Packed, seen=leaking), "logits@packed", ("document mask",)),
    "gelu_tanh": Wrong(
        port(activate=lambda self, gate: F.gelu(gate, approximate="tanh")), "layers.0.ffn_mix", ("GELU",)
    ),
    "half_ffn": Wrong(port(activate=half_ffn), "layers.0.ffn_mix", ("fp16", "float16")),
    "last_gate_and_up": Wrong(port(linear=linear_of(swapped_last)), "layers.{last}.gate", ("gate and up",)),
    "one_layers_values": Wrong(
        port(linear=linear_of(lambda p, n: n.replace("layers.1.", "layers.0.") if n.endswith("wv") else n)),
        "layers.1.v", ("layer 0", "another layer"),
    ),
    "transposed_wo": Wrong(
        port(linear=transposed_wo), "layers.0.attn_out", ("transposed",), is_square
    ),
    "int8_down": Wrong(port(linear=int8_down), "layers.0.ffn_out", ("int8",)),
    "head_is_embedding": Wrong(
        port(linear=linear_of(lambda p, n: "tok_embeddings" if n == "output" else n)), "logits",
        ("embedding",), lambda c: not c.tied,
    ),
    "capped_logits": Wrong(port(linear=capped_logits), "logits", ("cap", "tanh")),
    "short_vocabulary": Wrong(port(linear=short_vocabulary), "logits", ("vocabulary", "tail", "zero", "all 0")),
}  # fmt: skip
globals().update({name: loader(wrong.kind) for name, wrong in WRONG.items()})
