"""Checkpoints of a run: everything that the next step depends on, written so that a kill at any moment leaves a whole
one.

    OUT/checkpoints/step_000100/{model.safetensors, optimizer.safetensors, state.json}

Files are written under temporary names and renamed when all are on the disk, state.json last: a folder without it is
no checkpoint. Only trained parameters are stored; frozen ones come from where the run started. The RNG needs no state:
each step seeds it by (seed, step, rank), so dropout repeats too.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from finetune.data.packing import Cursor
from finetune.optim import trained
from nanollama.checkpoint import CheckpointError
from nanollama.checkpoint.staging import Stage, staged
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import lazy

SCHEMA = "nanollama.run/1"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # labels trained on
    cursor: Cursor = field(default_factory=Cursor)  # of the next row


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in (out / "checkpoints").glob("step_*/state.json"))


def save(
    out: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any],
    fingerprint: str,
) -> Path:
    """Write a checkpoint, then remove the older ones. Raises CheckpointError when the disk refuses; they then stay."""
    folder = out / "checkpoints" / f"step_{progress.step:08d}"
    if (folder / "state.json").exists():
        return folder
    tensors, scalars = _optimizer_state(model, optimizer)
    state = {
        "schema": SCHEMA,
        "progress": asdict(progress),
        "rng": "seeded by (seed, step, rank) at each step",
        "optimizer": scalars,
        "data": fingerprint,
        "torch": torch.__version__,
        "config": dict(config),
    }
    older = checkpoints(out)
    with staged(folder) as stage:
        _write_tensors(stage, "model.safetensors", dict(trained(model)))
        _write_tensors(stage, "optimizer.safetensors", tensors)
        stage.text("state.json", json.dumps(state, indent=2) + "\n")
    for old in older:
        _remove(old)
    return folder


def restore_(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, fingerprint: str) -> Progress:
    """Load the newest checkpoint of the run in `out`; a run without any starts at step 0. Raises ValueError."""
    clean(out)
    found = checkpoints(out)
    if not found:
        return Progress()
    folder = found[-1]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("schema") != SCHEMA:
        raise CheckpointError(folder, f"state.json has schema {state.get('schema')!r}: expected {SCHEMA!r}")
    if state["data"] != fingerprint:
        raise CheckpointError(folder, "the data or its tokenizer has changed since this run was saved: bring it back")
    device = next(model.parameters()).device
    weights = _read_tensors(folder / "model.safetensors", device)
    parameters = trained(model)
    if weights.keys() != parameters.keys():
        raise CheckpointError(folder, "model.safetensors does not hold the parameters that this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    _restore_optimizer_(model, optimizer, _read_tensors(folder / "optimizer.safetensors", device), state["optimizer"])
    progress = state["progress"]
    return Progress(progress["step"], progress["tokens"], Cursor(**progress["cursor"]))


def clean(out: Path) -> None:
    """Remove what a kill left behind: half-written checkpoints, and older ones than the newest."""
    newest = checkpoints(out)[-1:]
    for folder in (out / "checkpoints").glob("step_*"):
        if folder not in newest:
            _remove(folder)


def _remove(folder: Path) -> None:
    (folder / "state.json").unlink(missing_ok=True)  # first: what is left is no checkpoint any more
    shutil.rmtree(folder, ignore_errors=True)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(tensors, numbers) by "parameter name:state name"."""
    tensors, scalars = {}, {}
    for name, parameter in trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value.ndim:
                tensors[f"{name}:{key}"] = value
            else:
                scalars[f"{name}:{key}"] = value.item()
    return tensors, scalars


def _restore_optimizer_(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, float]
) -> None:
    # Not by load_state_dict, which casts every state to its parameter's dtype: bytes and their scales stay as they are.
    for name, parameter in trained(model).items():
        prefix = f"{name}:"
        numbers = {n: torch.tensor(v, dtype=torch.float32, device=parameter.device) for n, v in scalars.items()}
        values = {n.removeprefix(prefix): v for n, v in {**tensors, **numbers}.items() if n.startswith(prefix)}
        if values:
            optimizer.state[parameter] = values


def _write_tensors(stage: Stage, name: str, tensors: Mapping[str, Tensor]) -> None:
    with stage.open(name) as file:
        write_safetensors(file, {key: lazy(t.detach().cpu()) for key, t in tensors.items()})


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            path, f"cannot be read ({error}): remove its folder to continue from an older one"
        ) from None
