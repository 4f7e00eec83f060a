"""The report of a candidate that the references were not run for: it cannot be loaded, or asked for a single token."""

from typing import Any

from parity.candidates.crash import results_of, unrun
from parity.candidates.nano.checkpoint import Description
from parity.candidates.probe import Probed
from parity.contract import Result, Status
from parity.machine import threads_for
from parity.report.summary import SCHEMA, environment, own_peak_bytes, verdict


def report(
    found: Probed,
    candidate: str,
    chosen: dict[str, Any],
    checkpoint: Description,
    entry: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Of the same schema as every other; nothing in it was compared."""
    meta = {"failures": found.failures, "undone": found.undone}
    results = [*results_of(None, meta), *(r for dtype in found.undone for r in unrun(meta, None, dtype))]
    word, why = verdict(results, list(chosen["dtypes"]), 0)
    errors = [r for r in results if r.status is not Status.SKIP]
    decided = dict.fromkeys(chosen["dtypes"], 0.0)
    return {
        "schema": SCHEMA,
        "verdict": word,
        "why": f"{said(errors)}; the references were not run" if errors else f"{why}: {said(results)}",
        "candidate": candidate,
        "references": chosen["references"],
        "checkpoint": entry | {"config": checkpoint.config, "parameters": checkpoint.parameters},
        "environment": environment(threads_for(checkpoint.stored_bytes), "cpu"),
        "results": [r.as_json() for r in results],
        "first_divergence": None,
        "twin": {"status": "none", "why": "the candidate could not be asked"},
        "errata": [],
        "notices": [*checkpoint.notices, *found.notices],
        "cached": [],
        "noise_floor": [],
        "rho": {},
        "training": {},
        "quantized": [],
        "streamed": {},
        "tokens": {
            "prompts": 0,
            "positions": 0,
            "longest": 0,
            "new_tokens": 0,
            "decided_fraction": 0.0,
            "decided_fraction_by_dtype": decided,
        },
        "seconds": round(seconds, 3),
        "seconds_in_forward": 0.0,
        "peak_anonymous_bytes": own_peak_bytes(),
    }


def said(results: list[Result]) -> str:
    return "; ".join(dict.fromkeys(str(r.reason) for r in results))
