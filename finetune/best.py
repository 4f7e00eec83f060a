"""OUT/best/step_N: the trained parameters of the step with the lowest validation loss so far.

A run's state names the step of its best; parameters of an older best go only when a checkpoint that names the newer one
is on the disk, so that a kill at any moment leaves the best that the resumed run asks for.

    OUT/best/step_00000200/{model.safetensors, state.json}
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from finetune.errors import UserError
from finetune.evaluate import Score
from finetune.optim import trained
from finetune.tensors import read_tensors, write_tensors
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


def write_best(out: Path, step: int, model: nn.Module) -> None:
    """Raises CheckpointError when the disk refuses."""
    folder = folder_of(out, step)
    if (folder / "state.json").exists():  # done before a kill: the same numbers
        return
    with staged(folder) as stage:
        write_tensors(stage, "model.safetensors", trained(model))
        stage.text("state.json", json.dumps({"schema": SCHEMA, "step": step}) + "\n")


def load_best_(out: Path, step: int, model: nn.Module) -> None:
    """The model's trained parameters become those of that step. Raises UserError."""
    folder, parameters = folder_of(out, step), trained(model)
    weights = read_tensors(folder / "model.safetensors", next(model.parameters()).device)
    if weights.keys() != parameters.keys():
        raise UserError(f"{folder}: model.safetensors does not hold the parameters that this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def keep_only(out: Path, step: int | None) -> None:
    """Remove what is kept of other steps."""
    kept = folder_of(out, step) if step is not None else None
    for folder in (out / "best").glob("*step_*"):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
