"""G2: each operation alone, on the reference's own inputs, against float64 on these inputs.

The free-running gates see an error pile up through the layers; here it cannot. What rounding in another order does is
reported as the share of elements whose bits differ from the reference's, and never fails.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parity.candidates.interface import lacking
from parity.contract import Result, Status, judge
from parity.explain.rotation import frequencies, pairs
from parity.measure.evidence import Evidence, Pair, envelope, worst_ratio
from parity.measure.metrics import TapError
from parity.measure.tolerances import BOUNDS, TABLE_ULP
from parity.run.teacher_forcing import op_names
from parity.trace import Trace


@dataclass
class OpErrors:
    """One candidate's operations on one reference's inputs."""

    ratios: dict[str, float] = field(default_factory=dict)  # by tap, in order of computation
    places: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # tap -> why it could not be compared
    differ: int = 0  # elements whose bits are not the reference's
    elements: int = 0


def measure_ops(ev: Evidence, pair: Pair) -> OpErrors | None:
    """None where the candidate has no ops(), or the checkpoint is too large for teacher forcing."""
    mine = ev.candidates[pair.path].folder / "ops" / pair.reference
    if pair.reference not in ev.ops or not (mine / "trace.json").is_file():
        return None
    key = (pair, str(mine))
    if key not in ev.op_errors:
        ev.op_errors[key] = _measure(ev, Trace(mine), pair)
    return ev.op_errors[key]


def _measure(ev: Evidence, mine: Trace, pair: Pair) -> OpErrors:
    theirs, oracle, dtype = ev.forced[pair.reference], ev.ops[pair.reference], pair.dtype
    out = OpErrors()
    for tap in op_names(oracle.n_layers):
        candidate = TapError()
        if not all(mine.has(dtype, s, tap) for s in range(len(oracle.sequences))):
            continue
        try:
            for s in range(len(oracle.sequences)):
                c, r, o = (trace.get(dtype, s, tap) for trace in (mine, theirs, oracle))
                candidate.add(s, c, o)
                out.differ += differing(c, r)
                out.elements += r.numel()
        except ValueError as error:
            out.broken[tap] = str(error)
            continue
        out.ratios[tap] = _ratio(ev, pair, tap, candidate)
        out.places[tap] = f"{tap}, {candidate.place}"
    return out


def _ratio(ev: Evidence, pair: Pair, tap: str, candidate: TapError) -> float:
    """Against the larger error of all references; where that is too much, a coarse RoPE table counts as well."""
    found = worst_ratio(candidate, op_noise(ev, pair, tap), pair.dtype)[0]
    if found <= BOUNDS["G2"].value or not tap.endswith("_rope"):
        return found
    given = ev.forced[pair.reference]
    inputs = [given.get(pair.dtype, s, tap.removesuffix("_rope")) for s in range(len(given.sequences))]
    drift = [coarse_rotation(x, given.meta["config"]) for x in inputs]
    return worst_ratio(candidate, replace(op_noise(ev, pair, tap), drift=drift), pair.dtype)[0]


def op_noise(ev: Evidence, pair: Pair, tap: str) -> TapError:
    """What counts as rounding: at each position, the largest error that any reference makes on inputs of its own."""
    key = (pair.reference, pair.dtype, tap)
    if key not in ev.op_noise:
        own = _own_error(ev, *key)
        others = [_own_error(ev, name, pair.dtype, tap) for name in ev.ops if name != pair.reference]
        ev.op_noise[key] = envelope(own, others)
    return ev.op_noise[key]


def _own_error(ev: Evidence, reference: str, dtype: str, tap: str) -> TapError:
    """One reference's operation against float64 on the same inputs."""
    found, theirs, oracle = TapError(), ev.forced[reference], ev.ops[reference]
    for s in range(len(oracle.sequences)):
        found.add(s, theirs.get(dtype, s, tap), oracle.get(dtype, s, tap))
    return found


def coarse_rotation(x: Tensor, config: dict[str, Any]) -> Tensor:
    """x (T, H, D) -> (T,): the squared error of rotating it where each frequency but the first is TABLE_ULP off."""
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies(config)) * TABLE_ULP * 2.0**-23
    angles[:, 0] = 0.0
    return (pairs(x.double()).abs().square() * angles.square().unsqueeze(1)).sum((1, 2))


def differing(c: Tensor, r: Tensor) -> int:
    return int((c != r).sum())


def ops(ev: Evidence) -> Iterator[Result]:
    """G2: every operation on the reference's own inputs against float64 on them; rounding style is reported."""
    for pair in ev.pairs():
        found = measure_ops(ev, pair)
        if found is None:
            small = pair.reference in ev.ops or not ev.candidates[pair.path].meta.get("ops")
            lacks = lacking(ev.candidates[pair.path].meta, "ops")
            reason = lacks if small else "operations are checked on small checkpoints"
            yield Result("ops", "G2", Status.SKIP, required=False, reason=f"not covered: {reason}", **pair.labels)
            continue
        for tap, reason in found.broken.items():
            yield Result("ops", "G2", Status.FAIL, where=tap, reason=reason, **pair.labels)
        if found.ratios:
            tap = first_wrong(found) or max(found.ratios, key=found.ratios.__getitem__)
            yield judge(
                found.ratios[tap], BOUNDS["G2"].value, check="ops", gate="G2", metric="rho, op on given inputs",
                unit="x noise", where=found.places[tap], **pair.labels,
            )  # fmt: skip
            share = found.differ / max(1, found.elements)
            yield judge(
                share, 1.0, check="ops", gate="style", metric="elements rounded otherwise", unit="share",
                reason="reported, never failed", **pair.labels,
            )  # fmt: skip


def first_wrong(found: OpErrors) -> str | None:
    """The first operation, in order of computation, that is beyond the gate."""
    return next((tap for tap, ratio in found.ratios.items() if not ratio <= BOUNDS["G2"].value), None)
