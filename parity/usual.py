"""The criteria that projects usually go by, computed for comparison: what each would have let through.

Each is given the candidate's and Meta's (or the first reference's) logits at one dtype, over all positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parity.evidence import Evidence

CRITERIA: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "allclose 1e-5": lambda c, r: torch.allclose(c, r, rtol=1e-5, atol=1e-5),
    "mean of logits": lambda c, r: bool((c.mean() - r.mean()).abs() < 1e-3),
    "NMSE < 1e-2": lambda c, r: float((c - r).square().sum() / r.square().sum()) < 1e-2,
    "cosine > 0.999": lambda c, r: float(torch.cosine_similarity(c.flatten(), r.flatten(), dim=0)) > 0.999,
}
GREEDY = "greedy text equal"
NAMES = (GREEDY, *CRITERIA)


def judge(ev: Evidence) -> dict[str, dict[str, bool]]:
    """By dtype: criterion -> whether it passes the candidate. Empty where nothing ran forward."""
    verdicts: dict[str, dict[str, bool]] = {}
    reference = next(iter(ev.references.values()))
    for dtype, _, trace in ev.per_dtype():
        n = range(len(ev.oracle.sequences))
        if not all(trace.has(dtype, i, "logits") for i in n):
            continue
        c, r = (torch.cat([t.get(dtype, i, "logits").double() for i in n]) for t in (trace, reference))
        verdicts[dtype] = {GREEDY: greedy_equal(ev, trace.meta.get("generated", {}).get(dtype, []))}
        verdicts[dtype] |= {name: criterion(c, r) for name, criterion in CRITERIA.items()}
    return verdicts


def greedy_equal(ev: Evidence, generated: list[list[int]]) -> bool:
    """Whether every continuation is the one in the sequences, token for token."""
    assert ev.case.prompt_lengths is not None
    wanted = [s[n:] for s, n in zip(ev.oracle.sequences, ev.case.prompt_lengths, strict=True)]
    return all(mine == theirs for mine, theirs in zip(generated, wanted, strict=True))
