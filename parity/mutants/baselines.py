"""The criteria that projects usually go by, computed for comparison: what each would have let through.

Each is given the candidate's and Meta's (or the first reference's) logits at one dtype, over all positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parity.measure.evidence import Evidence
from parity.trace import Trace

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
        generated = trace.meta.get("generated", {}).get(dtype, [])
        verdicts[dtype] = {GREEDY: all(greedy_equal(ev, reference, dtype, i, ids) for i, ids in enumerate(generated))}
        verdicts[dtype] |= {name: criterion(c, r) for name, criterion in CRITERIA.items()}
    return verdicts


def greedy_equal(ev: Evidence, reference: Trace, dtype: str, sequence: int, generated: list[int]) -> bool:
    """Whether each new token is the reference's own choice at this dtype, as far as that stays on the sequence."""
    assert ev.case.prompt_lengths is not None
    start = ev.case.prompt_lengths[sequence]
    choices = reference.get(dtype, sequence, "logits")[start - 1 :].argmax(-1).tolist()
    for mine, theirs, shared in zip(generated, choices, ev.oracle.sequences[sequence][start:], strict=False):
        if mine != theirs:
            return False
        if theirs != shared:
            break
    return True
