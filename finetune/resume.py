"""OUT, the folder of a run: begun with a config.json that says all that the run depends on, found again by --resume,
with checkpoints of everything that the next step depends on.

    folder = begin("text", config)
    folder = resume("text", given, defaults)

    OUT/config.json
    OUT/checkpoints/step_00000100/{model.safetensors, optimizer.safetensors, state.json}

A kill at any moment leaves a whole checkpoint: files are written under temporary names and renamed when all are on the
disk, state.json last; a folder without it is no checkpoint. Only trained parameters are stored; frozen ones come from
where the run started. The RNG needs no state: each step seeds it by (seed, step, rank), so dropout repeats too.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from finetune.config import TrainConfig, from_json, merge_resumed, to_json
from finetune.data.files import write_atomically
from finetune.data.packing import Cursor
from finetune.errors import UserError
from finetune.gather import Whole, local
from finetune.mesh import mesh_sizes
from finetune.optim import trained
from finetune.parallelize import World, world_size
from finetune.restore import SCHEMA, SHARDS, check_checkpoint, check_config_types, read_file, taken, with_older
from finetune.shards import read_shards
from nanollama.checkpoint.staging import Stage, staged
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import Lazy
from nanollama.tensor_parallel import like, part_of

CONFIG = "config.json"
BEFORE = ("left_out.json", "doctor.json", "environment.json")  # what may lie beside it before the first step


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # labels trained on
    cursor: Cursor = field(default_factory=Cursor)  # of the next row


@dataclass(frozen=True)
class RunFolder:
    """OUT, and the complete config of its run: no field is left to a preset or to the device."""

    path: Path
    config: TrainConfig
    micro_batches: int = 0  # in a step, on all ranks together, as the run was begun; 0: as the config and the ranks say

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fingerprint: str,
        whole: Whole = Tensor.detach,
    ) -> None:
        """Write a checkpoint, then remove the older ones. Raises CheckpointError when the disk refuses; they stay then.

        fingerprint: of the data. whole: what gives a tensor of `saved_tensors` in one piece.
        """
        folder = self.checkpoint(progress.step)
        if (folder / "state.json").exists():
            return
        tensors, _ = _optimizer_state(model, optimizer)
        finish = self.finisher(progress, model, optimizer, fingerprint)
        with staged(folder) as stage:
            _write_tensors(stage, "model.safetensors", trained(model), whole)
            _write_tensors(stage, "optimizer.safetensors", tensors, whole)
        finish()

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}"

    def finisher(
        self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
    ) -> Callable[[], None]:
        """What makes a folder with the tensors of now a checkpoint: state.json. Then the older ones are removed."""
        state = {
            "schema": SCHEMA,
            "progress": asdict(progress),
            "rng": "seeded by (seed, step, rank) at each step",
            "optimizer": _optimizer_state(model, optimizer)[1],
            "data": fingerprint,
            "torch": torch.__version__,
            "config": to_json(replace(self.config, resume=False)),
        }
        older, folder = checkpoints(self.path), self.checkpoint(progress.step)

        def finish() -> None:
            with staged(folder) as stage:
                stage.text("state.json", json.dumps(state, indent=2) + "\n")
            for old in older:
                _remove(old)

        return finish

    def restore_(self, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str) -> Progress:
        """Load the newest checkpoint; a run without any starts at step 0. Raises UserError."""
        found = checkpoints(self.path)
        if not found:
            self._clean()
            return Progress()
        folder = found[-1]
        try:
            state = check_checkpoint(folder, self.config, trained(model))
        except UserError as error:
            raise with_older(error, folder, found[-2] if len(found) > 1 else None) from None
        if state.data != fingerprint:
            raise UserError(f"{folder}: the data or its tokenizer has changed since this run was saved: bring it back")
        self._clean()
        parameters = trained(model)
        weights, states = _read_state(folder, parameters)
        if weights.keys() != parameters.keys():
            raise UserError(f"{folder}: does not hold the parameters that this run trains")
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(weights[name])
        _restore_optimizer_(optimizer, parameters, states, state.scalars)
        return Progress(state.step, state.tokens, state.cursor)

    def _clean(self) -> None:
        """Remove what a kill left behind: half-written checkpoints, and older ones than the newest."""
        newest = checkpoints(self.path)[-1:]
        for folder in (self.path / "checkpoints").glob("step_*"):
            if folder not in newest:
                _remove(folder)

    @contextmanager
    def forgotten_if_refused(self, world: World) -> Iterator[None]:
        """A run that is refused before its first step leaves no folder, so that the mended line can be typed."""
        try:
            yield
        except ValueError:
            if world.is_main and {path.name for path in self.path.iterdir()} <= {CONFIG, *BEFORE}:
                shutil.rmtree(self.path)
            raise


def begin(entry: str, config: TrainConfig) -> RunFolder:
    """A new folder with config.json in it. Raises UserError when it holds something."""
    out = Path(config.out or f"out/{entry}-{time.strftime('%Y%m%d-%H%M%S')}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file")
    inside = [p.name for p in out.iterdir() if not p.name.endswith(".partial")] if out.exists() else []
    if CONFIG in inside:
        raise UserError(f"--out {out}: holds a run already: add --resume to continue it, or choose another folder")
    if inside:
        raise UserError(f"--out {out}: is not empty (it holds {min(inside)}): choose another folder")
    config = replace(config, out=str(out))
    ranks = world_size()
    sizes = mesh_sizes(config.dp, config.fsdp, config.tp, world_size=ranks)
    micro_batches = config.accumulate * sizes.dp * sizes.fsdp
    saved = {"entry": entry, "world_size": ranks, "micro_batches": micro_batches, **to_json(config)}
    write_atomically(out / CONFIG, (json.dumps(saved, indent=2) + "\n").encode())
    return RunFolder(out, config)


def resume(entry: str, given: TrainConfig, defaults: TrainConfig) -> RunFolder:
    """The folder of the run that `--resume` continues, its config with what of `given` may differ; the ranks may, too.

    defaults: the entry's; a flag that has its default counts as not given. Raises UserError.
    """
    if given.out is None:
        raise UserError("--resume needs --out, the folder of the run to continue")
    path = Path(given.out) / CONFIG
    if not path.exists():
        raise UserError(
            f"--out {given.out}: holds no run to resume (config.json is missing): drop --resume to start one"
        )
    saved = read_file(path)
    if taken(saved, "entry", str, path) != entry:
        raise UserError(f"--out {given.out}: holds a run of another entry: resume it with the command that began it")
    ranks = taken(saved, "world_size", int, path)
    micro_batches = taken(saved, "micro_batches", int, path) if "micro_batches" in saved else 0
    saved = {key: value for key, value in saved.items() if key not in ("entry", "world_size", "micro_batches")}
    check_config_types(saved, path)
    micro_batches = micro_batches or ranks * saved.get("accumulate", 1)
    if not 0 < ranks < 1 << 20 or not 0 < micro_batches < 1 << 30:
        raise UserError(f"{path}: says {ranks} processes and {micro_batches} micro-batches: no run has so many")
    config = merge_resumed(given, from_json(saved, path), defaults)
    if ranks != world_size() or given.dp or given.fsdp or given.tp:  # the mesh that was is not the one that is
        config = replace(config, dp=given.dp, fsdp=given.fsdp, tp=given.tp)
    return RunFolder(path.parent, replace(config, out=str(path.parent)), micro_batches)


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of the run in this folder, oldest first."""
    return sorted(path.parent for path in (out / "checkpoints").glob("step_*/state.json"))


def _remove(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink(missing_ok=True)  # first: what is left is no checkpoint any more
    shutil.rmtree(checkpoint, ignore_errors=True)


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
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, float],
) -> None:
    """What `_optimizer_state` gave, put back."""
    # Not by load_state_dict, which casts every state to its parameter's dtype: bytes and their scales stay as they are.
    for name, parameter in parameters.items():
        prefix, device = f"{name}:", parameter.device
        mine = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
        values = {n: like(tensor, parameter) for n, tensor in mine.items()}
        numbers = {n.removeprefix(prefix): number for n, number in scalars.items() if n.startswith(prefix)}
        values |= {n: torch.tensor(v, dtype=torch.float32, device=device) for n, v in numbers.items()}
        if values:
            optimizer.state[parameter] = values


def saved_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint's files hold, sharded as it is: trained parameters, states by "parameter name:state name"."""
    return {**trained(model), **_optimizer_state(model, optimizer)[0]}


def _write_tensors(stage: Stage, name: str, tensors: Mapping[str, Tensor], whole: Whole) -> None:
    entries = {key: _when_asked(tensor, whole) for key, tensor in tensors.items()}
    with stage.open(name) as file:
        write_safetensors(file, entries)


def _when_asked(tensor: Tensor, whole: Whole) -> Lazy:
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda start, stop: whole(tensor)[start:stop])


def _read_state(folder: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, optimizer states): this rank's part of each."""
    if not (folder / SHARDS).exists():
        weights = _read_tensors(folder / "model.safetensors", parameters)
        return weights, _read_tensors(folder / "optimizer.safetensors", parameters)
    try:
        return read_shards(folder / SHARDS, parameters)
    except (OSError, CheckpointException) as error:
        raise UserError(f"{folder}: cannot be read ({error}): remove it to continue from an older one") from None


def _read_tensors(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This rank's part of each tensor in the file, on its parameter's device; states lie as their parameters do."""
    device = str(next(iter(parameters.values())).device)
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            return {name: _read_part(file, name, parameters.get(name.partition(":")[0])) for name in file.keys()}  # noqa: SIM118 (a handle, no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove its folder to continue from an older one") from None


def _read_part(file: Any, name: str, parameter: Tensor | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return file.get_tensor(name)
    part = part_of(parameter)
    if any(rows.start == rows.stop for rows in part):  # fewer rows than ranks
        return torch.empty_like(local(parameter))
    return file.get_slice(name)[part].contiguous()
