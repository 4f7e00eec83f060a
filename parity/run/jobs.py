"""The processes of a run: what each is called, what it is started with, and where it leaves its trace."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity.contract import Case

CANDIDATE = "parity.candidates"  # the module that runs one
CANDIDATE_KEYS = ("prompt_lengths", "too_large", "vocab_size", "context")  # of a case, which references need not know
# A case's questions that do not depend on the dtype, left out: asked once.
NO_IDENTITY: dict[str, Any] = {"texts": None, "corpus": [], "dialogs": [], "weights": False, "spare_prompts": None}


@dataclass(frozen=True)
class Job:
    """One process."""

    label: str  # what the progress bar shows
    module: str
    arguments: tuple[str, ...]
    out: Path

    @property
    def waits(self) -> bool:
        """Whether it reads its case from standard input, so that it can be started before there is one."""
        return self.arguments[:2] == ("--case", "-")

    def add(self, *flags: str) -> "Job":
        return replace(self, arguments=(*self.arguments, *flags))


def case_file(folder: Path, label: str) -> Path:
    return folder / f"{label}.json"


def reference_job(folder: Path, module: str, label: str, case: Case | None = None) -> Job:
    """A process of `reference`; without a case, it waits for it on standard input."""
    file = "-" if case is None else str(case.write(case_file(folder, label), *CANDIDATE_KEYS))
    out = folder / label
    return Job(label, f"reference.{module}", ("--case", file, "--out", str(out)), out)


def candidate_job(folder: Path, name: str, path: str | None, case: Case, forced: list[Path]) -> Job:
    """One path of a candidate. forced: traces whose inputs its operations are given."""
    label = f"candidate {path or ''}".strip()
    out = folder / label.replace(" ", "-")
    file = case.write(case_file(folder, out.name))
    return Job(label, CANDIDATE, (name, path or "-", str(file), str(out), *map(str, forced)), out)


def awaited(job: Job, folder: Path) -> str:
    """What a process that was started before its job reads on standard input: its case; a candidate, its arguments."""
    if job.module == CANDIDATE:
        return json.dumps(job.arguments) + "\n"
    return case_file(folder, job.label).read_text()
