"""What one candidate's run at one dtype leaves besides its tensors; each thing asked of it is a step of its own.

What the interface cannot do is left as `uncovered`, what goes wrong as `failures`, and neither ends the run: what the
other steps found is kept.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from parity.candidates.crash import Crashed, Failure, Wrong, failure

Progress = Callable[[str, float], None]
EXTRA_ROWS = 64  # of each other way to run a sequence, at most: positions


@dataclass
class Recording:
    """What one dtype's run leaves in trace.json besides the tensors."""

    dtype: str
    generated: list[list[int]] = field(default_factory=list)
    same: dict[str, float] = field(default_factory=dict)  # bitwise relations: largest |difference|
    extra: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # kind -> sequence -> positions
    answers: list[dict[str, int]] = field(default_factory=list)  # where there are no logits: position -> next token
    log_probs: list[dict[str, dict[str, float]]] = field(default_factory=list)  # position -> id -> log-probability
    uncovered: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    done: bool = False  # the forward pass, without which nothing is compared
    seconds: float = 0.0

    @contextmanager
    def step(self, kind: str, check: str, gate: str, metric: str | None = None) -> Iterator[None]:
        """One thing asked of the candidate: what it cannot do and what goes wrong in it is written down."""
        try:
            yield
        except NotImplementedError as error:
            self.extra.pop(kind, None)
            self.uncovered[kind] = first_line(error) or "the candidate says that it cannot do this"
        except (Crashed, Wrong) as error:
            self.extra.pop(kind, None)
            self.failures.append(failure(error, check, gate, self.dtype, metric))
            self.uncovered[kind] = "it ended in a failure"

    @contextmanager
    def count_seconds(self) -> Iterator[None]:
        """Of the candidate's forward passes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
