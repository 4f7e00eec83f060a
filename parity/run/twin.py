"""A check's second half: the same candidate on a seeded twin of the user's checkpoint, and one report of both.

    python -m parity.check --ckpt SmolLM2-135M --candidate my_port.py:load               # the twin runs, too
    python -m parity.check --ckpt SmolLM2-135M --candidate my_port.py:load --twin off

parity/candidates/nano/twin.py writes the twin. nanollama is not asked twice: the kill matrix and the embedded
checkpoint are that half of its proof.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.contract import Result, Status

if TYPE_CHECKING:
    from parity.candidates.nano.checkpoint import Description
    from parity.candidates.probe import Probed

# What depends on weights. The rest (ids, table, config, stored bytes, training) is judged on the checkpoint itself.
CHECKS = ("ops", "taps", "logits", "kl", "argmax", "greedy", "cache", "metamorphic")
NEW_TOKENS = 8  # at most: the prompts are seeded ids, which no text could follow better
UNSEEN = "unseen without it: mistakes that large trained states drown, as the epsilon of a norm"
ORDER = ("fail", "limited", "quantized", "pass")  # of verdicts: the first of two is that of both


@dataclass(frozen=True)
class Absent:
    """Why a check has no twin. `status`: "off"; "none" where there can be none; "error" where it came to no end."""

    status: str
    why: str
    needed: bool = True  # whether something goes unseen

    @property
    def note(self) -> str:
        return f"{'--twin off' if self.status == 'off' else 'no twin'}: {self.why}; {UNSEEN}"


def absent(args: argparse.Namespace, checks: Sequence[str], checkpoint: "Description") -> Absent | None:
    """What is known before anything is written. None: a twin is to be tried."""
    from parity.candidates.nano.twin import is_seeded

    if args.ckpt is None or is_seeded(checkpoint):
        return Absent("none", "the checkpoint's weights are the seeded ones themselves", needed=False)
    if args.candidate == "nanollama":
        return Absent("none", "nanollama is proved on seeded weights by python -m parity.mutants", needed=False)
    if args.twin == "off":
        return Absent("off", "the candidate was not asked for seeded weights")
    if args.candidate.startswith(("http://", "https://")):
        return Absent("none", "a server keeps the model that it has")
    if not twin_checks(checks):
        return Absent("none", "none of the chosen checks depends on weights", needed=False)
    return None


def twin_checks(checks: Sequence[str]) -> list[str]:
    return [name for name in checks if name in CHECKS]


def unfit(own: "Probed | None", twin: "Probed | None", dtypes: list[str]) -> Absent | None:
    """Whether the candidate's first answers say that it does not load what it is given; None where they do not."""
    assert own is not None and twin is not None  # only nanollama is not probed
    if twin.failures:
        said = twin.failures[0]
        at = f" ({said['where']})" if said["where"] else ""
        return Absent("none", f"the candidate cannot load another checkpoint: {said['reason']}{at}")
    if twin.stops(dtypes):
        return Absent("none", f"the candidate does not take another checkpoint: {next(iter(twin.undone.values()))}")
    if own.answer is not None and own.answer == twin.answer:
        return Absent("none", "the candidate answers as before: it does not load the checkpoint that it is given")
    return None


def entry(path: Path, checkpoint: "Description") -> dict[str, Any]:
    return {"path": f"seeded twin of {path}", "format": checkpoint.format, "verified": []}


# --- One report of both ----------------------------------------------------------------------------------------------


def merge(report: dict[str, Any], twin: dict[str, Any] | Absent) -> dict[str, Any]:
    """The checkpoint's report with the twin's results and verdict in it; what else the twin's has is under "twin"."""
    report = _named(report, "given")
    if isinstance(twin, Absent):
        return _without(report, twin)
    twin = _named(twin, "twin")
    first, second = report["first_divergence"], twin["first_divergence"]
    word = min((report["verdict"], twin["verdict"]), key=ORDER.index)
    own = {key: value for key, value in twin.items() if key not in ("schema", "candidate", "references", "results")}
    return report | {
        "verdict": word,
        "why": _why(report, twin),
        "results": [*report["results"], *twin["results"]],
        "first_divergence": first or second,
        "twin": {"status": "run", **own},
        "seconds": round(report["seconds"] + twin["seconds"], 3),
        "seconds_in_forward": round(report["seconds_in_forward"] + twin["seconds_in_forward"], 3),
        "peak_anonymous_bytes": max(report["peak_anonymous_bytes"], twin["peak_anonymous_bytes"]),
    }


def _named(report: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The report, whose results and divergence say on which checkpoint they are."""
    first = report["first_divergence"]
    results = [r | {"checkpoint": checkpoint} for r in report["results"]]
    return report | {"results": results, "first_divergence": first and first | {"checkpoint": checkpoint}}


def _why(report: dict[str, Any], twin: dict[str, Any]) -> str:
    if report["verdict"] == twin["verdict"] == "pass":
        more = sum(r["status"] == "pass" for r in twin["results"])
        passed = sum(r["status"] == "pass" for r in report["results"])
        return f"{passed + more} results passed, {more} of them on the seeded twin"
    own, other = f"on the checkpoint {report['why']}", f"on its seeded twin {twin['why']}"
    if ORDER.index(twin["verdict"]) < ORDER.index(report["verdict"]):
        return f"{other}; {own}"
    return f"{own}; {other}"


def _without(report: dict[str, Any], twin: Absent) -> dict[str, Any]:
    made = report | {"twin": {"status": twin.status, "why": twin.why}}
    if twin.needed:
        made["notices"] = [*report["notices"], twin.note]
    if twin.status == "error":
        skip = Result("logits", "G3", Status.SKIP, reason=twin.note, checkpoint="twin")
        made["results"] = [*report["results"], skip.as_json()]
        if ORDER.index("limited") < ORDER.index(report["verdict"]):
            made |= {"verdict": "limited", "why": f"the seeded twin could not be judged: {twin.why}"}
    return made
