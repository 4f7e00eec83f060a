"""OUT/best/step_N: the trained parameters of the step with the lowest validation loss so far.

A run's state names the step of its best; parameters of an older best go only when a checkpoint that names the newer one
is on the disk, so that a kill at any moment leaves the best that the resumed run asks for.

    OUT/best/step_00000200/{model.safetensors, state.json}
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from finetune.evaluate import Score
from finetune.gather import Whole
from finetune.optim import trained
from finetune.tensors import read_into_, write_tensors
from nanollama.checkpoint.staging import staged

SCHEMA = "nanollama.best/1"


@dataclass(frozen=True)
class Best:
    """The best validation of a run so far, and how many since were no better."""

    step: int
    score: Score
    waited: int = 0

    def after(self, step: int, score: Score) -> "Best":
        """With one validation more. A loss that is no number is never better."""
        return Best(step, score) if score.loss < self.score.loss else Best(self.step, self.score, self.waited + 1)


def folder_of(out: Path, step: int) -> Path:
    return out / "best" / f"step_{step:08d}"


def write_best(out: Path, step: int, model: nn.Module, whole: Whole = Tensor.detach) -> None:
    """Raises CheckpointError when the disk refuses. whole: gives a trained parameter in one piece."""
    folder = folder_of(out, step)
    if (folder / "state.json").exists():  # done before a kill: the same numbers
        return
    with staged(folder) as stage:
        write_tensors(stage, "model.safetensors", trained(model), whole)
        stage.text("state.json", json.dumps({"schema": SCHEMA, "step": step}) + "\n")


def load_best_(out: Path, step: int, model: nn.Module) -> None:
    """The model's trained parameters become those of that step, each rank's its part. Raises UserError."""
    read_into_(trained(model), folder_of(out, step) / "model.safetensors")


def remove_older(out: Path, step: int) -> None:
    """Remove what is kept of steps before it. A newer one stays: training may be at it while an older save ends."""
    for folder in (out / "best").glob("*step_*"):
        found = re.search(r"step_(\d+)", folder.name)
        if found and int(found[1]) < step:
            shutil.rmtree(folder, ignore_errors=True)


def keep_only(out: Path, step: int | None) -> None:
    """Remove what is kept of other steps."""
    kept = folder_of(out, step) if step is not None else None
    for folder in (out / "best").glob("*step_*"):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
