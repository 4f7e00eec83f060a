"""A kit may come from anywhere: what its table claims, checked whole before an array of it is read.

table = read_table(Path("kit"))      # kit.json; UsageError in one line for what no kit could have written
"""

import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanollama import gate
from nanollama.gate.documents import parse, read_bytes
from parity.contract import DTYPES, UsageError
from reference.protocol import tap_names, tap_shape

MAX_BYTES = 1 << 26  # of kit.json; the largest so far has 0.3 MB
FILES = {"weights.f32": 4, "inputs.i32": 4, "inputs.f32": 4, "expected.f64": 8}  # bytes a number
NAME = re.compile(r"\w[\w.-]{0,199}")  # of an array: a port's file has it
NUMBER = (int, float)
# Key -> type of its value; a list or dict of one type for what is in it.
TABLE: dict[str, Any] = {
    "schema": str, "config": dict, "sequences": [int], "dtypes": [str], "references": [str], "environment": dict,
    "errata": [str], "notices": [str], "decided_fraction": {str: NUMBER}, "noise_floor": [dict], "checkpoint": dict,
    "arrays": [dict], "gates": [dict],
}  # fmt: skip
CONFIG: dict[str, Any] = dict.fromkeys(
    ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"), int
)
CONFIG |= {"norm_eps": NUMBER, "rope_theta": NUMBER}
CONFIG |= {"tied": bool}
SCALING = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "original_context"), NUMBER)
CHECKPOINT = {"path": str, "format": str, "parameters": int}
ARRAY = {"name": str, "file": str, "offset": int, "shape": [int], "meaning": str}
GATE: dict[str, Any] = dict.fromkeys(("array", "dtype", "check", "gate", "metric", "label", "unit"), str)
GATE |= {"first": int, "rows": int, "noise": NUMBER, "factor": NUMBER}
FLOOR: dict[str, Any] = {"of": str, "against": str, "dtype": str, "rms_logits": NUMBER}
FLOOR |= {"logits": (*NUMBER, type(None)), "taps": (*NUMBER, type(None)), "tap": (str, type(None))}
MAX_LAYERS = 10_000


def read_table(folder: Path, schema: str, metrics: typing.Collection[str]) -> dict[str, Any]:
    """kit.json, of which every key that is read is there and of its type. Raises UsageError."""
    path = folder / "kit.json"
    try:
        table = parse(read_bytes(path, MAX_BYTES), path)
    except gate.CheckpointError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); copy the kit again") from None
    if table.get("schema") != schema:
        raise UsageError(f"{path} has schema {gate.shown(table.get('schema'))}, expected {schema!r}")
    try:
        _check_keys(table, TABLE, "")
        _check_config(table["config"])
        _check_keys(table["checkpoint"], CHECKPOINT, "checkpoint.", only=True)
        for number, floor in enumerate(table["noise_floor"]):
            gradients = floor.get("gradients")
            known = {key: value for key, value in floor.items() if key != "gradients"}
            _check_keys(known, FLOOR, f"noise_floor {number}: ", only=True)
            is_pair = type(gradients) is list and [type(part) for part in gradients] == [float, str]
            if gradients is not None and not is_pair:
                raise Wrong(f"noise_floor {number}: gradients is {gate.shown(gradients)}")
        _check_runs(table)
        _check_arrays(table, folder)
        _check_gates(table, metrics)
    except Wrong as wrong:
        raise UsageError(f"{path}: {wrong}: no kit says so; make it again with python -m parity.kit") from None
    return table


class Wrong(ValueError):
    """What a table says, for the inside of a line."""


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return type(value) is list and all(_fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        ((_, inner),) = kind.items()
        return type(value) is dict and all(_fits(item, inner) for item in value.values())
    if type(value) is float and not math.isfinite(value):
        return False
    return type(value) in kind if isinstance(kind, tuple) else type(value) is kind


def _check_keys(found: dict[str, Any], kinds: Mapping[str, Any], where: str, *, only: bool = False) -> None:
    for key, kind in kinds.items():
        if key not in found:
            raise Wrong(f"{where}{key} is missing")
        if not _fits(found[key], kind):
            raise Wrong(f"{where}{key} is {gate.shown(found[key])}")
    if only and (more := found.keys() - kinds.keys()):
        raise Wrong(f"{where}{gate.shown(min(more))} is no key of it")


def _check_config(config: dict[str, Any]) -> None:
    """Every key of it, and no other: a checkpoint is made of it for a candidate."""
    scaling = config.get("rope_scaling")
    _check_keys({k: v for k, v in config.items() if k != "rope_scaling"}, CONFIG, "config.", only=True)
    if scaling is not None:
        if type(scaling) is not dict:
            raise Wrong(f"config.rope_scaling is {gate.shown(scaling)}")
        _check_keys(scaling, SCALING, "config.rope_scaling.", only=True)
    if not all(0 < config[key] < 1 << 31 for key, kind in CONFIG.items() if kind is int):
        raise Wrong(f"config is {gate.shown(config)}")
    if config["n_layers"] > MAX_LAYERS or config["n_heads"] % config["n_kv_heads"] or config["head_dim"] % 2:
        what = f"{config['n_layers']:,} layers, {config['n_heads']} heads, {config['n_kv_heads']} kv heads"
        raise Wrong(f"config has {what} of {config['head_dim']} numbers")


def shapes_of(config: dict[str, Any]) -> dict[str, list[int]]:
    """Name and shape of each weight, in Meta's layout."""
    dim, hidden, vocab = config["dim"], config["hidden_dim"], config["vocab_size"]
    queries, keys = config["n_heads"] * config["head_dim"], config["n_kv_heads"] * config["head_dim"]
    found = {"tok_embeddings.weight": [vocab, dim], "norm.weight": [dim]}
    found |= {} if config["tied"] else {"output.weight": [vocab, dim]}
    block = {"attention.wq": [queries, dim], "attention.wk": [keys, dim], "attention.wv": [keys, dim]}
    block |= {"attention.wo": [dim, queries], "attention_norm": [dim], "ffn_norm": [dim]}
    block |= {f"feed_forward.{name}": [hidden, dim] for name in ("w1", "w3")} | {"feed_forward.w2": [dim, hidden]}
    for layer in range(config["n_layers"]):
        found |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return found


def _check_runs(table: dict[str, Any]) -> None:
    """References, tokens and run dtypes."""
    if not {*table["references"]} <= {"meta", "hf"}:
        raise Wrong(f"references is {gate.shown(table['references'])}")
    if type(table["environment"].get("torch")) is not str:
        raise Wrong(f"environment.torch is {gate.shown(table['environment'].get('torch'))}")
    if not table["sequences"] or not all(0 < n < 1 << 31 for n in table["sequences"]):
        raise Wrong(f"sequences is {gate.shown(table['sequences'])}")
    if not table["dtypes"] or not {*table["dtypes"]} <= DTYPES.keys() & table["decided_fraction"].keys():
        raise Wrong(f"dtypes is {gate.shown(table['dtypes'])}")
    hyper = table.get("training")
    if hyper is not None and not (type(hyper) is dict and _fits(hyper.get("lr"), NUMBER)):
        raise Wrong(f"training is {gate.shown(hyper)}")


def _check_arrays(table: dict[str, Any], folder: Path) -> None:
    """Each within its file, under a name of its own."""
    sizes = {name: (folder / name).stat().st_size for name in FILES if (folder / name).is_file()}
    seen: set[str] = set()
    for array in table["arrays"]:
        _check_keys(array, ARRAY, "an array's ", only=False)
        if extra := array.keys() - ARRAY.keys() - {"kind"}:
            raise Wrong(f"an array's {gate.shown(min(extra))} is no key of it")
        name, shape = array["name"], array["shape"]
        if not NAME.fullmatch(name) or name in seen:
            raise Wrong(f"an array's name is {gate.shown(name)}" + (", which is there twice" if name in seen else ""))
        seen.add(name)
        if array["file"] not in sizes:
            raise Wrong(f"{name} lies in {gate.shown(array['file'])}")
        fits = len(shape) <= 8 and all(0 <= n < 1 << 40 for n in shape) and array["offset"] >= 0
        if not fits or array["offset"] + math.prod(shape) * FILES[array["file"]] > sizes[array["file"]]:
            raise Wrong(f"{name} of shape {gate.shown(shape)} goes beyond its file")
    tokens, dtypes = sum(table["sequences"]), ("", *(f"{dtype}." for dtype in table["dtypes"]))
    asked = {tap: [tokens, *tap_shape(table["config"], tap)] for tap in tap_names(table["config"]["n_layers"])}
    asked = {f"{dtype}{name}": shape for name, shape in (asked | {"best": [tokens]}).items() for dtype in dtypes}
    asked |= {"tokens": [tokens], **{f"decided.{dtype}": [tokens] for dtype in table["dtypes"]}}
    weights = shapes_of(table["config"])
    asked |= weights
    held = {array["name"] for array in table["arrays"] if array["file"] == "weights.f32"}
    if different := sorted(held ^ weights.keys()):
        what = "has a weight" if different[0] in held else "lacks the weight"
        raise Wrong(f"it {what} {different[0]}: its config asks for {len(weights)}, it has {len(held)}")
    for array in table["arrays"]:
        if array["shape"] != asked.get(array["name"], array["shape"]):
            what = f"{array['name']} has shape {gate.shown(array['shape'])}"
            raise Wrong(f"{what}: its config and tokens ask for {asked[array['name']]}")
    for dtype in table["dtypes"]:
        for name in ("logits", "best"):
            if not seen & {name, f"{dtype}.{name}"}:
                raise Wrong(f"it has no array {name} in {dtype}")
        if not {"tokens", f"decided.{dtype}"} <= seen:
            raise Wrong(f"it lacks tokens or decided.{dtype}")


def _check_gates(table: dict[str, Any], metrics: typing.Collection[str]) -> None:
    shapes = {array["name"]: array["shape"] for array in table["arrays"]}
    for entry in table["gates"]:
        _check_keys(entry, GATE, "a bound's ")
        if extra := entry.keys() - GATE.keys() - {"bound"}:
            raise Wrong(f"a bound's {gate.shown(min(extra))} is no key of it")
        rows = (shapes.get(entry["array"]) or [0])[0]
        if entry["array"] not in shapes or entry["metric"] not in metrics or entry["dtype"] not in table["dtypes"]:
            raise Wrong(f"a bound is about {gate.shown((entry['array'], entry['metric'], entry['dtype']))}")
        plain = entry["array"].removeprefix(f"{entry['dtype']}.")
        if entry["metric"].startswith(("kl_", "tokens")) and plain != "logits":
            raise Wrong(f"{entry['metric']} is about logits, not {entry['array']}")
        if entry["metric"] == "relative" and table.get("training") is None:
            raise Wrong(f"{entry['metric']} of {entry['array']} needs its training")
        if not 0 <= entry["first"] < entry["first"] + entry["rows"] <= rows or min(entry["noise"], entry["factor"]) < 0:
            raise Wrong(f"a bound of {entry['array']} is about rows {entry['first']} + {entry['rows']} of {rows}")
