"""The file protocol that every implementation speaks: a case is read, a trace folder is written.

A case says what to run and what to record; a trace is trace.json and safetensors part files, a folder for each run
dtype. Part files are mapped and written in place, so that a trace larger than memory needs none of it.

    case = read_case(Path("case.json"))
    taps = Taps(Path("out/fp32"), config, lengths=[61], positions=None, dtype=torch.float32)
    taps.put(0, "layers.3.q_rope", q_rope)           # (T, heads, head_dim), or with a leading batch of 1
"""

import json
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.files import Config, read_json
from reference.files.weights import DTYPE_NAMES, DTYPES, Unusable

CASE_SCHEMA, TRACE_SCHEMA = "nanollama.case/1", "nanollama.trace/1"
SAFETENSORS_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp64": "F64"}

BLOCK_TAPS: tuple[str, ...] = ("attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn_mix", "attn_out")
BLOCK_TAPS += ("ffn_norm", "gate", "up", "ffn_mix", "ffn_out", "out")

Dialog = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    checkpoint: str
    tokenizer: str | None = None
    dtypes: tuple[str, ...] = ("fp32",)
    device: str = "cpu"
    threads: int = 1
    prompts: list[list[int]] | None = None
    texts: list[str] | None = None
    corpus: tuple[str, ...] = ()
    dialogs: tuple[Dialog, ...] = ()
    max_new_tokens: int = 0
    spare_prompts: list[list[int]] | None = None  # ids of `texts` for an implementation that has no tokenizer
    record: str = "taps"  # or "logits", or "text": token ids alone
    positions: list[list[int]] | None = None  # where taps are kept, per sequence; None: everywhere
    n_positions: int | None = None  # in place of positions: this many of each sequence
    rope_positions: tuple[int, ...] = ()
    weights: bool = False  # hash them
    training: dict[str, Any] | None = None  # batches and hyperparameters, see reference/training.py; fp32 alone
    stream: str = "auto"  # or "always", "never"
    whole_bytes: int | None = None  # "auto" runs a model whole up to this size; None: by the machine's memory


def read_case(path: Path) -> Case:
    """Raises Unusable with the key that is wrong. "-" waits for the case on standard input."""
    values = json.load(sys.stdin) if str(path) == "-" else read_json(path)
    if values.pop("schema", None) != CASE_SCHEMA:
        raise Unusable(f'{path}: is not a case; its "schema" should be "{CASE_SCHEMA}"')
    known = {field.name for field in fields(Case)}
    if unknown := sorted(values.keys() - known):
        raise Unusable(f"{path}: unknown key {unknown[0]!r}")
    if "checkpoint" not in values:
        raise Unusable(f"{path}: lacks the key 'checkpoint'")
    for key in ("dtypes", "corpus", "dialogs", "rope_positions"):
        values[key] = tuple(values.get(key) or ())
    case = Case(**values)
    if not case.dtypes or any(dtype not in DTYPES or dtype == "fp64" for dtype in case.dtypes):
        raise Unusable(f"{path}: dtypes should be from fp32, bf16, fp16, not {list(case.dtypes)}")
    for key, choices in (("record", ("taps", "logits", "text")), ("stream", ("auto", "always", "never"))):
        if getattr(case, key) not in choices:
            raise Unusable(f"{path}: {key} should be one of {', '.join(choices)}, not {getattr(case, key)!r}")
    return case


def check_sequences(sequences: list[list[int]], vocab_size: int) -> None:
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise Unusable(f"prompt {i} is empty; give it at least one token")
        if any(not isinstance(token, int) or not 0 <= token < vocab_size for token in sequence):
            rows = f"0..{vocab_size - 1}, the checkpoint's rows"
            raise Unusable(f"prompt {i} holds a token outside {rows}; is the tokenizer another model's?")


def chosen_positions(case: Case, sequences: list[list[int]]) -> list[list[int]] | None:
    """The case's positions, or `n_positions` of each sequence, evenly spread from the first to the last."""
    if case.n_positions is None:
        return case.positions
    return [torch.linspace(0, len(s) - 1, min(case.n_positions, len(s))).int().tolist() for s in sequences]


def check_positions(positions: list[list[int]] | None, sequences: list[list[int]]) -> None:
    if positions is None:
        return
    if len(positions) != len(sequences):
        raise Unusable(f"positions are given for {len(positions)} sequences, but there are {len(sequences)}")
    for i, (kept, sequence) in enumerate(zip(positions, sequences, strict=True)):
        if any(not 0 <= position < len(sequence) for position in kept):
            raise Unusable(f"a position of sequence {i} is outside its {len(sequence)} tokens")


def tap_names(n_layers: int) -> list[str]:
    """Every tap in the order of the computation."""
    blocks = [f"layers.{i}.{tap}" for i in range(n_layers) for tap in BLOCK_TAPS]
    return ["embed", *blocks, "final_norm", "logits"]


def tap_shape(config: Config, name: str) -> tuple[int, ...]:
    """Shape of one position of a tap."""
    tap = name.rsplit(".", 1)[-1]
    if tap in ("q", "q_rope"):
        return (config["n_heads"], config["head_dim"])
    if tap in ("k", "k_rope", "v"):
        return (config["n_kv_heads"], config["head_dim"])
    if tap == "attn_mix":
        return (config["n_heads"] * config["head_dim"],)
    if tap in ("gate", "up", "ffn_mix"):
        return (config["hidden_dim"],)
    return (config["vocab_size"],) if tap == "logits" else (config["dim"],)


def tap_part(name: str) -> str:
    """The part file, without its ending, that holds a tap."""
    if name.startswith("layers."):
        return name.rsplit(".", 1)[0]
    return "embed" if name == "embed" else "head"


class Taps:
    """The tensors of one run dtype, written in place. `logits` are kept at all positions, other taps at `positions`."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        lengths: list[int],
        positions: list[list[int]] | None,
        dtype: torch.dtype,
        logits_dtype: torch.dtype,
        record: str = "taps",
    ):
        self.folder, self.config, self.lengths = folder, config, lengths
        self.dtype, self.logits_dtype = dtype, logits_dtype
        self.positions: Sequence[list[int] | None] = positions or [None] * len(lengths)
        self.names = tap_names(config["n_layers"]) if record == "taps" else ["logits"]
        self._wanted = set(self.names)
        self._written: set[tuple[int, str]] = set()
        self._open: dict[str, dict[str, Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, sequence: int, name: str, value: Tensor) -> None:
        """Keep a tap of a sequence: (T, ...) or (1, T, ...), any dtype."""
        if name in self._wanted:
            target = self.target(sequence, name)
            value = value.detach().reshape(self.lengths[sequence], *target.shape[1:])
            kept = self.positions[sequence] if name != "logits" else None
            target.copy_(value if kept is None else value[kept])

    def target(self, sequence: int, name: str) -> Tensor:
        """The mapped tensor itself, to be filled by the caller."""
        part = tap_part(name)
        if part not in self._open:
            self._open[part] = map_safetensors(self.folder / f"{part}.safetensors", self._part_layout(part))
        self._written.add((sequence, name))
        return self._open[part][f"{sequence}/{name}"]

    def close(self, part: str) -> None:
        """Unmap a part that is complete."""
        self._open.pop(part, None)

    def finish(self) -> None:
        missing = {(s, name) for s in range(len(self.lengths)) for name in self.names} - self._written
        assert not missing, f"taps never recorded: {sorted(missing)[:5]}"
        self._open.clear()

    def _part_layout(self, part: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        layout = {}
        for sequence, length in enumerate(self.lengths):
            for name in (name for name in self.names if tap_part(name) == part):
                kept = self.positions[sequence] if name != "logits" else None
                rows = length if kept is None else len(kept)
                dtype = self.logits_dtype if name == "logits" else self.dtype
                layout[f"{sequence}/{name}"] = (dtype, (rows, *tap_shape(self.config, name)))
        return layout


def map_safetensors(path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Make a safetensors file of zeros and return its tensors, mapped: what is assigned to them is on disk."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):  # stays aligned
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        kind = SAFETENSORS_NAMES[DTYPE_NAMES[dtype]]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    size = 8 + len(text) + offset
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        reserve(file.fileno(), size, path)
    data = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)[8 + len(text) :]
    tensors = {}
    for name, (dtype, shape) in layout.items():
        start, end = header[name]["data_offsets"]
        tensors[name] = data[start:end].view(dtype).view(shape)
    return tensors


def reserve(descriptor: int, size: int, path: Path) -> None:
    """Claim the disk space now: a mapped write to a full disk would kill the process without a word."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        raise Unusable(f"{path}: no room for {size} bytes ({error.strerror}); free disk space") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def progress(stage: str, done: float) -> None:
    """One line of JSON on stdout; `done` is the fraction of the whole run."""
    print(json.dumps({"stage": stage, "done": round(done, 4)}), flush=True)
