"""What a candidate did wrong when it was asked, in words: which method, what it raised, and where in its own file.

A crash is an error of the check that the method feeds, an answer of the wrong kind its failure; neither ends the run.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from parity.contract import Result, Status
from parity.outside import own_frame, what


class Crashed(Exception):
    """A method of the candidate raised. `where`: the candidate's own line, "my_port.py:12"."""

    def __init__(self, reason: str, where: str | None) -> None:
        super().__init__(reason)
        self.reason, self.where = reason, where

    @classmethod
    def of(cls, error: BaseException, asked: str, file: str | None) -> "Crashed":
        return cls(f"{asked} raised {what(error)}", own_frame(error.__traceback__, file))


class Unasked(NotImplementedError):
    """This one input cannot be given to the candidate; others can."""


class Wrong(Exception):
    """An answer that is none: of another type, shape or dtype than the interface's."""


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong while a candidate was run, as trace.json keeps it."""

    check: str
    gate: str
    status: str
    reason: str
    dtype: str | None = None
    where: str | None = None
    metric: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def failure(error: Exception, check: str, gate: str, dtype: str | None, metric: str | None = None) -> Failure:
    """A crash is an error; an answer that cannot be compared a failure."""
    if isinstance(error, Crashed):
        return Failure(check, gate, Status.ERROR.value, error.reason, dtype, error.where, metric)
    return Failure(check, gate, Status.FAIL.value, str(error), dtype, None, metric)


def results_of(path: str | None, meta: dict[str, Any]) -> list[Result]:
    """The failures in a candidate's trace.json as results of the checks that their methods feed."""
    found = []
    for entry in meta.get("failures", []):
        fields = entry | {"status": Status(entry["status"]), "path": path}
        found.append(Result(**fields))
    return found


def unrun(meta: dict[str, Any], path: str | None, dtype: str) -> Iterator[Result]:
    """Why a candidate gave nothing at a dtype. What it says itself that it cannot do is not required of it; where it
    crashed, that is said already."""
    if any(entry["dtype"] == dtype for entry in meta.get("failures", [])):
        return
    said = meta.get("undone", {}).get(dtype)
    no_room = f"the model does not fit into memory at {dtype}, and the candidate has no stream()"
    reason = no_room if said is None else f"not covered: {dtype}: {said}"
    yield Result("logits", "G3", Status.SKIP, dtype=dtype, path=path, reason=reason, required=said is None)
