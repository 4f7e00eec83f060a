"""Ways in which real forward passes have been wrong: config, RoPE, norms, attention, feed-forward, head.

The numbers are those of the table in docs/kill-matrix.md.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nanollama.model import (
    ModelConfig,
    TransformerBlock,
    causal_mask,
    exact_attention,
    repeat_kv,
    rope_frequencies,
    rope_table,
)
from parity.candidates.nano.model import Nano
from parity.mutants.edits.edit import Edit, norms, override


def table_of(config: Callable[[ModelConfig], ModelConfig]) -> Callable[[ModelConfig, Tensor], tuple[Tensor, Tensor]]:
    """The RoPE table of another configuration than the one that the model reports."""
    return lambda cfg, positions: rope_table(config(cfg), positions)


def wrong_theta(cfg: ModelConfig) -> ModelConfig:
    return replace(cfg, rope_theta=10_000.0)


def no_scaling(cfg: ModelConfig) -> ModelConfig:
    return replace(cfg, rope_scaling=None)


def factor_8(cfg: ModelConfig) -> ModelConfig:
    assert cfg.rope_scaling is not None
    return replace(cfg, rope_scaling=replace(cfg.rope_scaling, factor=8.0))


def theta_off(cfg: ModelConfig) -> ModelConfig:
    return replace(cfg, rope_theta=cfg.rope_theta * (1 + 1e-4))


def low_factor_2(cfg: ModelConfig) -> ModelConfig:
    assert cfg.rope_scaling is not None
    return replace(cfg, rope_scaling=replace(cfg.rope_scaling, low_freq_factor=2.0))


def high_factor_2(cfg: ModelConfig) -> ModelConfig:
    assert cfg.rope_scaling is not None
    return replace(cfg, rope_scaling=replace(cfg.rope_scaling, high_freq_factor=2.0))


def default_eps(cfg: ModelConfig) -> ModelConfig:
    return replace(cfg, norm_eps=1e-5)


def bf16_table(cfg: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(cfg, positions)
    return cos.bfloat16().float(), sin.bfloat16().float()


def fp16_table(cfg: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(cfg, positions)
    return cos.half().float(), sin.half().float()


def bf16_positions(cfg: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rope_table(cfg, positions.bfloat16().float())


def bf16_frequencies(cfg: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.outer(positions.float(), rope_frequencies(cfg).bfloat16().float())
    return angles.cos(), angles.sin()


def permuted_rows(nano: Nano) -> None:
    """q and k rows as the Hugging Face file has them: pair i of a head at i and i + D/2."""
    weights = {}
    for name, parameter in nano.model.named_parameters():
        if name.endswith(("wq.weight", "wk.weight")):
            rows = parameter.data.unflatten(0, (-1, nano.cfg.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            parameter.data = rows.contiguous()
            weights[name] = rows
    report_weights(nano, weights)


def report_weights(nano: Nano, changed: dict[str, Tensor]) -> None:
    """Let weights() tell what the model holds: the slip was made while reading."""
    true = nano.weights

    def weights() -> dict[str, dict[str, Any]]:
        found = true()
        stored = nano.opened.weights.dtype
        for name, tensor in changed.items():
            data = tensor.to(stored).contiguous().view(-1).view(torch.uint8).numpy()
            found[name] = {"shape": list(tensor.shape), "crc32": zlib.crc32(data.tobytes())}
        return found

    override(nano, "weights", weights)


def tiny_eps(nano: Nano) -> None:
    for norm in norms(nano):
        norm.eps = 1e-6


def tiny_final_eps(nano: Nano) -> None:
    nano.model.norm.eps = 1e-6


def low_precision_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Exponentials and their running sum in the dtype of q."""
    n_rep = q.shape[2] // k.shape[2]
    if mask is None and q.shape[1] > 1:
        mask = causal_mask(q.shape[1], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, repeat_kv(k, n_rep), repeat_kv(v, n_rep)))
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    total = torch.zeros_like(exponentials[..., 0])
    for key in exponentials.unbind(-1):
        total = total + key
    return torch.matmul(exponentials / total.unsqueeze(-1), v).transpose(1, 2)


def swapped_gate_and_up(nano: Nano) -> None:
    for block in nano.model.layers:
        ffn = block.feed_forward
        ffn.w1, ffn.w3 = ffn.w3, ffn.w1


def interleaved_kv(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Query head h reads kv head h % K, and not h // (H/K)."""
    n_rep = q.shape[2] // k.shape[2]
    return exact_attention(q, k.repeat(1, 1, n_rep, 1), v.repeat(1, 1, n_rep, 1), mask)


def sees_next_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None and q.shape[1] > 1:
        T = q.shape[1]
        mask = torch.ones(1, T, T, dtype=torch.bool).tril(1)
    return exact_attention(q, k, v, mask)


def unscaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return exact_attention(q * math.sqrt(q.shape[-1]), k, v, mask)


def random_head(nano: Nano) -> None:
    made = torch.empty(nano.cfg.vocab_size, nano.cfg.dim)
    nn.init.normal_(made, std=0.02, generator=torch.Generator().manual_seed(0))
    override(nano.model, "head", lambda: made.to(nano.dtype))


def embedding_as_head(nano: Nano) -> None:
    table = nano.model.tok_embeddings.weight
    override(nano.model, "head", lambda: table)
    report_weights(nano, {"output.weight": table.data})


def residual_after_norm(nano: Nano) -> None:
    for block in nano.model.layers:
        override(block, "forward", _residual_after_norm(block))


def _residual_after_norm(block: TransformerBlock) -> Callable[..., Tensor]:
    def forward(x: Tensor, ctx: Any) -> Tensor:
        h = x + block.attention(block.attention_norm(x), ctx)
        normed = block.ffn_norm(h)
        return normed + block.feed_forward(normed)

    return forward


def no_final_norm(nano: Nano) -> None:
    override(nano.model.norm, "forward", lambda x: x)


def no_last_layer(nano: Nano) -> None:
    nano.model.layers = nano.model.layers[:-1]


NOTHING: Edit = lambda nano: None
