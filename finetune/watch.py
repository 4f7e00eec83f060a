"""A run that goes wrong, seen while it does: a step whose loss or gradient stands far out, and a loss that has left
where it was and does not come back.

    watch = Watch()
    word = watch.see(loss, grad_norm)        # "" of a step like the others
    watch.diverged                           # why the run should end, "" while it need not
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

REMEMBERED = 50  # steps that a step is compared with
AT_LEAST = 20  # steps before anything is said
FAR_OUT = 8.0  # times the spread of the remembered
LEAST_SPIKE = 0.5  # nats; a rise that is less is no spike however quiet the run
LEAST_GROWTH = 10.0  # times the median gradient norm
SMOOTHING = 0.1  # of the mean that divergence goes by
LOST = 1.0  # nats above the lowest mean so far
LOST_STEPS = 25  # in a row
QUIET_STEPS = 20  # after a word no other for so long


class Watch:
    """Over the losses and gradient norms of a run, step by step."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.mean = self.lowest = math.inf
        self.seen = self.lost = 0
        self.last_word = -QUIET_STEPS
        self.diverged = ""

    @classmethod
    def replayed(cls, lines: Iterable[dict[str, Any]]) -> "Watch":
        """As it stands after the steps of a metrics.jsonl."""
        watch = cls()
        for line in lines:
            if "loss" in line and "grad_norm" in line:
                watch.see(line["loss"], line["grad_norm"])
        watch.diverged, watch.lost = "", 0  # who resumes a run that had diverged has seen it
        watch.lowest = watch.mean
        return watch

    def see(self, loss: float, grad_norm: float) -> str:
        """One step more; returns a word on it where it stands out."""
        word = self._word(loss, grad_norm)
        self.losses.append(loss)
        self.norms.append(grad_norm)
        self.seen += 1
        self.mean = loss if self.seen == 1 else (1 - SMOOTHING) * self.mean + SMOOTHING * loss
        if self.seen >= AT_LEAST:
            self.lowest = min(self.lowest, self.mean)
            self.lost = self.lost + 1 if self.mean > self.lowest + LOST else 0
        if self.lost == LOST_STEPS:
            self.diverged = (
                f"diverged: for {LOST_STEPS} steps the mean loss has been far above what it was "
                f"({self.mean:.2f}, before {self.lowest:.2f})"
            )
        return word

    def _word(self, loss: float, grad_norm: float) -> str:
        if len(self.losses) < AT_LEAST or self.seen - self.last_word < QUIET_STEPS:
            return ""
        usual, spread = _usual(self.losses)
        norm = float(np.median(self.norms))
        if loss > usual + max(FAR_OUT * spread, LEAST_SPIKE):
            word = f"the loss jumps to {loss:.2f} from about {usual:.2f}"
        elif grad_norm > LEAST_GROWTH * norm:
            word = f"the gradient's norm rises to {grad_norm:.3g} from about {norm:.3g}"
        else:
            return ""
        self.last_word = self.seen
        return word


def _usual(values: Iterable[float]) -> tuple[float, float]:
    """(median, spread), the spread of a normal distribution with these quartiles."""
    low, middle, high = np.percentile(list(values), (25, 50, 75))
    return float(middle), float(high - low) / 1.349
