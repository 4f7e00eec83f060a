"""Correct implementations that compute the same thing in another way: other kernels, sums, layouts, batches.

Each differs from the references in its last digits and in nothing else, so no gate may fail on it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama.model import FeedForward, KVCache, TransformerBlock, causal_mask, repeat_kv, rope_frequencies
from parity.candidates.nano.model import Nano
from parity.explain import rotation
from parity.mutants.edits.edit import Edit, linears, norms, override

Linear = Callable[[Tensor, Tensor], Tensor]  # (x (..., in), weight (out, in)) -> (..., out)


def with_linear(linear: Linear) -> Edit:
    """Every matrix product by another routine, the head's included."""

    def edit(nano: Nano) -> None:
        for module in linears(nano):
            override(module, "forward", lambda x, module=module: linear(x, module.weight))

    return edit


def split_k(parts: int) -> Linear:
    """The inner dimension in parts whose fp32 results are added up, as GPU kernels do for thin matrices."""

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        pieces = zip(x.float().chunk(parts, -1), weight.float().chunk(parts, -1), strict=True)
        return torch.stack([F.linear(a, b) for a, b in pieces]).sum(0).type_as(x)

    return linear


def backwards(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.flip(-1), weight.flip(-1))


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight.t().contiguous())


def einsum(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("btc,oc->bto", x, weight)


def addmm(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.addmm(torch.zeros(weight.shape[0], dtype=x.dtype), x.flatten(0, 1), weight.t())
    return out.view(*x.shape[:-1], -1)


def upcast(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).type_as(x)


def by_rows(x: Tensor, weight: Tensor) -> Tensor:
    """One position at a time: matrix-vector products."""
    return torch.stack([F.linear(row, weight) for row in x.unbind(1)], dim=1)


def with_norm(forward: Callable[[Any, Tensor], Tensor]) -> Edit:
    def edit(nano: Nano) -> None:
        for norm in norms(nano):
            override(norm, "forward", lambda x, norm=norm: forward(norm, x))

    return edit


def norm_in_fp32(norm: Any, x: Tensor) -> Tensor:
    """The weight multiplied before the downcast."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight.float()).type_as(x)


def torch_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def norm_by_length(norm: Any, x: Tensor) -> Tensor:
    """Divided by the square root, the mean from a vector norm."""
    x32 = x.float()
    mean = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square() / x.shape[-1]
    return (x32 / torch.sqrt(mean + norm.eps)).type_as(x) * norm.weight


def cos_sin_table(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.outer(positions.float(), rope_frequencies(cfg))
    return angles.cos(), angles.sin()


def table_from(frequencies: Callable[[Any], Tensor]) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    """The table of other frequencies, (D/2,) float32."""

    def table(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(positions.float(), frequencies(cfg))
        return angles.cos(), angles.sin()

    return table


def as_config(cfg: Any) -> dict[str, Any]:
    return {"head_dim": cfg.head_dim, "rope_theta": cfg.rope_theta,
            "rope_scaling": asdict(cfg.rope_scaling) if cfg.rope_scaling else None}  # fmt: skip


def float64_frequencies(cfg: Any) -> Tensor:
    """Exact and rounded once, as NumPy, C, Go, Rust and JavaScript have them: nearer than the references'."""
    return rotation.frequencies(as_config(cfg)).float()


def repeated_products(cfg: Any) -> Tensor:
    """ggml's way: one pow, and each frequency the one before times it, in float32."""
    step, found = torch.tensor(cfg.rope_theta, dtype=torch.float32) ** (-2 / cfg.head_dim), [torch.tensor(1.0)]
    while len(found) < cfg.head_dim // 2:
        found.append(found[-1] * step)
    return rotation.scaled(torch.stack(found).double(), as_config(cfg)).float()


def coarse_pow(ulp: int) -> Callable[[Any], Tensor]:
    """One frequency in eight, among them one that turns fast, is `ulp` off, as in TensorFlow (2) and tinygrad (4)."""

    def frequencies(cfg: Any) -> Tensor:
        found = rope_frequencies(cfg).clone()
        found[max(1, len(found) // 8) :: 8] *= 1 + ulp * 2.0**-23
        return found

    return frequencies


def real_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def half_split_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' way: features in halves, `x * cos + rotate_half(x) * sin`, and back to Meta's order."""
    halves = x.float().unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = halves.chunk(2, -1)
    cos, sin = (torch.cat((t, t), -1).unsqueeze(2) for t in (cos, sin))
    turned = halves * cos + torch.cat((-second, first), -1) * sin
    return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2).type_as(x)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, heads, D) -> (B, H, T, D) each, kv heads repeated."""
    n_rep = q.shape[2] // k.shape[2]
    return q.transpose(1, 2), repeat_kv(k, n_rep).transpose(1, 2), repeat_kv(v, n_rep).transpose(1, 2)


def allowed(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(B or 1, 1, T, S)."""
    if mask is None:
        T, S = q.shape[1], k.shape[1]
        mask = causal_mask(T, q.device) if T > 1 else torch.ones(1, T, S, dtype=torch.bool)
    return mask.unsqueeze(1)


def scaled_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The scale goes into q in fp32, the mask is added as the lowest finite number."""
    see, (q, k, v) = allowed(q, k, mask), heads_first(q, k, v)
    scores = torch.matmul(q.float() / math.sqrt(q.shape[-1]), k.float().transpose(2, 3))
    probs = (scores + torch.where(see, 0.0, torch.finfo(torch.float32).min)).softmax(-1)
    return torch.matmul(probs.type_as(v), v).transpose(1, 2)


def fp32_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Nothing rounded before the output."""
    see, dtype = allowed(q, k, mask), q.dtype
    q, k, v = (x.float() for x in heads_first(q, k, v))
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~see, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).to(dtype)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Query heads in groups over their kv head; nothing is repeated."""
    see, groups = allowed(q, k, mask).unsqueeze(1), q.unflatten(2, (k.shape[2], -1))  # (B, T, K, H/K, D)
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k) / math.sqrt(q.shape[-1])
    probs = scores.float().masked_fill(~see, float("-inf")).softmax(-1).type_as(q)
    return torch.einsum("bkgts,bskd->btkgd", probs, v).flatten(2, 3)


def query_chunks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Queries 16 at a time, each chunk with its rows of the mask."""
    see = allowed(q, k, mask)[:, 0].expand(q.shape[0], -1, -1)
    parts = [
        F.scaled_dot_product_attention(*heads_first(q[:, i : i + 16], k, v), attn_mask=see[:, i : i + 16].unsqueeze(1))
        for i in range(0, q.shape[1], 16)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def online_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Keys 32 at a time with a running maximum and sum, as in FlashAttention (arXiv 2205.14135)."""
    see, dtype = allowed(q, k, mask), q.dtype
    q, k, v = (x.float() for x in heads_first(q, k, v))
    top = torch.full((*q.shape[:3], 1), -1e30)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for i in range(0, k.shape[2], 32):
        scores = q @ k[:, :, i : i + 32].transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~see[..., i : i + 32], -1e30)
        highest = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = (scores - highest).exp() * see[..., i : i + 32]
        decay = (top - highest).exp()
        total, out, top = (
            total * decay + weights.sum(-1, keepdim=True),
            out * decay + weights @ v[:, :, i : i + 32],
            highest,
        )
    return (out / total).transpose(1, 2).to(dtype)


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    see = allowed(q, k, mask)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=see).transpose(1, 2)


def with_ffn(forward: Callable[[Any, Tensor], Tensor]) -> Edit:
    def edit(nano: Nano) -> None:
        for block in nano.model.layers:
            ffn = block.feed_forward
            override(ffn, "forward", lambda x, ffn=ffn: forward(ffn, x))

    return edit


def fused_swiglu(ffn: FeedForward, x: Tensor) -> Tensor:
    """silu and product in fp32, rounded once."""
    gate, up = ffn.w1(x), ffn.w3(x)
    return ffn.w2((F.silu(gate.float()) * up.float()).type_as(x))


def sigmoid_swiglu(ffn: FeedForward, x: Tensor) -> Tensor:
    gate, up = ffn.w1(x), ffn.w3(x)
    return ffn.w2((gate.float() * torch.sigmoid(gate.float())).type_as(x) * up)


def fp32_residual(nano: Nano) -> None:
    """The residual additions of a block in fp32, rounded once at its end."""
    for block in nano.model.layers:
        override(block, "forward", _fp32_residual(block))


def _fp32_residual(block: TransformerBlock) -> Callable[..., Tensor]:
    def forward(x: Tensor, ctx: Any) -> Tensor:
        h = x.float() + block.attention(block.attention_norm(x), ctx).float()
        return (h + block.feed_forward(block.ffn_norm(h.type_as(x))).float()).type_as(x)

    return forward


def fp32_head(nano: Nano) -> None:
    head = nano.model.head().float()
    override(nano.model, "forward", lambda *args, **kw: F.linear(nano.model.hidden(*args, **kw).float(), head))


def repeated_rows(rows: int) -> Edit:
    """Every call as one row of a batch of copies."""

    def edit(nano: Nano) -> None:
        true = nano.model.forward

        def forward(tokens: Tensor, *args: Any, cache: KVCache | None = None, **kwargs: Any) -> Tensor:
            if cache is not None or args or kwargs or tokens.shape[0] > 1:
                return true(tokens, *args, cache=cache, **kwargs)
            return true(tokens.repeat(rows, 1))[:1]

        override(nano.model, "forward", forward)

    return edit


def in_two_chunks(nano: Nano) -> None:
    """The full forward as a chunked prefill."""
    true = nano.model.forward

    def forward(tokens: Tensor, *args: Any, cache: KVCache | None = None, **kwargs: Any) -> Tensor:
        B, T = tokens.shape
        if cache is not None or args or kwargs or T < 2:
            return true(tokens, *args, cache=cache, **kwargs)
        own = KVCache(nano.cfg, B, T, dtype=nano.dtype, device=nano.device)
        return torch.cat([true(tokens[:, : T // 2], cache=own), true(tokens[:, T // 2 :], cache=own)], dim=1)

    override(nano.model, "forward", forward)


def compiled_blocks(nano: Nano) -> None:
    """Each block's norms and feed-forward through torch.compile, in passes over more than one token."""
    swiglu = torch.compile(lambda ffn, x: ffn.w2(F.silu(ffn.w1(x)) * ffn.w3(x)), dynamic=True)
    norm_of = torch.compile(norm_in_fp32, dynamic=True)
    true = nano.model.forward

    def forward(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tokens.shape[1] == 1:
            return true(tokens, *args, **kwargs)
        modules: list[tuple[Any, Any]] = [(norm, norm_of) for norm in norms(nano)]
        modules += [(block.feed_forward, swiglu) for block in nano.model.layers]
        for module, function in modules:
            override(module, "forward", lambda x, m=module, f=function: f(m, x))
        try:
            return true(tokens, *args, **kwargs)
        finally:
            for module, _ in modules:
                del module.forward

    override(nano.model, "forward", forward)


def threads(n: int) -> Edit:
    """The same kernels with their sums split over n threads."""

    def edit(nano: Nano) -> None:
        true = nano.model.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(n)
            try:
                return true(*args, **kwargs)
            finally:
                torch.set_num_threads(before)

        override(nano.model, "forward", forward)

    return edit
