"""Next-token sampling as closures: logits (B, V) in, token ids (B,) out. Needs only torch: copy it anywhere.

A filter is a function logits -> logits that sets what may not be drawn to -inf; a sampler is the filters in a row and
one draw. The order is that of transformers: temperature, top-k, top-p, min-p. Random numbers come from the generators
that are passed in, one per row, so a row's tokens depend on its own seed and not on its neighbours.

    sampler = make_sampler(temperature=0.8, top_p=0.9)
    ids = sampler(logits, [row_generator(seed=0)])

Sources: top-k (arXiv 1805.04833), top-p (1904.09751), min-p (2407.01082), repetition penalty (1909.05858).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Filter = Callable[[Tensor], Tensor]  # logits (B, V) -> logits (B, V)
Generators = torch.Generator | Sequence[torch.Generator]  # one for all rows, or one for each
Sampler = Callable[[Tensor, Generators], Tensor]  # logits (B, V), generators -> ids (B,)

LEAST_TEMPERATURE = 1e-6  # logits divided by much less are infinite, and their softmax is no number


def make_sampler(temperature: float = 0.0, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampler:
    """A sampler; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off. Raises ValueError out of range."""
    keep = make_filter(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if temperature == 0:
        return lambda logits, generators: logits.argmax(dim=-1)
    return lambda logits, generators: draw(keep(logits), generators)


def make_filter(temperature: float = 1.0, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Filter:
    """The distribution that a sampler draws from, as logits -> logits. Arguments as in `make_sampler`."""
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy), or {LEAST_TEMPERATURE:g} and more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: expected 0 (off) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected more than 0, up to 1 (off)")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}: expected 0 (off) up to 1")
    filters: list[Filter] = []
    if temperature not in (0, 1):
        filters.append(lambda logits: logits / temperature)
    if top_k:
        filters.append(lambda logits: keep_top_k(logits, top_k))
    if top_p < 1:
        filters.append(lambda logits: keep_top_p(logits, top_p))
    if min_p:
        filters.append(lambda logits: keep_min_p(logits, min_p))

    def apply(logits: Tensor) -> Tensor:
        logits = logits.float()
        for keep in filters:
            logits = keep(logits)
        return logits

    return apply


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k largest; a tie at the k-th place stays whole, as in transformers."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest most probable tokens whose probabilities reach p; a tie at the last place stays whole."""
    probs = logits.softmax(dim=-1)  # (B, V)
    k = 512
    while True:  # a peaked distribution needs few tokens, and sorting 128,256 costs more than a small model's step
        best = probs.topk(min(k, probs.shape[-1]), dim=-1).values  # (B, k)
        before = best.cumsum(dim=-1) - best  # probability of all that come before this one
        if k >= probs.shape[-1] or bool((before[:, -1] >= p).all()):
            break
        k *= 8
    smallest = best.masked_fill(before >= p, math.inf).amin(dim=-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(probs < smallest, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Those at least p times as probable as the most probable one."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def keep_tokens(logits: Tensor, n: int) -> Tensor:
    """Only the first n: rows beyond the tokens pad the head to a multiple, and say nothing."""
    return logits if n >= logits.shape[-1] else torch.cat([logits[:, :n], torch.full_like(logits[:, n:], -math.inf)], 1)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens in `seen` (B, V) bool less likely (penalty > 1): positive logits divided, negative multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, generators: Generators) -> Tensor:
    """One id per row from softmax(logits), by inverting the distribution function: one uniform number a row.

    In float64: float32 sums over a large vocabulary would leave out tokens rarer than 6e-8.
    """
    wide = logits.cpu() if logits.device.type == "mps" else logits  # MPS has no float64
    total = wide.double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    aim = _uniform(logits.shape[0], generators).to(total.device) * total[:, -1:]  # (B, 1)
    # right=True: the first place whose sum is beyond the aim, which a token of probability 0 never is.
    ids = torch.searchsorted(total, aim, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)  # (B,)
    return ids.to(logits.device)


def row_generator(seed: int, stream: int = 0) -> torch.Generator:
    """The random numbers of one row; `stream` tells apart several answers to one prompt under one seed.

    On the CPU wherever the model is, so that a seed means the same on every device.
    """
    # A large odd step keeps the streams of neighbouring seeds apart: (0, 1) must not be (1, 0).
    return torch.Generator().manual_seed((seed + stream * 0x9E3779B97F4A7C15) % 2**63)


def _uniform(rows: int, generators: Generators) -> Tensor:
    """Numbers in [0, 1): (rows, 1)."""
    if isinstance(generators, torch.Generator):
        return torch.rand(rows, 1, generator=generators, dtype=torch.float64)
    assert len(generators) == rows, f"{len(generators)} generators for {rows} rows"
    return torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])
