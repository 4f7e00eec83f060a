"""G2: each operation alone, on the reference's own inputs, against float64 on these inputs.

The free-running gates see an error pile up through the layers; here it cannot. What rounding in another order does is
reported as the share of elements whose bits differ from the reference's, and never fails.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from parity.candidates.interface import lacking
from parity.contract import Result, Status, judge
from parity.evidence import Evidence, Pair, worst_ratio
from parity.forced import op_names
from parity.metrics import TapError
from parity.tolerances import BOUNDS
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
        ev.op_errors[key] = _measure(Trace(mine), ev.forced[pair.reference], ev.ops[pair.reference], pair.dtype)
    return ev.op_errors[key]


def _measure(mine: Trace, theirs: Trace, oracle: Trace, dtype: str) -> OpErrors:
    out = OpErrors()
    for tap in op_names(oracle.n_layers):
        candidate, reference = TapError(), TapError()
        if not all(mine.has(dtype, s, tap) for s in range(len(oracle.sequences))):
            continue
        try:
            for s in range(len(oracle.sequences)):
                c, r, o = (trace.get(dtype, s, tap) for trace in (mine, theirs, oracle))
                candidate.add(s, c, o)
                reference.add(s, r, o)
                out.differ += differing(c, r)
                out.elements += r.numel()
        except ValueError as error:
            out.broken[tap] = str(error)
            continue
        out.ratios[tap] = worst_ratio(candidate, reference, dtype)[0]
        out.places[tap] = f"{tap}, {candidate.place}"
    return out


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
