"""What the table of mistakes says about a tap: a name, a precision by its size, or the nearest that explain less."""

import math
from dataclasses import dataclass
from typing import Any

NAMED = 0.9  # of the squared error: what explains less is not named
TIED = 1e-9  # two that differ by less say the same of these numbers
SIZE = (0.5, 1.6)  # of the error that a lower precision makes: one of that size may be it
# Correlation with the oracle's rounding to it: 0.55 to 0.98 of four models in bf16, below 0.1 of other errors.
ALIKE = 0.2


@dataclass(frozen=True)
class Explained:
    """What the table of mistakes says about one tap."""

    tap: str
    dtype: str
    path: str | None  # of the candidate
    found: list[tuple[str, float]]  # mistakes and their share of the squared error, the best first
    size: tuple[str, float, str] | None  # precision, the error by that which it makes, of whom
    tokens: int
    asked: int  # mistakes
    of: int

    @property
    def name(self) -> str | None:
        """The mistake, or those that cannot be told apart here."""
        if not self.found or self.found[0][1] < NAMED:
            return None
        return ", or ".join(name for name, part in self.found if self.found[0][1] - part < TIED)

    @property
    def told(self) -> bool:
        """Whether there is a name, or a precision by its size."""
        return self.name is not None or self.size is not None

    def __str__(self) -> str:
        if self.name is not None:
            rest = [(name, part) for name, part in self.found if self.found[0][1] - part >= TIED]
            others = f"; the next explains {share(rest[0][1])}: {rest[0][0]}" if rest else ""
            return f"{self.name} (explains {share(self.found[0][1])} of the error{others})"
        if self.size is not None:
            precision, part, whose = self.size
            return f"it computes in {precision}: its error is {part:.2f} of {whose} in {precision}"
        best = ", ".join(f"{name} ({share(part)})" for name, part in self.found[:3])
        return f"unexplained: of {self.asked} mistakes none explains {NAMED:.0%} of the error; the nearest are {best}"

    def as_json(self) -> dict[str, Any]:
        found = [{"mistake": name, "share": part} for name, part in self.found[:3]]
        size = dict(zip(("precision", "ratio", "of"), self.size, strict=True)) if self.size else None
        return {"named": self.name, "best": found, "size": size, "tokens": self.tokens, "asked": self.asked,
                "of": self.of}  # fmt: skip


def share(part: float) -> str:
    return f"{max(part, 0.0):.2%}"


def of_size(error: float, known: dict[str, tuple[float, str, float]]) -> tuple[str, float, str] | None:
    """The precision whose error is nearest, if it is near enough, and goes the same way; whatever else has its size."""
    ratios = {dtype: (error / size, whose) for dtype, (size, whose, alike) in known.items() if size and alike >= ALIKE}
    near = {dtype: found for dtype, found in ratios.items() if SIZE[0] <= found[0] <= SIZE[1]}
    best = min(near, key=lambda dtype: abs(math.log(near[dtype][0])), default=None)
    return None if best is None else (best, *near[best])
