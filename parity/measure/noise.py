"""The noise floor: what counts as rounding at each tap and position, made of the errors of those that are known right.

At an ill-conditioned position an error's size is a matter of luck; each reference is one more throw, so the largest
counts. A reference that strays from the pair's own by more than the gates allow has no say.
"""

import math
from dataclasses import replace

import torch

from parity.measure.metrics import LogitRows, Measured, TapError
from parity.measure.tolerances import AGREE


def join_floors(own: Measured, others: list[Measured], declared: bool) -> Measured:
    """The errors of a pair's own reference, raised to the largest of the others that agree with it.

    declared: `own` is the oracle that rounds as a candidate declares, in float64: a reference's rounding comes on top,
    whatever its size, that of the better one.
    """
    if declared:
        others = sorted(others, key=lambda o: o.taps["logits"].rms() if "logits" in o.taps else math.inf)[:1]
    taps = {t: raise_to(e, [o.taps[t] for o in others if t in o.taps], declared) for t, e in own.taps.items()}
    peers = [o for o in others if "logits" in o.taps]
    peers = [o for o in peers if declared or agree(own.taps["logits"], o.taps["logits"])]
    return replace(own, taps=taps, rows=raise_kl(own.rows, [o.rows for o in peers]))


def raise_to(own: TapError, others: list[TapError], all_count: bool = False) -> TapError:
    """The errors of `own`, raised at each position to the largest of those that agree with it, or of all."""
    for other in others:
        if all_count or agree(own, other):
            error = [torch.maximum(a, b) for a, b in zip(own.error, other.error, strict=True)]
            worst = [torch.maximum(a, b) for a, b in zip(own.worst, other.worst, strict=True)]
            own = replace(own, error=error, worst=worst)
    return own


def raise_kl(own: list[LogitRows], others: list[list[LogitRows]]) -> list[LogitRows]:
    """The KL of `own`, raised at each position to the largest of `others`."""
    for rows in others:
        own = [replace(a, kl=torch.maximum(a.kl, b.kl)) for a, b in zip(own, rows, strict=True)]
    return own


def add_drift(own: Measured, coarse: Measured) -> Measured:
    """A reference's errors, and what a coarse RoPE table adds to them at each position; nothing at taps before RoPE."""
    taps = {}
    for tap, error in own.taps.items():
        drift = coarse.taps[tap]
        worst = [torch.hypot(a, b) for a, b in zip(error.worst, drift.worst, strict=True)]
        taps[tap] = replace(error, drift=drift.error, worst=worst)
    pairs = zip(own.rows, coarse.rows, strict=True)
    return replace(own, taps=taps, rows=[replace(a, kl=a.kl + b.kl) for a, b in pairs])


def agree(own: TapError, other: TapError) -> bool:
    """Whether two references' errors are of one size."""
    close = other.rms() <= AGREE * own.rms() and own.rms() <= AGREE * other.rms()
    return close and len(other.error) == len(own.error)


def pick_positions(whole: TapError, places: dict[int, list[int]]) -> TapError:
    """The errors at these positions, by sequence, alone."""
    kinds = (whole.error, whole.expected, whole.drift)
    error, expected, drift = ([sums[i][p] for i, p in places.items()] if sums else [] for sums in kinds)
    return TapError(error, expected, width=whole.width, drift=drift)
