"""Every way of training but the plain one: pairs of answers, a teacher, adapters; each on the weights as loaded.

meta["training"] |= run_objectives(trainable, case.training, out)
"""

from pathlib import Path
from typing import Any

from reference.adapters import run_adapters
from reference.distillation import run_distillation
from reference.preferences import run_preferences
from reference.training import Trainable


def run_objectives(trainable: Trainable, training: dict[str, Any], out: Path) -> dict[str, dict[str, float]]:
    """{objective: {kind: loss}}; gradients go into files of OUT. The parameters are as before, after it."""
    documents = training["batches"][0]
    return {
        "preferences": run_preferences(trainable, training["preferences"], out),
        "distillation": run_distillation(trainable, training["distillation"], documents, out),
        "adapters": run_adapters(trainable, training["adapters"], documents, out),
    }
