"""Ways to get attention wrong, by name; each takes a layer and one sequence's q (T, H, D), k and v (T, K, D)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reference.files import Config
from reference.oracle.forward import Layer, Operation
from reference.oracle.rounding import BF16, FP16, Round, exact

See = Callable[[Tensor, Tensor], Tensor]  # positions of queries (T, 1) and keys (T,) -> True where seen


def causal(t: Tensor, s: Tensor) -> Tensor:
    return s <= t


def blocked(x: Tensor, n_rep: int) -> Tensor:
    """(T, K, D) -> (T, H, D): query head h reads kv head h // n_rep."""
    return x.repeat_interleave(n_rep, 1)


def mixed(
    *,
    see: See = causal,
    scale: Callable[[Config], float] = lambda config: config["head_dim"] ** -0.5,
    heads: Callable[[Tensor, int], Tensor] = blocked,
    queries_as: Round = exact,
    cache_as: Round = exact,
    scores_as: Round = exact,
    weights_as: Round = exact,
    sink: bool = False,
    transposed: bool = False,
) -> Operation:
    """Right by default. sink: a score of 0 that belongs to no key takes part in the softmax."""

    def attn_mix(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config, n_rep = layer.oracle.config, q.shape[1] // k.shape[1]
        k, v = (heads(cache_as(x), n_rep).transpose(0, 1) for x in (k, v))
        at = torch.arange(len(q))
        scores = scores_as(queries_as(q).transpose(0, 1) @ k.transpose(1, 2) * scale(config))  # (H, T, T)
        scores = scores.masked_fill(~see(at[:, None], at), -math.inf)
        if sink:
            scores = torch.cat((scores, torch.zeros_like(scores[..., :1])), -1)
        weights = scores.softmax(-1)[..., : len(q)].nan_to_num(0.0)
        out = (weights_as(weights) @ v).transpose(0, 1)
        return (out.transpose(1, 2) if transposed else out).flatten(1)

    return attn_mix


def capped(cap: float) -> Round:
    return lambda x: cap * (x / cap).tanh()


def not_itself(t: Tensor, s: Tensor) -> Tensor:
    return (s < t) | ((t == 0) & (s == 0))


ATTENTION: dict[str, Operation] = {
    "query heads take kv heads in turn (h % K), not in blocks": mixed(heads=lambda x, n: x.repeat(1, n, 1)),
    "all query heads read the first kv head": mixed(heads=lambda x, n: x[:, :1].expand(-1, n * x.shape[1], -1)),
    "the kv heads are in reverse order": mixed(heads=lambda x, n: blocked(x.flip(1), n)),
    "the scores are not divided by sqrt(head_dim)": mixed(scale=lambda config: 1.0),
    "the scores are divided by head_dim, not by its root": mixed(scale=lambda config: 1 / config["head_dim"]),
    "the scores are divided by sqrt(dim), not by sqrt(head_dim)": mixed(scale=lambda config: config["dim"] ** -0.5),
    "there is no causal mask": mixed(see=lambda t, s: s >= 0),
    "the causal mask is off by one: each token sees the next": mixed(see=lambda t, s: s <= t + 1),
    "the causal mask is off by one: no token sees itself": mixed(see=not_itself),
    "no token sees the first one": mixed(see=lambda t, s: (s <= t) & ((s > 0) | (t == 0))),
    "the softmax has a sink: one more score of 0 that belongs to no token": mixed(sink=True),
    "attention scores are capped at 50 by tanh": mixed(scores_as=capped(50.0)),
    "attention scores are capped at 30 by tanh": mixed(scores_as=capped(30.0)),
    "heads and features change places when they are joined": mixed(transposed=True),
    "attention (queries, keys, values, weights) is in fp16": mixed(queries_as=FP16, cache_as=FP16, weights_as=FP16),
    "attention (queries, keys, values, weights) is in bf16": mixed(queries_as=BF16, cache_as=BF16, weights_as=BF16),
    "attention weights are rounded to fp16": mixed(weights_as=FP16),
    "attention weights are rounded to bf16": mixed(weights_as=BF16),
    "attention scores are rounded to fp16": mixed(scores_as=FP16),
    "attention scores are rounded to bf16": mixed(scores_as=BF16),
    "attention scores and weights are rounded to fp16": mixed(scores_as=FP16, weights_as=FP16),
    "attention scores and weights are rounded to bf16": mixed(scores_as=BF16, weights_as=BF16),
    "queries and keys are rounded to bf16 for the scores": mixed(queries_as=BF16, cache_as=BF16),
}


def windows(config: Config, tokens: int, first: int) -> dict[str, Operation]:
    """A token sees so many of the last ones, itself among them; and YaRN's scale, where RoPE is scaled."""
    whole = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    sizes = sorted({size + off for size in whole for off in (-1, 0, 1)} | {first} - {0})  # windows are off by one, too
    found = {f"attention sees a window of {w} tokens": mixed(see=within(w)) for w in sizes if w < tokens}
    if config["rope_scaling"]:
        factor = (0.1 * math.log(config["rope_scaling"]["factor"]) + 1) ** 2
        scale = lambda config: factor * config["head_dim"] ** -0.5
        found["the scores are multiplied by YaRN's factor"] = mixed(scale=scale)
    return found


def within(size: int) -> See:
    return lambda t, s: (s <= t) & (t - s < size)
