"""Mistakes planted in nanollama, each of which a table in reference/ has to name from numbers alone; and others."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanollama.model import exact_attention, rope_table
from nanollama.speed.quantize import load_quantized
from parity.mutants.edits import forward
from parity.mutants.edits.edit import Edit, linears, norms, override, with_attention, with_table


def masked(see: Callable[[Tensor, Tensor], Tensor]) -> Edit:
    """Another mask: see(t (T, 1), s (T,)) -> True where seen."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        at = torch.arange(q.shape[1])
        return exact_attention(q, k, v, see(at[:, None], at)[None])

    return with_attention(attend)


def through(change: Callable[[Tensor], Tensor], *, queries: bool = False) -> Edit:
    """Keys and values, and queries if asked, through another format."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return exact_attention(change(q) if queries else q, change(k), change(v), mask)

    return with_attention(attend)


def half_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Everything of attention in float16, the weights too; sums in float32."""
    n_rep = q.shape[2] // k.shape[2]
    q, k, v = (x.half().float().transpose(1, 2) for x in (q, *(x.repeat_interleave(n_rep, 2) for x in (k, v))))
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(
        ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -math.inf
    )
    return (scores.softmax(-1).half().float() @ v).transpose(1, 2)


def sunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One more key and value of zeros, seen by all."""
    T = q.shape[1]
    see = torch.cat((torch.ones(T, 1, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).tril()), 1)
    k, v = (torch.cat((torch.zeros_like(x[:, :1]), x), 1) for x in (k, v))
    return exact_attention(q, k, v, see[None])


def weights(change: Callable[[Tensor], Tensor], *, head: bool = True) -> Edit:
    def edit(nano: Any) -> None:
        for linear in linears(nano):
            if head or linear.weight.shape[0] != nano.cfg.vocab_size:
                linear.weight.data = change(linear.weight.data)

    return edit


def by_rows(x: Tensor, largest: int, group: int) -> Tensor:
    parts = x.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True) / largest
    return ((parts / scale).round() * scale).flatten(-2)


def inputs(change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(nano: Any) -> None:
        for linear in linears(nano):
            linear.register_forward_pre_hook(lambda module, given: (change(given[0]),))

    return edit


def integers(scheme: str) -> Edit:
    return lambda nano: override(nano, "model", load_quantized(nano.model.config, nano.model.state_dict(), scheme))


def logits(change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(nano: Any) -> None:
        forward = nano.model.forward
        override(nano.model, "forward", lambda *args, **kwargs: change(forward(*args, **kwargs)))

    return edit


def biased(name: str) -> Edit:
    def edit(nano: Any) -> None:
        for i, block in enumerate(nano.model.layers):
            linear = block.attention.get_submodule(name)
            noise = torch.randn(linear.weight.shape[0], generator=torch.Generator().manual_seed(i))
            linear.bias = torch.nn.Parameter(0.3 * noise)

    return edit


def noisy(name: str) -> Edit:
    """An error of no kind: noise in one weight of layer 1."""

    def edit(nano: Any) -> None:
        weight = nano.model.layers[1].get_submodule(name).weight.data
        weight += 2e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    return edit


def normed(eps: float) -> Edit:
    def edit(nano: Any) -> None:
        for norm in norms(nano):
            norm.eps = eps

    return edit


def gelu(nano: Any) -> None:
    for block in nano.model.layers:
        ffn = block.feed_forward
        override(ffn, "forward", lambda x, f=ffn: f.w2(torch.nn.functional.gelu(f.w1(x)) * f.w3(x)))


def scaled_embedding(nano: Any) -> None:
    table = nano.model.tok_embeddings
    override(table, "forward", lambda ids: torch.nn.functional.embedding(ids, table.weight) * nano.cfg.dim**0.5)


def swapped_layers(nano: Any) -> None:
    nano.model.layers = torch.nn.ModuleList(list(nano.model.layers)[::-1])


def half_split(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)  # head_dim 16


def base(theta: float, *, scaled: bool = True) -> Edit:
    def table(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(replace(cfg, rope_theta=theta, rope_scaling=cfg.rope_scaling if scaled else None), positions)

    return with_table(table)


def factor(value: float) -> Edit:
    return with_table(
        lambda cfg, at: rope_table(replace(cfg, rope_scaling=replace(cfg.rope_scaling, factor=value)), at)
    )


def tail(x: Tensor) -> Tensor:
    return torch.cat((x[..., :400], x[..., 400:] - 3), -1)


def cooler(x: Tensor) -> Tensor:
    return x * (1 + 0.1 * torch.arange(x.shape[1]).add(1).log())[:, None]


def fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


# (name, edit, words of the cause from logits alone, the first wrong tap, words of the cause there)
PLANTED: list[tuple[str, Edit, str, str, str]] = [
    ("base 10,000", base(1e4), "base is 10,000", "layers.0.q_rope", "10,000"),
    ("base 1,000,000", base(1e6), "base is 1,000,000", "layers.0.q_rope", "1,000,000"),
    ("base 10,000 unscaled", base(1e4, scaled=False), "scaling is dropped", "layers.0.q_rope", "dropped"),
    ("scaling dropped", base(5e5, scaled=False), "scaling of the checkpoint is dropped", "layers.0.q_rope", "dropped"),
    ("factor 32", factor(32.0), "factor of 32", "layers.0.q_rope", "factor of 32"),
    ("low factor", with_table(forward.table_of(forward.low_factor_2)), "low_freq_factor is 2", "layers.0.q_rope",
     "low_freq_factor"),
    ("bf16 table", with_table(forward.bf16_table), "table is kept in bf16", "layers.0.q_rope", "table"),
    ("eps 1e-6", normed(1e-6), "eps is 1e-06", "layers.0.attn_norm", "1e-06"),
    ("eps 1e-5", normed(1e-5), "eps is 1e-05", "layers.0.attn_norm", "1e-05"),
    ("round robin", with_attention(forward.interleaved_kv), "in turn", "layers.0.attn_mix", "in turn"),
    ("unscaled", with_attention(forward.unscaled), "not divided by sqrt", "layers.0.attn_mix", "not divided"),
    ("sees the next", with_attention(forward.sees_next_token), "sees the next", "layers.0.attn_mix", "sees the next"),
    ("unpermuted", forward.permuted_rows, "not un-permuted", "layers.0.q", "not un-permuted"),
    ("fp16 cache", through(lambda x: x.half().float()), "kept in fp16", "layers.0.attn_mix", "kept in fp16"),
    ("bf16 cache", through(lambda x: x.bfloat16().float()), "kept in bf16", "layers.0.attn_mix", "kept in bf16"),
    ("fp8 cache", through(fp8), "kept in fp8", "layers.0.attn_mix", "kept in fp8"),
    ("int8 cache", through(lambda x: by_rows(x, 127, 16)), "kept in int8", "layers.0.attn_mix", "kept in int8"),
    ("fp16 attention", with_attention(half_attention), "is in fp16", "layers.0.attn_mix", "is in fp16"),
    ("window of 64", masked(lambda t, s: (s <= t) & (t - s < 64)), "window of 64", "layers.0.attn_mix", "of 64"),
    ("sink", with_attention(sunk), "sink", "layers.0.attn_mix", "sink"),
    ("int8 weights", integers("int8"), "rounded to int8", "layers.0.q", "rounded to int8"),
    ("int4/32 weights", weights(lambda w: by_rows(w, 7, 32)), "rounded to int4/32", "layers.0.q", "to int4/32"),
    ("int8/32 weights", weights(lambda w: by_rows(w, 127, 32)), "rounded to int8/32", "layers.0.q", "to int8/32"),
    ("int8/32, not the head", weights(lambda w: by_rows(w, 127, 32), head=False), "not of the head, are rounded to"
     " int8/32", "layers.0.q", "to int8/32"),
    ("fp8 weights", weights(fp8), "weights are rounded to fp8", "layers.0.q", "rounded to fp8"),
    ("int8/32 inputs", inputs(lambda x: by_rows(x, 127, 32)), "inputs of linear layers, not of the head, are"
     " rounded to int8/32", "layers.0.q", "inputs of linear layers are rounded to int8/32"),
    ("bf16 logits", logits(lambda x: x.bfloat16().float()), "rounded to bf16", "logits", "rounded to bf16"),
    ("logits times 1.0001", logits(lambda x: x * 1.0001), "1.0001 times", "logits", "1.0001 times"),
    ("capped logits", logits(lambda x: 30 * (x / 30).tanh()), "capped at 30", "logits", "capped at 30"),
    ("vocabulary tail", logits(tail), "tokens 400 and up are 3 lower", "logits", "tokens 400 and up are 3 lower"),
    ("temperature by position", logits(cooler), "temperature by position", "logits", "temperature by position"),
    ("log-probabilities", logits(lambda x: x.log_softmax(-1)), "log-probabilities", "logits", "log-probabilities"),
    ("embedding as head", forward.embedding_as_head, "embedding is used as the output head", "logits", "embedding"),
    ("gate and up swapped", forward.swapped_gate_and_up, "gate and up are swapped", "layers.0.gate", "gate and up"),
    ("GELU", gelu, "is GELU", "layers.0.ffn_mix", "is GELU"),
    ("embedding times sqrt(dim)", scaled_embedding, "embedding is multiplied", "embed", "sqrt(dim)"),
    ("no final norm", forward.no_final_norm, "final norm is skipped", "final_norm", "norm is skipped"),
    ("residual after the norm", forward.residual_after_norm, "residual is taken after", "layers.0.out",
     "after the norm"),
    ("last layer skipped", forward.no_last_layer, "layer 1 is skipped", "final_norm", "layers after 0 are skipped"),
    ("layers swapped", swapped_layers, "layers 0 and 1 are swapped", "layers.0.attn_norm", "layers 0 and 1"),
    ("bias on q", biased("wq"), "", "layers.0.q", "a bias is added"),
]  # fmt: skip

# What no table holds: nothing may be named.
UNKNOWN: list[tuple[str, Edit]] = [
    ("noise in wo", noisy("attention.wo")),
    ("noise in w1", noisy("feed_forward.w1")),
    ("noise in v", noisy("attention.wv")),
    ("a tiny random head", logits(lambda x: 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))),
    ("base off by 1e-4", with_table(forward.table_of(forward.theta_off))),
]  # fmt: skip
