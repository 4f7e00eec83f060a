"""What a server computes in, told by its log-probabilities where these fail their gate.

A few hundred tokens are run in each precision that servers have: a reference in bf16 and fp16, the oracle with its
weights rounded to fp8 and to integers. Named is the precision whose error goes with the server's, number by number;
where none does, as of rounding that differs from run to run, the one whose error is nearest in size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from parity.measure.evidence import Evidence, Pair, worst_ratio
from parity.measure.listed import Listing
from parity.measure.tolerances import BOUNDS
from parity.trace import Trace

TOKENS = 300  # at most, that it is told from
WEIGHTS = ("fp8/row", "int8", "int8/32", "int4", "int4/32")
NAMES = {"bf16": "bf16", "fp16": "fp16"} | {s: f"{s.removesuffix('/row')} weights" for s in WEIGHTS}
NEAR = 4.0  # times as large or as small: beyond it, a precision is not named
ALIKE = 0.3  # correlation of two errors: beyond it, one rounding is in both

Run = Callable[[list[list[int]], str], dict[str, tuple[Trace, str]]]


@dataclass(frozen=True)
class Likeness:
    """The candidate's error beside one precision's. size: their quotient; alike: their correlation."""

    name: str
    size: float
    alike: float

    def __str__(self) -> str:
        return f"{self.size:.2g} times that of {NAMES[self.name]} (correlation {self.alike:.2f})"


def remarks(ev: Evidence, dtypes: list[str], run: Run) -> list[str]:
    """One line for the first of these dtypes at which listed log-probabilities fail; else none."""
    for pair in ev.pairs():
        listed = ev.listed(pair) if pair.dtype in dtypes else None
        if listed is None or not worst_ratio(listed.error, listed.noise, pair.dtype)[0] > BOUNDS["G3.logits"].value:
            continue
        return [remark(ev, pair, run)]
    return []


def remark(ev: Evidence, pair: Pair, run: Run) -> str:
    """What the candidate's error is like, the nearest in size first."""
    sequences = few_tokens(ev, pair)
    rows = ev.candidates[pair.path].meta["log_probs"][pair.dtype]
    kept = [{p: row for p, row in rows[i].items() if int(p) < len(ids)} for i, ids in enumerate(sequences)]
    listing = Listing.of(kept)
    oracle = listing.read(ev.oracle, pair.dtype)
    error = listing.values - oracle
    rms = float(error.square().mean().sqrt())
    found = []
    for name, (trace, dtype) in run(sequences, pair.dtype).items():
        theirs = listing.read(trace, dtype) - oracle
        size = rms / max(float(theirs.square().mean().sqrt()), 1e-300)
        found.append(Likeness(name, size, float(torch.corrcoef(torch.stack((error, theirs)))[0, 1])))
    found.sort(key=lambda f: (-f.alike if f.alike >= ALIKE else 0.0, distance(f)))
    best, second = found[:2]
    seen = f"at {len(listing.places)} tokens its log-probabilities are off by {rms:.2g} nats in the root mean square"
    if best.alike < ALIKE and not distance(best) <= math.log(NEAR):
        return f"no precision explains the server's error: {seen}, {best}, {second}"
    return f"the server probably computes in {NAMES[best.name]}: {seen}, {best}, {second}"


def distance(likeness: Likeness) -> float:
    """Of a quotient from 1; infinite for one that is no number."""
    return abs(math.log(likeness.size)) if 0 < likeness.size < math.inf else math.inf


def few_tokens(ev: Evidence, pair: Pair) -> list[list[int]]:
    """The first sequences, cut to TOKENS together: up to the last position at which anything is listed."""
    rows, left, found = ev.candidates[pair.path].meta["log_probs"][pair.dtype], TOKENS, []
    for ids, row in zip(ev.oracle.sequences, rows, strict=True):
        length = min(left, max(map(int, row), default=0) + 1)
        if length == 0:
            break
        found.append(ids[:length])
        left -= length
    return found
