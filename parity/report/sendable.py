"""What of a report can be sent to others: numbers, versions and verdicts; nothing of whose machine and whose texts.

    python -m parity.check --ckpt Meta-Llama-3.1-8B --result result.json

It is made of a closed list of fields. Left out are paths and names of files, prompts, tokens and places in them, what a
candidate or a file says in its own words, values of weights and activations, and the names of user and machine. What is
left of words must be of this project's own: a text with any other character than theirs becomes null.
"""

import re
from typing import Any

from parity.contract import Result
from parity.machine import installed
from parity.report.model import Divergence, Report

SCHEMA = "nanollama.result/1"
DISTRIBUTION = "llama-parity"
WORDS = re.compile(r"[A-Za-z0-9 _.,:;+()<>=%-]{0,400}")  # no slash, no quote, no line end, nothing beyond ASCII
OF_MACHINE = (
    *("system", "machine", "cpu_capability", "threads", "device", "python", "torch", "transformers"),
    *("llama_models", "fairscale", "safetensors", "tokenizers", "tiktoken"),
)
KINDS = {
    r"nanollama|parity\.candidates\..*": "nanollama",
    r"(.* )?cmd:.*": "a program",
    r"(.* )?https?://.*": "a server",
}


def sendable(report: Report, fingerprint: str | None) -> dict[str, Any]:
    """fingerprint: of the weights (parity/candidates/nano/checkpoint.py), by which a release is known again."""
    return {
        "schema": SCHEMA,
        "version": installed([DISTRIBUTION]).get(DISTRIBUTION),
        "candidate": kind_of(report.candidate),
        "fingerprint": fingerprint,
        **one(report),
        "twin": one(report.on_twin) if report.on_twin else None,
        "environment": {key: plain(report.environment.get(key)) for key in OF_MACHINE},
    }


def one(report: Report) -> dict[str, Any]:
    """Of one checkpoint: the user's, or its seeded twin."""
    entry = report.checkpoint
    return {
        "verdict": plain(report.verdict),
        "checkpoint": {"format": plain(entry.format), "config": numbers(entry.config), "parameters": entry.parameters},
        "references": plain(list(report.references)),
        "results": [row(result) for result in report.results],
        "first_divergence": departure(report.first_divergence),
        "noise_floor": plain([floor.as_json() for floor in report.noise_floor]),
        "rho": plain({label: curve.as_json() for label, curve in (report.rho or {}).items()}),
        "tokens": plain(report.tokens.as_json()),
        "streamed": plain(report.streamed),
        "seconds": report.seconds,
        "seconds_in_forward": report.seconds_in_forward,
        "peak_anonymous_bytes": report.peak_anonymous_bytes,
    }


def row(result: Result) -> dict[str, Any]:
    """Not `where` and `reason`, which may quote a text."""
    names = ("check", "gate", "reference", "dtype", "path", "metric", "value", "bound", "unit")
    return {"status": result.status.value, **{name: plain(getattr(result, name)) for name in names}}


def departure(found: Divergence | None) -> dict[str, Any] | None:
    """Where, and how far; not the values there."""
    if found is None:
        return None
    names = ("tap", "layer", "position", "rho", "reference", "dtype", "path")
    cause = found.probable_cause.replace("'", "")  # "the norm's eps": of this project's own table
    return {**{name: plain(getattr(found, name)) for name in names}, "probable_cause": plain(cause)}


def kind_of(candidate: str) -> str:
    """What a candidate is, not what it is called or where it lies."""
    return next((kind for form, kind in KINDS.items() if re.fullmatch(form, candidate)), "a Python module")


def numbers(value: Any) -> Any:
    """A config without its words, which are its publisher's."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items() if plain(str(key)) is not None}
    if isinstance(value, (list, tuple)):
        return [numbers(entry) for entry in value]
    return value if isinstance(value, (int, float)) else None


def plain(value: Any) -> Any:
    """The value with null in place of each text that is not of plain words; keys that are not are left out."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if plain(str(key)) is not None}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, str):
        return value if WORDS.fullmatch(value) else None
    return value
