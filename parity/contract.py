"""The nouns of the harness: Case, Candidate, Result, Status, and the names that checkpoints, taps and dtypes go by.

A Case is run by a reference, the oracle or a candidate into a Trace (see trace.py); comparing traces gives Results.
Outside programs write the same files: docs/parity.md has the two formats.
"""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from nanollama.cli import UsageError
from reference.protocol import CASE_SCHEMA

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Unit roundoff: the largest relative error of one rounding. Gates are floored at half of it.
UNIT: dict[str, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


class Status(str, Enum):
    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True)
class Result:
    """One judgement. `value` and `bound` are in `unit`; `where` names the worst place, `reason` says why in words."""

    check: str
    gate: str
    status: Status
    reference: str | None = None
    dtype: str | None = None
    path: str | None = None  # which of the candidate's paths ("exact", "fast"), None for the only one
    metric: str | None = None
    value: float | None = None
    bound: float | None = None
    unit: str | None = None
    where: str | None = None
    reason: str | None = None
    required: bool = True
    checkpoint: str = "given"  # or "twin": its seeded twin, see parity/run/twin.py

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status.value}


def judge(value: float, bound: float, **fields: Any) -> Result:
    """A Result that passes when value <= bound. A value that is not a number never passes."""
    status = Status.PASS if value <= bound else Status.FAIL
    return Result(status=status, value=value, bound=bound, **fields)


@dataclass(frozen=True)
class Case:
    """What to run and what to record; written as JSON for every process of a run.

    `prompts` are token ids; None: the ids of `texts` (with BOS, by the implementation's own tokenizer).
    `positions`: per sequence, where taps are kept (None: everywhere); `n_positions` asks the first reference, which
    makes the sequences, to spread that many over each. `whole_bytes`: the largest model at its run dtype that is run
    whole and not layer by layer (None: decided from the machine's memory).
    """

    checkpoint: str
    dtypes: list[str]
    prompts: list[list[int]] | None = None
    texts: list[str] | None = None
    corpus: list[str] = field(default_factory=list)
    dialogs: list[list[dict[str, Any]]] = field(default_factory=list)
    tokenizer: str | None = None
    device: str = "cpu"
    threads: int = 1
    max_new_tokens: int = 0
    spare_prompts: list[list[int]] | None = None  # ids of `texts` where the first reference has no tokenizer
    record: str = "taps"  # or "logits", or "text": token ids alone
    positions: list[list[int]] | None = None
    n_positions: int | None = None
    rope_positions: list[int] = field(default_factory=list)
    weights: bool = False
    training: dict[str, Any] | None = None  # what is trained on, see parity/run/training.py
    stream: str = "auto"
    whole_bytes: int | None = None
    prompt_lengths: list[int] | None = None  # of `prompts` that already carry a continuation
    too_large: list[str] = field(default_factory=list)  # dtypes at which the model does not fit whole into memory
    vocab_size: int | None = None  # rows of the output head
    context: int | None = None  # positions that the candidate may be asked for
    schema: str = CASE_SCHEMA

    def write(self, path: Path, *without: str) -> Path:
        """As JSON; `without` names keys that the reader does not know."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({k: v for k, v in asdict(self).items() if k not in without}))
        return path

    @classmethod
    def read(cls, path: Path) -> "Case":
        case = cls(**json.loads(path.read_text()))
        if case.schema != CASE_SCHEMA:
            raise UsageError(f"{path} has schema {case.schema!r}: this version reads {CASE_SCHEMA!r}")
        return case
