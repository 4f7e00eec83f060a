"""A check's second half: the same candidate on a seeded twin of the user's checkpoint, and one report of both.

    python -m parity.check --ckpt SmolLM2-135M --candidate my_port.py:load               # the twin runs, too
    python -m parity.check --ckpt SmolLM2-135M --candidate my_port.py:load --twin off

parity/candidates/nano/twin.py writes the twin. nanollama is not asked twice: the kill matrix and the embedded
checkpoint are that half of its proof.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from parity.candidates.limits import split_limits
from parity.contract import Result, Status
from parity.report.model import Absent, CheckpointEntry, Report
from parity.run.request import Request

if TYPE_CHECKING:
    from parity.candidates.nano.checkpoint import Description
    from parity.candidates.probe import Probed

# What depends on weights. The rest (ids, table, config, stored bytes, training) is judged on the checkpoint itself.
CHECKS = ("ops", "taps", "logits", "kl", "argmax", "greedy", "cache", "metamorphic")
NEW_TOKENS = 8  # at most: the prompts are seeded ids, which no text could follow better
ORDER = ("fail", "limited", "quantized", "pass")  # of verdicts: the first of two is that of both


def absent(request: Request, checkpoint: "Description") -> Absent | None:
    """What is known before anything is written. None: a twin is to be tried."""
    from parity.candidates.nano.twin import is_seeded

    if request.ckpt is None or is_seeded(checkpoint):
        return Absent("none", "the checkpoint's weights are the seeded ones themselves", needed=False)
    if request.candidate == "nanollama":
        return Absent("none", "nanollama is proved on seeded weights by python -m parity.mutants", needed=False)
    if not request.twin:
        return Absent("off", "the candidate was not asked for seeded weights")
    if split_limits(request.candidate)[1].startswith(("http://", "https://")):
        return Absent("none", "a server keeps the model that it has")
    if not twin_checks(request.checks):
        return Absent("none", "none of the chosen checks depends on weights", needed=False)
    return None


def twin_checks(checks: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in checks if name in CHECKS)


def ask_twin(request: Request) -> Request:
    """What is asked on the twin: its prompts are ids."""
    new_tokens = min(request.max_new_tokens, NEW_TOKENS)
    return replace(request, prompts=None, max_new_tokens=new_tokens, checks=twin_checks(request.checks))


def unfit(own: "Probed | None", twin: "Probed | None", dtypes: Sequence[str]) -> Absent | None:
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


def entry(path: Path, checkpoint: "Description") -> CheckpointEntry:
    name = f"seeded twin of {path}"
    return CheckpointEntry(name, checkpoint.format, checkpoint.config, checkpoint.parameters, verified=[])


# --- One report of both ----------------------------------------------------------------------------------------------


def merge(report: Report, twin: Report | Absent) -> Report:
    """The checkpoint's report with the twin's results and verdict in it; what else the twin's has is its own."""
    report = _named(report, "given")
    if isinstance(twin, Absent):
        return _without(report, twin)
    twin = _named(twin, "twin")
    return replace(
        report,
        verdict=min((report.verdict, twin.verdict), key=ORDER.index),
        why=_why(report, twin),
        results=[*report.results, *twin.results],
        first_divergence=report.first_divergence or twin.first_divergence,
        twin=twin,
        seconds=round(report.seconds + twin.seconds, 3),
        seconds_in_forward=round(report.seconds_in_forward + twin.seconds_in_forward, 3),
        peak_anonymous_bytes=max(report.peak_anonymous_bytes, twin.peak_anonymous_bytes),
    )


def _named(report: Report, checkpoint: str) -> Report:
    """The report, whose results and divergence say on which checkpoint they are."""
    first = report.first_divergence
    results = [replace(result, checkpoint=checkpoint) for result in report.results]
    return replace(report, results=results, first_divergence=first and replace(first, checkpoint=checkpoint))


def _why(report: Report, twin: Report) -> str:
    if report.verdict == twin.verdict == "pass":
        passed, more = (sum(r.status is Status.PASS for r in one.results) for one in (report, twin))
        return f"{passed + more} results passed, {more} of them on the seeded twin"
    own, other = f"on the checkpoint {report.why}", f"on its seeded twin {twin.why}"
    if ORDER.index(twin.verdict) < ORDER.index(report.verdict):
        return f"{other}; {own}"
    return f"{own}; {other}"


def _without(report: Report, twin: Absent) -> Report:
    made = replace(report, twin=twin)
    if twin.needed:
        made = replace(made, notices=[*report.notices, twin.note])
    if twin.status == "error":
        skip = Result("logits", "G3", Status.SKIP, reason=twin.note, checkpoint="twin")
        made = replace(made, results=[*report.results, skip])
        if ORDER.index("limited") < ORDER.index(report.verdict):
            made = replace(made, verdict="limited", why=f"the seeded twin could not be judged: {twin.why}")
    return made
