"""The report of a candidate that the references were not run for: it cannot be loaded, or asked for a single token."""

from parity.candidates.crash import results_of, unrun
from parity.candidates.nano.checkpoint import Description
from parity.candidates.probe import Probed
from parity.checks.verdict import decide
from parity.contract import Result, Status
from parity.machine import environment, own_anonymous_bytes, threads_for
from parity.report.model import Absent, CheckpointEntry, Report, Tokens
from parity.run.request import Request


def report(request: Request, found: Probed, checkpoint: Description, entry: CheckpointEntry, seconds: float) -> Report:
    """Of the same schema as every other; nothing in it was compared."""
    meta = {"failures": found.failures, "undone": found.undone}
    results = [*results_of(None, meta), *(r for dtype in found.undone for r in unrun(meta, None, dtype))]
    word, why = decide(results, request.dtypes, 0)
    errors = [r for r in results if r.status is not Status.SKIP]
    return Report(
        verdict=word,
        why=f"{said(errors)}; the references were not run" if errors else f"{why}: {said(results)}",
        candidate=request.candidate,
        references=list(request.references),
        checkpoint=entry,
        environment=environment(threads_for(checkpoint.stored_bytes), "cpu"),
        results=results,
        tokens=Tokens(0, 0, 0, dict.fromkeys(request.dtypes, 0.0), new_tokens=0),
        notices=[*checkpoint.notices, *found.notices],
        cached=[],
        rho={},
        streamed={},
        twin=Absent("none", "the candidate could not be asked"),
        seconds=round(seconds, 3),
        peak_anonymous_bytes=own_anonymous_bytes(),
    )


def said(results: list[Result]) -> str:
    return "; ".join(dict.fromkeys(str(r.reason) for r in results))
