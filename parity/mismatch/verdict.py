"""Which side is off, by how many noise floors, from where, and why: from the oracle's answer about both columns.

The floor is what computing in the declared precision costs a forward pass, token by token. A side within BOUND of it
is honest; one beyond is blamed, and its cause is named where a mistake explains 90% of its squared error.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.mismatch.columns import Columns

BOUND = 3.0  # floors, as G3; 200 honest pairs came to 1.77
NAMED = 0.9  # of the squared error
DEPARTS = 8.0  # floors, from which a token counts as the first that departs
TOLD = 3  # mistakes that cannot be told apart, at most
STALE = (
    "unexplained: no known mistake takes the error away and it is at every token, as of other weights than the "
    "checkpoint's (stale ones, or another finetune)"
)


@dataclass(frozen=True)
class Side:
    """rms: root mean square error against the oracle, nats; floors: it by that of the precision."""

    name: str
    rms: float
    floors: float
    first: tuple[int, int] | None  # sequence and position of the first token that departs
    cause: str | None
    best: list[tuple[str, float]]

    @property
    def off(self) -> bool:
        return not self.floors <= BOUND


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def alike(side: Side) -> list[str]:
    """The mistake that explains most, and the others that leave no more than rounding either: as no BOS and a first
    token out of sight, which are one thing where positions count by their distance alone."""
    left = [(name, side.floors * max(0.0, 1 - part) ** 0.5) for name, part in side.best]
    return [name for i, (name, floors) in enumerate(left) if i == 0 or (floors <= BOUND and i < TOLD)]


def judge(columns: Columns, answer: dict[str, Any], dtypes: dict[str, str]) -> list[Side]:
    """Both sides. dtypes: of each, "fp32", "bf16" or "fp16"."""
    right = torch.tensor(answer["right"], dtype=torch.float64)
    floors: dict[str, float] = answer["floors"]
    made = []
    for name, values in (("a", columns.a), ("b", columns.b)):
        error, floor = values - right, floors[dtypes[name]]
        size = rms(error.nan_to_num(nan=float("inf")))
        side = Side(name, size, size / floor, None, None, [(n, s) for n, s in answer["found"].get(name, [])])
        made.append(_explained(side, columns, error, floor, floors, dtypes[name]) if side.off else side)
    return made


def _explained(side: Side, columns: Columns, error: Tensor, floor: float, floors: dict[str, float], dtype: str) -> Side:
    departs = (~(error.abs() <= DEPARTS * floor)).nonzero().flatten()
    first = None
    if len(departs):
        n = int(departs[0])
        first = int(columns.sequence[n]), int(columns.position[n])
    cause = None
    if side.best and side.best[0][1] >= NAMED:
        cause = f"{', or '.join(alike(side))} (explains {side.best[0][1]:.1%} of its error)"
    elif dtype == "fp32" and any(side.rms <= 2 * floors[low] for low in ("fp16", "bf16")):
        low = min(("fp16", "bf16"), key=lambda low: abs(side.rms - floors[low]))
        cause = f"it computes in {low}: its error is {side.rms / floors[low]:.2f} of what that costs"
    elif (error.abs() > floor).double().mean() > 0.5:
        cause = STALE
    else:
        nearest = ", ".join(f"{name} ({part:.0%})" for name, part in side.best[:3])
        cause = f"unexplained; the nearest are {nearest}"
    return Side(side.name, side.rms, side.floors, first, cause, side.best)
