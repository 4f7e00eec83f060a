"""Llama in float64, one small pure function per operation, written from the papers.

RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021) with the wavelength-dependent scaling of the
Llama 3.1 release, grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020). Each function takes exact
inputs and rounds nothing; only the RoPE table is made in float32, because the models were trained with such a table.

Legend: N tokens of all sequences one after another, T tokens of one, H heads, K kv heads, D head dim.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from reference.files import Config


def rope_frequencies(config: Config) -> Tensor:
    """(D/2,) radians per position, in float32: an ulp is 8e-3 radians at position 131071: part of the model."""
    exponents = torch.arange(0, config["head_dim"], 2, dtype=torch.float32) / config["head_dim"]
    frequencies = 1.0 / config["rope_theta"] ** exponents
    if config["rope_scaling"] is None:
        return frequencies
    return torch.stack([_scaled(frequency, config["rope_scaling"]) for frequency in frequencies])


def _scaled(frequency: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1: waves longer than the old context are slowed by `factor`, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / frequency
    low, high, context = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_context"]
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / scaling["factor"]
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


def rope_table(config: Config, positions: Tensor, off_ulp: float = 0.0) -> tuple[Tensor, Tensor]:
    """cos and sin, (N, D/2) float32: of float32 angles, each correctly rounded.

    off_ulp: each frequency is so many ulp too high, then too low, in turns, as the pow of some libraries is; but for
    the first, theta^0 = 1, which none misses.
    """
    frequencies = rope_frequencies(config)
    turns = 1.0 - 2.0 * (torch.arange(len(frequencies)) % 2)  # +1, -1, +1, ...
    turns[0] = 0.0
    frequencies = frequencies * (1 + off_ulp * 2.0**-23 * turns)
    angles = positions.float()[:, None] * frequencies  # (N, D/2), rounded to float32
    return angles.double().cos().float(), angles.double().sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x: Tensor, blocks: Iterable[tuple[int, int, Tensor]], rows: int) -> Tensor:
    """x W^T for W given as (start, stop, float64 rows): only one block of W exists at a time."""
    out = x.new_empty(*x.shape[:-1], rows)
    for start, stop, block in blocks:
        out[..., start:stop] = x @ block.T
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, heads, D): pairs (2j, 2j+1) are turned by the angle of their position and frequency."""
    cos, sin = cos.double()[:, None], sin.double()[:, None]  # (N, 1, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, weights_as: Callable[[Tensor], Tensor] = lambda weights: weights
) -> Tensor:
    """Causal attention of one sequence: q (T, H, D), k and v (T, K, D) -> (T, H*D). Head h reads kv head h // (H/K).

    weights_as: rounds the attention weights (T, T).
    """
    length, heads, head_dim = q.shape
    group = heads // k.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)  # later tokens
    out = torch.empty_like(q)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(head_dim)  # (T, T)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[:, head] = weights_as(weights) @ v[:, head // group]
    return out.flatten(1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up
