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

import torch
from torch import Tensor, nn

from finetune.best import Best, keep_only
from finetune.config import TrainConfig, from_json, merge_resumed, to_json
from finetune.data.appended import Extent
from finetune.data.files import write_atomically
from finetune.data.packing import Cursor
from finetune.errors import UserError
from finetune.evaluate import Score
from finetune.gather import Whole, local
from finetune.mesh import mesh_sizes
from finetune.optim import trained
from finetune.parallelize import World, world_size
from finetune.restore import SCHEMA, SHARDS, check_checkpoint, check_config_types, read_file, taken, with_older
from finetune.shards import read_shards
from finetune.tensors import read_tensors, write_tensors
from nanollama import gate
from nanollama.checkpoint.staging import staged
from nanollama.tensor_parallel import like

CONFIG = "config.json"
BESIDE = ("entry", "world_size", "micro_batches")  # in config.json, what is no flag
BEFORE = ("left_out.json", "doctor.json", "environment.json")  # what may lie beside it before the first step


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # labels trained on
    cursor: Cursor = field(default_factory=Cursor)  # of the next row
    best: Best | None = None  # None: no validation since step 0
    news: str = field(default="", compare=False)  # a word on documents that were appended, not kept


@dataclass(frozen=True)
class Data:
    """What a run's state says of its data: a mark that changes with them, and how far they went."""

    fingerprint: str
    train: Extent | None = None
    val: Extent | None = None
    tokenizer: str = ""  # its file

    def saved(self) -> dict[str, Any]:
        """As state.json has it."""
        sides = (("train", self.train), ("val", self.val))
        documents = {side: part and part.saved() for side, part in sides}
        return {"data": self.fingerprint, "documents": documents, "tokenizer": self.tokenizer}


def as_data(data: Data | str) -> Data:
    """A fingerprint alone says nothing of how far the data went: nothing may be appended."""
    return Data(data) if isinstance(data, str) else data


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
        data: Data | str,
        whole: Whole = Tensor.detach,
    ) -> None:
        """Write a checkpoint, then remove the older ones. Raises CheckpointError when the disk refuses; they stay then.

        whole: what gives a tensor of `saved_tensors` in one piece.
        """
        folder = self.checkpoint(progress.step)
        if (folder / "state.json").exists():
            return
        tensors, _ = _optimizer_state(model, optimizer)
        finish = self.finisher(progress, model, optimizer, data)
        with staged(folder) as stage:
            write_tensors(stage, "model.safetensors", trained(model), whole)
            write_tensors(stage, "optimizer.safetensors", tensors, whole)
        finish()

    def micro_batches_of(self, world: World) -> int:
        """In a step, on all ranks together."""
        return self.micro_batches or self.config.accumulate * world.data_size

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}"

    def finisher(
        self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data | str
    ) -> Callable[[], None]:
        """What makes a folder with the tensors of now a checkpoint: state.json. Then the older ones are removed."""
        state = {
            "schema": SCHEMA,
            "progress": {name: value for name, value in asdict(progress).items() if name != "news"},
            "rng": "seeded by (seed, step, rank) at each step",
            "optimizer": _optimizer_state(model, optimizer)[1],
            **as_data(data).saved(),
            "torch": torch.__version__,
            "config": to_json(replace(self.config, resume=False)),
        }
        older, folder = checkpoints(self.path), self.checkpoint(progress.step)

        def finish() -> None:
            with staged(folder) as stage:
                stage.text("state.json", json.dumps(state, indent=2) + "\n")
            for old in older:
                _remove(old)
            keep_only(self.path, progress.best.step if progress.best else None)

        return finish

    def saved_state(self) -> dict[str, Any] | None:
        """state.json of the newest checkpoint. Raises UserError."""
        found = checkpoints(self.path)
        return read_file(found[-1] / "state.json") if found else None

    def restore_(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data | str) -> Progress:
        """Load the newest checkpoint; a run without any starts at step 0. Raises UserError.

        Documents that came behind those of the checkpoint begin a new pass.
        """
        found = checkpoints(self.path)
        if not found:
            self._clean()
            keep_only(self.path, None)
            return Progress()
        folder = found[-1]
        _refuse_shorter(self.config, folder)
        try:
            state = check_checkpoint(folder, self.config, trained(model))
        except UserError as error:
            raise with_older(error, folder, found[-2] if len(found) > 1 else None) from None
        raw = read_file(folder / "state.json")
        news = _appended(raw, as_data(data), folder)
        best = _best(raw["progress"], folder / "state.json")
        self._clean()
        parameters = trained(model)
        weights, states = _read_state(folder, parameters)
        if weights.keys() != parameters.keys():
            raise UserError(f"{folder}: does not hold the parameters that this run trains")
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(weights[name])
        _restore_optimizer_(optimizer, parameters, states, state.scalars)
        keep_only(self.path, best.step if best else None)
        if news:
            return Progress(state.step, state.tokens, Cursor(state.cursor.epoch + 1), news=news)
        return Progress(state.step, state.tokens, state.cursor, best)

    def write_config(self) -> None:
        """config.json says what this run does from now on."""
        path = self.path / CONFIG
        saved = (read_file(path) if path.exists() else {}) | to_json(replace(self.config, resume=False))
        write_atomically(path, (json.dumps(saved, indent=2) + "\n").encode())

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
        except (ValueError, KeyboardInterrupt):
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
    if saved and not {"entry", "world_size"} & saved.keys():
        raise UserError(f"{path}: was not written by a run (a model has one of this name, too): name the run's folder")
    began = taken(saved, "entry", str, path)
    if began != entry:
        raise UserError(
            f"--out {given.out}: holds a run of another entry, finetune.{gate.shown(began)}: resume it with the "
            "command that began it"
        )
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
    for folder in checkpoints(path.parent)[-1:]:
        _refuse_shorter(config, folder)
    return RunFolder(path.parent, replace(config, out=str(path.parent)), micro_batches)


def _refuse_shorter(config: TrainConfig, checkpoint: Path) -> None:
    """Raises UserError for a run that is to end before its newest checkpoint. 0 steps: the data will say how many."""
    if config.max_steps and checkpoint.name > f"step_{config.max_steps:08d}":
        done = int(checkpoint.name.removeprefix("step_"))
        raise UserError(f"--max_steps {config.max_steps}: the run has done {done} steps already")


def saved_config(folder: RunFolder) -> TrainConfig:
    """What config.json says."""
    path = folder.path / CONFIG
    return from_json({name: value for name, value in read_file(path).items() if name not in BESIDE}, path)


def _best(progress: dict[str, Any], path: Path) -> Best | None:
    """A state's best step; a version before this one knew none. Raises UserError."""
    if progress.get("best") is None:
        return None
    best = taken(progress, "best", dict, path)
    score = taken(best, "score", dict, path)
    numbers = (taken(score, "loss", float, path), taken(score, "bpb", float, path))
    return Best(taken(best, "step", int, path), Score(*numbers), taken(best, "waited", int, path))


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of the run in this folder, oldest first."""
    return sorted(path.parent for path in (out / "checkpoints").glob("step_*/state.json"))


def _appended(state: Mapping[str, Any], data: Data, folder: Path) -> str:
    """A word on the documents behind those of the checkpoint; "" for the same data. Raises UserError for others."""
    if state["data"] == data.fingerprint:
        return ""
    was: Any = state.get("documents") if isinstance(state.get("documents"), dict) else {}
    grown = []
    for side, now in (("train", data.train), ("val", data.val)):
        before = Extent.read(was.get(side))
        if before is None or now is None or not now.begins_with(before):
            raise UserError(
                f"{folder}: the data or its tokenizer has changed since this run was saved: bring it back (documents "
                "may be appended behind those that were there)"
            )
        grown.append((before.count, now.count))
    (train, more), (val, held) = grown
    return (
        f"data: {more - train:,} documents more to train on and {held - val:,} held out, behind the {train:,} and "
        f"{val:,} that were there: a new pass over all of them begins"
    )


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


def _read_state(folder: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, optimizer states): this rank's part of each."""
    if not (folder / SHARDS).exists():
        weights = read_tensors(folder / "model.safetensors", parameters)
        return weights, read_tensors(folder / "optimizer.safetensors", parameters)
    return read_shards(folder / SHARDS, parameters)
