"""Ways in which caches, batches and packed rows have been wrong, while the plain forward pass is right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanollama.model import Context, KVCache
from parity.candidates.nano.model import Nano
from parity.mutants.edits.edit import Edit, norms, override

NARROWER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float8_e4m3fn, torch.float16: torch.float8_e4m3fn}
TWIN = {torch.float32: torch.int32, torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
LIVE_SLOTS = 24


def with_context(change: Callable[[Nano, Context, int], Context]) -> Edit:
    """Alter what a pass through a filled cache shares: change(nano, context, number of its tokens)."""

    def edit(nano: Nano) -> None:
        true = nano.model.context

        def context(tokens: Tensor, *args: Any, cache: KVCache | None = None, **kwargs: Any) -> Context:
            args, cache = args[:2], args[2] if len(args) > 2 else cache
            ctx = true(tokens, *args, cache=cache, **kwargs)
            T = tokens.shape[1]
            return change(nano, ctx, T) if cache is not None and ctx.end > T else ctx

        override(nano.model, "context", context)

    return edit


def _rotated_at(nano: Nano, ctx: Context, positions: Tensor) -> Context:
    cos, sin = nano.rope(positions.flatten())
    shape = (*positions.shape, -1)
    return replace(ctx, cos=cos.view(shape), sin=sin.view(shape))


def stuck_position(nano: Nano, ctx: Context, T: int) -> Context:
    return _rotated_at(nano, ctx, torch.zeros_like(ctx.positions))


def late_position(nano: Nano, ctx: Context, T: int) -> Context:
    return _rotated_at(nano, ctx, ctx.positions + 1)


def top_left_mask(nano: Nano, ctx: Context, T: int) -> Context:
    """What `is_causal=True` means where queries are fewer than keys; a single query is not masked."""
    mask = torch.ones(1, T, ctx.end, dtype=torch.bool).tril()
    return replace(ctx, mask=mask) if T > 1 else ctx


def no_mask(nano: Nano, ctx: Context, T: int) -> Context:
    return replace(ctx, mask=torch.ones(1, T, ctx.end, dtype=torch.bool)) if T > 1 else ctx


def trimmed(nano: Nano, ctx: Context, T: int) -> Context:
    """The oldest slots are dropped although the tokens are alive."""
    mask = ctx.mask if ctx.mask is not None else torch.ones(1, T, ctx.end, dtype=torch.bool)
    alive = torch.arange(ctx.end) >= ctx.end - LIVE_SLOTS
    return replace(ctx, mask=mask & alive)


def through_cache(change: Callable[[Tensor], Tensor]) -> Edit:
    """Alter what the cache gives back."""

    class Changed(KVCache):
        def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
            k, v = super().update(layer, k, v, positions, end)
            return change(k), change(v)

    def edit(nano: Nano) -> None:
        def prefill(tokens: Tensor) -> Tensor:
            B, T = tokens.shape
            nano.cache = Changed(nano.cfg, B, T + 512, dtype=nano.dtype, device=nano.device)
            return nano.model(tokens, cache=nano.cache)

        override(nano, "prefill", prefill)

    return edit


def narrower(x: Tensor) -> Tensor:
    return x.to(NARROWER[x.dtype]).to(x.dtype)


def reinterpreted(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.contiguous().view(TWIN[x.dtype]).to(x.dtype))


def previous_slot(nano: Nano) -> None:
    """The last token's key and value land one slot early and overwrite their neighbour's."""

    class Early(KVCache):
        def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
            early = (positions - 1).clamp_min(0) if positions.shape[1] == 1 else positions
            super().update(layer, k, v, early, end)
            return self.k[layer][:, :end], self.v[layer][:, :end]

    def prefill(tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        nano.cache = Early(nano.cfg, B, T + 512, dtype=nano.dtype, device=nano.device)
        return nano.model(tokens, cache=nano.cache)

    override(nano, "prefill", prefill)


def no_document_mask(nano: Nano) -> None:
    """Positions restart with each document, and every document sees the ones before it."""
    model = nano.model
    true = model.context
    override(
        model, "context", lambda tokens, positions=None, doc_ids=None, cache=None: true(tokens, positions, None, cache)
    )


def norm_over_batch(nano: Nano) -> None:
    """The mean square is taken over the rows of the batch too: right for one row."""
    for norm in norms(nano):
        override(norm, "forward", _norm_over_batch(norm))


def _norm_over_batch(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        x32 = x.float()
        square = x32.pow(2).mean(dim=(0, -1), keepdim=True)
        return (x32 * torch.rsqrt(square + norm.eps)).type_as(x) * norm.weight

    return forward
