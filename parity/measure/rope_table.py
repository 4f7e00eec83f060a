"""How good is a candidate's RoPE table? Judged by what float32 explains, graded where the references' is better.

A frequency theta^(-2j/D) is one pow, rounded: libraries are up to 4 ulp off (TABLE_ULP); repeated products, as ggml
makes them, add a rounding a pair. An ulp of a frequency is 1e-3 radians at position 8191, so tables that are all right
differ by thousands of ulp of 1.0 far out. What is off by more than this is no rounding: another base, factor or
precision.

    grades(evidence, rescued=False)      # what is worth saying of the tables of these candidates
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.explain.rotation import LOW, explained, frequencies, imprecise, pairs, wrap
from parity.measure.evidence import Evidence, Pair
from parity.measure.metrics import own_noise
from parity.measure.tolerances import BOUNDS, TABLE_ULP, TABLE_WORSE
from parity.trace import Trace

ULP = 2.0**-23  # of 1.0
FAR = 8191  # the position at which a table's error is told in radians
COARSE_ULP = 4 * TABLE_ULP  # beyond which a frequency is not called a few ulp off
CLEAR_RAD = 0.5  # angle errors beyond this may be whole turns
Table = dict[str, Tensor]  # cos and sin, (N, P)


def exact_table(config: dict[str, Any], positions: list[int]) -> Table:
    """cos and sin of exact angles, (N, P) float64."""
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies(config))
    return {"cos": angles.cos(), "sin": angles.sin()}


def allowed(config: dict[str, Any], positions: list[int]) -> Tensor:
    """(N, P) ulp of 1.0: what rounding in float32 explains. theta^0 is 1 however it is computed."""
    pair = torch.arange(config["head_dim"] // 2, dtype=torch.float64)
    ulp = torch.where(pair == 0, 0.0, TABLE_ULP + pair + 0.5)  # pow; a product a pair; the angle's own rounding
    return 1 + torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies(config) * ulp)


@dataclass(frozen=True)
class Worst:
    """The place of a table that is worst by what is allowed there."""

    share: float  # of what is allowed; NaN where a number is none
    ulp: float  # of 1.0
    table: str
    row: int
    pair: int


def worst(mine: Table, theirs: Table, config: dict[str, Any], positions: list[int]) -> Worst:
    """A table against the nearer of the reference's and the exact one, place by place."""
    exact, limit, found = exact_table(config, positions), allowed(config, positions), []
    for name in ("cos", "sin"):
        near = [(mine[name].double() - other[name].double()).abs() for other in (theirs, exact)]
        error = torch.minimum(*near) / ULP  # NaN where either is
        share = torch.nan_to_num(error / limit, nan=torch.inf)
        row, pair = divmod(int(share.argmax()), share.shape[1])
        found.append(Worst(float((error / limit)[row, pair]), float(error[row, pair]), name, row, pair))
    return max(found, key=lambda w: math.inf if math.isnan(w.share) else w.share)


# --- What the angles say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Angles:
    """Rotation angles of pairs at positions, and how far from exact they are."""

    angle: Tensor  # (N, P) radians, modulo whole turns
    at: Tensor  # (N,) positions, float64
    config: dict[str, Any]

    @property
    def error(self) -> Tensor:
        return wrap(self.angle - torch.outer(self.at, frequencies(self.config)))

    def ulp(self) -> Tensor:
        """(P,) what each frequency is off, in ulp of it; 0 where the positions are too near to tell."""
        error, turn = self.error, torch.outer(self.at, frequencies(self.config))
        clear = (error.abs().amax(1) < CLEAR_RAD).nonzero()
        row = int(clear[self.at[clear[:, 0]].argmax(), 0]) if len(clear) else 0
        off = error[row] / (turn[row].clamp_min(1e-300) * ULP)
        return torch.where(turn[row] < 1, 0.0, off)

    def radians(self) -> float:
        """The largest error at position 8191, which lies behind what was measured where that is shorter."""
        here = (self.at == FAR).nonzero()
        if len(here):
            return float(self.error[int(here[0, 0])].abs().max())
        return float((self.ulp() * ULP * frequencies(self.config)).abs().max()) * FAR


def of_table(table: Table, config: dict[str, Any], positions: list[int]) -> Angles:
    angle = torch.atan2(table["sin"].double(), table["cos"].double())
    return Angles(angle, torch.tensor(positions, dtype=torch.float64), config)


def of_taps(trace: Trace, dtype: str, config: dict[str, Any], sequence: int) -> Angles | None:
    """From q before and after the first layer's rotation, all heads together."""
    if not all(trace.has(dtype, sequence, f"layers.0.{tap}") for tap in ("q", "q_rope")):
        return None
    before, after = (pairs(trace.get(dtype, sequence, f"layers.0.{tap}").double()) for tap in ("q", "q_rope"))
    angle = (after * before.conj()).sum(1).angle()
    return Angles(angle, torch.arange(len(angle), dtype=torch.float64), config)


# --- Names -----------------------------------------------------------------------------------------------------------


def cause(table: Table, config: dict[str, Any], positions: list[int]) -> str:
    """In words, of a table that is not as good as the references'."""
    for name, dtype in LOW.items():
        if all(torch.equal(t.float(), t.to(dtype).float()) for t in table.values()):
            return f"the cos/sin table is kept in {name}"
    return angle_cause(of_table(table, config, positions))


def angle_cause(found: Angles) -> str:
    """Another formula or a lower precision, if its angles are these; else what the size of the error says."""
    if not torch.isfinite(found.angle).all():
        return "the table holds numbers that are not finite"
    named = explained(found.angle, found.at, found.config) or imprecise(found.angle, found.at, found.config)
    if named is None and float(found.ulp().abs().max()) <= COARSE_ULP:
        named = "frequencies are a few ulp off, as by a coarse pow"
    return named or "the angles drift with the position: frequencies or positions in low precision, or another formula"


# --- Grades ----------------------------------------------------------------------------------------------------------


def grades(ev: Evidence, rescued: bool) -> list[dict[str, Any]]:
    """Of each candidate whose table is worse than the references' by more than the bound: path, cause, ulp, theirs_ulp,
    radians_at_8191, context_tokens, text. `rescued`: gates hold because a coarse table's error counts as rounding."""
    found = (grade(ev, path, rescued) for path in ev.candidates)
    return [one for one in found if one is not None]


def grade(ev: Evidence, path: str | None, rescued: bool) -> dict[str, Any] | None:
    angles = measured(ev, path)
    if not (rescued if angles is None else worse(ev, angles)):
        return None
    ulp = None if angles is None else float(angles.ulp().abs().max())
    one = {
        "path": path,
        "cause": named(ev, angles),
        "ulp": ulp,
        "theirs_ulp": max((float(a.ulp().abs().max()) for a in theirs(ev)), default=None),
        "radians_at_8191": None if angles is None else angles.radians(),
        "context_tokens": context(ev, path),
    }
    return one | {"text": text(one)}


def has_worse_table(ev: Evidence) -> bool:
    return any(worse(ev, angles) for path in ev.candidates if (angles := measured(ev, path)) is not None)


def worse(ev: Evidence, angles: Angles) -> bool:
    """Whether its frequencies, or its angles at position 8191, are off by more than the bound allows the references'
    own, or an ulp of the fastest frequency that is not 1. What is not finite is."""
    ulp, radians = angles.ulp().abs().max(), angles.radians()
    own = theirs(ev)
    step = float(frequencies(angles.config)[min(1, len(frequencies(angles.config)) - 1)]) * ULP * FAR
    near = float(ulp) <= TABLE_WORSE * max([1.0, *(float(a.ulp().abs().max()) for a in own)])
    return not (near and radians <= TABLE_WORSE * max([step, *(a.radians() for a in own)]))


def theirs(ev: Evidence) -> list[Angles]:
    config, positions = ev.oracle.meta["config"], ev.case.rope_positions
    return [of_table(table, config, positions) for r in ev.references.values() if (table := r.rope())]


def measured(ev: Evidence, path: str | None) -> Angles | None:
    """The candidate's angles: from rope(), else from the first layer's rotation in fp32; None: it shows neither."""
    config = ev.oracle.meta["config"]
    first = next(iter(ev.candidates.values()))  # paths of one candidate share their table: it is asked once
    if table := first.rope():
        shape = (len(ev.case.rope_positions), config["head_dim"] // 2)
        alike = all(t.shape == shape for t in table.values())
        return of_table(table, config, ev.case.rope_positions) if alike else None
    longest = max(range(len(ev.oracle.sequences)), key=lambda i: len(ev.oracle.sequences[i]))
    trace = ev.candidates[path]
    if ev.case.positions is not None or "fp32" not in trace.meta["dtypes"]:
        return None
    return of_taps(trace, "fp32", config, longest)


def named(ev: Evidence, angles: Angles | None) -> str:
    if angles is None:
        return "the error has the size of RoPE frequencies that are a few ulp from the references'"
    table = next(iter(ev.candidates.values())).rope()
    return cause(table, angles.config, ev.case.rope_positions) if table else angle_cause(angles)


def context(ev: Evidence, path: str | None) -> int | None:
    """Tokens up to which the logits' gate holds in fp32 without an allowance for tables; None where nothing tells."""
    asked = [p for p in ev.pairs() if p.path == path and p.dtype == "fp32" and "logits" in ev.candidate(p).taps]
    return min((_context(ev, pair) for pair in asked), default=None)


def _context(ev: Evidence, pair: Pair) -> int:
    """In the longest sequence, or extrapolated: other rounding is alike at every position, a table's error grows.

    What is lost in other rounding counts as a quarter of it.
    """
    longest = max(range(len(ev.oracle.sequences)), key=lambda i: len(ev.oracle.sequences[i]))
    mine = ev.candidate(pair).taps["logits"]
    floor, bound = own_noise(ev.strict(pair).taps["logits"], pair.dtype, longest), BOUNDS["G3.logits"].value
    squares = mine.error[longest] / mine.width
    length = torch.arange(1, len(squares) + 1)
    beyond = (~((squares.cumsum(0) / length).sqrt() <= bound * floor)).nonzero()
    if len(beyond):
        return int(beyond[0])
    table = math.sqrt(max(float(squares.mean()) - floor**2, (floor / 4) ** 2))
    return int(len(squares) * math.sqrt(bound**2 - 1) * floor / table)


def text(one: dict[str, Any]) -> str:
    head = f"RoPE table: {one['cause']}"
    if one["ulp"] is not None:
        own = "" if one["theirs_ulp"] is None else f" (the references': {one['theirs_ulp']:.2g})"
        head += f"; frequencies up to {one['ulp']:.2g} ulp off{own}, {one['radians_at_8191']:.1e} rad at position {FAR}"
    if one["context_tokens"] is not None:
        head += f"; every gate on logits holds up to about {one['context_tokens']:,} tokens without an allowance for it"
    return head
