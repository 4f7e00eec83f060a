"""A run's folder may come from anywhere: what its files claim, checked whole before anything of it is restored.

Types, ranges, shapes and dtypes are held against the model, the config and the data; nothing is bent to fit.

    state = check_checkpoint(folder, config, trained(model))    # UserError, or what state.json says
"""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import nn

from finetune.average import AVERAGE
from finetune.config import FREE, GOING_ON, TrainConfig
from finetune.data.packing import Cursor, Packing
from finetune.errors import UserError
from finetune.muon import MOMENTUM, is_muons
from finetune.optim import new_moments
from finetune.shards import described
from nanollama import gate
from nanollama.checkpoint import CheckpointError
from nanollama.checkpoint.weights import STORED_DTYPES
from nanollama.gate.documents import read_json

SCHEMA = "nanollama.run/1"  # of state.json
SHARDS = "shards"  # in a checkpoint, where each rank has written what it held (finetune/save.py)
MAX_COUNT = 1 << 62
PLACES = frozenset(("data", "tokenizer", "ckpt", "adapter", "init"))  # files may be moved: their content is compared
# safetensors' names of what a run stores.
DTYPES = STORED_DTYPES | {"I8": torch.int8, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class State:
    """state.json, checked: `scalars` by "parameter name:state name"."""

    step: int
    tokens: int
    cursor: Cursor
    scalars: Mapping[str, float]
    data: str  # fingerprint


def read_file(path: Path) -> dict[str, Any]:
    """A JSON object of the run's own. Raises UserError."""
    try:
        return read_json(path)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def taken(found: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    """found[key], which must be of that type. Raises UserError."""
    if key not in found:
        raise UserError(f"{path}: lacks the key {key!r}: it is not as a run wrote it")
    if type(found[key]) is not kind:
        what = f"{key} is {gate.shown(found[key])}, expected {_kind_name(kind)}"
        raise UserError(f"{path}: {what}: it is not as a run wrote it")
    return found[key]


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return {dict: "an object {...}", int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[
        kind
    ]


def check_config_types(saved: dict[str, Any], where: Path) -> None:
    """Each field of a saved TrainConfig of its own type. Raises UserError; its ranges are TrainConfig's to check."""
    hints = typing.get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        if field.name not in saved:
            continue
        value, kind = saved[field.name], hints[field.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            if value is None:
                continue
            (kind,) = (inner for inner in typing.get_args(kind) if inner is not type(None))
        if typing.get_origin(kind) is Literal:
            fits = type(value) is str and value in typing.get_args(kind)
        else:
            fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise UserError(f"{where}: {field.name} is {gate.shown(value)}: expected {_kind_name(kind)}")


def check_checkpoint(folder: Path, config: TrainConfig, parameters: Mapping[str, nn.Parameter]) -> State:
    """What the checkpoint's state.json says, once all its files fit this run. Raises UserError that names the file."""
    path = folder / "state.json"
    found = read_file(path)
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path}: has schema {gate.shown(found.get('schema'))}: expected {SCHEMA!r}")
    _check_same_config(taken(found, "config", dict, path), config, path)
    state = _progress(found, config, path)
    if folder.name != f"step_{state.step:08d}":
        raise UserError(
            f"{path}: says step {state.step:,}, its folder is {folder.name}: they are not of one checkpoint"
        )
    asked = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
    moments = _moments(parameters, config) if state.step else {}
    if (folder / SHARDS).exists():
        _check_found(folder / SHARDS, described(folder / SHARDS), asked | moments)
    else:
        _check_tensors(folder / "model.safetensors", asked)
        _check_tensors(folder / "optimizer.safetensors", moments)
    _check_scalars(state, [n for n, p in parameters.items() if not is_muons(n, p, config)], path)
    return state


def _check_same_config(saved: dict[str, Any], config: TrainConfig, path: Path) -> None:
    check_config_types(saved, path)
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if field.name not in FREE | PLACES | {*GOING_ON} and field.name in saved and saved[field.name] != value:
            what = f"was written with {field.name} {gate.shown(saved[field.name])}, the run's config.json says"
            raise UserError(f"{path}: {what} {gate.shown(value)}: bring back the one that is right")


def _progress(found: dict[str, Any], config: TrainConfig, path: Path) -> State:
    progress = taken(found, "progress", dict, path)
    cursor = taken(progress, "cursor", dict, path)
    step = _count(progress, "step", config.max_steps, path)
    # A row is read once: no count of them can be beyond what the steps took, on at most 2^16 ranks.
    rows = (step + 1) * config.batch_size * config.accumulate << 16
    tokens = _count(progress, "tokens", rows * config.seq_len, path)
    epoch, window, row = (_count(cursor, key, rows, path) for key in ("epoch", "window", "row"))
    scalars = taken(found, "optimizer", dict, path)
    for name, value in scalars.items():
        if type(value) not in (int, float) or value != int(value) or not 0 < value <= step:
            what = f"optimizer.{name[:80]} is {gate.shown(value)}: expected the steps taken, 1 to {step}"
            raise UserError(f"{path}: {what}")
    return State(step, tokens, Cursor(epoch, window, row), scalars, taken(found, "data", str, path))


def _count(found: dict[str, Any], key: str, most: int, path: Path) -> int:
    value: int = taken(found, key, int, path)
    if not 0 <= value <= min(most, MAX_COUNT):
        raise UserError(f"{path}: {key} is {value:,}: expected 0 to {min(most, MAX_COUNT):,} in this run")
    return value


def _moments(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every state tensor that the run's optimizer keeps, by "parameter name:state name"."""
    eight_bit, found = config.optimizer == "adamw8bit", {}
    for name, parameter in parameters.items():
        bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        kept = {MOMENTUM: bare} if is_muons(name, parameter, config) else new_moments(bare, eight_bit)
        kept |= {AVERAGE: bare.float()} if config.ema else {}
        for key, state in kept.items():
            found[f"{name}:{key}"] = (tuple(state.shape), state.dtype)
    return found


def _check_tensors(path: Path, asked: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """The header of a safetensors file against what it has to hold, before any tensor is read."""
    try:
        gate.require_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a handle, no dict)
            types = {name: part.get_dtype() for name, part in parts.items()}
            found = {n: (tuple(part.get_shape()), DTYPES.get(types[n], types[n])) for n, part in parts.items()}
    except (OSError, safetensors.SafetensorError, CheckpointError) as error:
        raise UserError(f"{path}: cannot be read ({gate.reason(error)})") from None
    _check_found(path, found, asked)


def _check_found(
    path: Path,
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype | str]],
    asked: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    """Names, shapes and dtypes of stored tensors against those that this run keeps."""
    if missing := sorted(asked.keys() - found.keys()):
        raise UserError(f"{path}: lacks {missing[0]} ({len(missing)} in all), which this run trains")
    if extra := sorted(found.keys() - asked.keys()):
        raise UserError(f"{path}: holds {gate.shown(extra[0])} ({len(extra)} in all), which this run does not train")
    for name, (shape, dtype) in asked.items():
        stored, kind = found[name]
        if stored != shape or kind != dtype:
            shown = NAMES.get(kind, kind) if isinstance(kind, torch.dtype) else kind
            kept = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            what = f"{name} is {shown} {list(stored)}, this run keeps it as {kept}"
            raise UserError(f"{path}: {what}: the file is of another run")


def _check_scalars(state: State, parameters: Sequence[str], path: Path) -> None:
    """Each parameter that AdamW updates has its number of steps."""
    asked = {f"{name}:step" for name in parameters} if state.step else set()
    if different := sorted(asked ^ state.scalars.keys()):
        what = "lacks" if different[0] in asked else "holds"
        raise UserError(f"{path}: optimizer {what} {gate.shown(different[0])}: it is not as this run wrote it")


def check_cursor(packer: Packing, cursor: Cursor) -> None:
    """Raises UserError for a place that these data do not have."""
    if not packer.holds(cursor):
        what = f"epoch {cursor.epoch}, window {cursor.window}, row {cursor.row}"
        raise UserError(f"state.json: its cursor ({what}) is no place in these data: it is of another run")


def with_older(error: UserError, folder: Path, older: Path | None) -> UserError:
    """The error of a checkpoint with what to do: go on from the one before it, where there is one."""
    if older is None:
        left = f"it is this run's only checkpoint: begin anew in another folder than {folder.parent.parent}"
    else:
        left = f"remove {folder} to continue from {older.name}, the checkpoint before it"
    return UserError(f"{error}; {left}")
