"""Damaged checkpoint files of every kind against our readers: each is refused in one line, or opens and can be read.

Each reader gets seeds (tiny valid files) with random damage: bits flipped where the structure lies, numbers replaced
by absurd ones, pieces cut out, doubled, moved; JSON edited as JSON. Any exception but CheckpointError, a message of
more than one line, more than 2 s, or more memory than the limit is a finding, printed with the seed that repeats it.

    python tests/support/fuzz_readers.py --inputs 20000                  # per reader, some minutes each
    # pth: 20000 inputs, 13120 refused, 6880 opened, 0 findings
"""

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoint_cases import LLAMA31, make_weights, write
from nanollama.checkpoint import Checkpoint, CheckpointError, open_checkpoint, verify
from nanollama.model import ModelConfig

TINY = replace(LLAMA31, dim=8, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=6, hidden_dim=12, n_layers=1)
TINY_C = replace(TINY, rope_scaling=None, rope_theta=10_000.0, norm_eps=1e-5, max_seq_len=4)
ABSURD = [0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
JSON_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    10**30,
    1e308,
    0.5,
    "",
    "x",
    "../x",
    [],
    [1],
    {},
    {"a": 1},
]
LIMIT_BYTES = 1 << 30  # of address space, on top of what the process has after its imports


@dataclass(frozen=True)
class Target:
    """path: what is opened. file: what is damaged. head: how many of its first and last bytes are structure."""

    path: Path
    file: Path
    head: int
    tail: int = 0
    is_json: bool = False


def targets(folder: Path) -> dict[str, Target]:
    """One tiny valid checkpoint per reader."""
    meta = write(folder / "a", "meta", TINY, make_weights(TINY))
    meta_json = write(folder / "b", "meta", TINY, make_weights(TINY))
    hf = write(folder / "c", "hf", TINY, make_weights(TINY))
    hf_json = write(folder / "d", "hf", TINY, make_weights(TINY))
    index = write(folder / "e", "hf", TINY, make_weights(TINY), max_shard_bytes=300)
    gguf = write(folder / "f", "gguf", TINY, make_weights(TINY))
    blocks = replace(TINY, dim=32, head_dim=16, hidden_dim=32)
    quantized = write(folder / "h", "gguf", blocks, make_weights(blocks), dtype="q4_1")
    c_weights = make_weights(TINY_C, torch.float32)
    bins = [write(folder / f"g{v}", "llama2c", TINY_C, c_weights, version=v) for v in (0, 1, 2)]
    pt = folder / "x.pt"
    torch.save({"model": c_weights, "model_args": _args(TINY_C), "iter_num": 1}, pt)
    gguf_bytes = len(gguf.read_bytes()) - sum(4 * t.numel() for t in c_weights.values()) // 2
    return {
        "pth": Target(meta, meta / "consolidated.00.pth", 1200, 1400),
        "params.json": Target(meta_json, meta_json / "params.json", 0, is_json=True),
        "safetensors": Target(hf, hf / "model.safetensors", 1100),
        "config.json": Target(hf_json, hf_json / "config.json", 0, is_json=True),
        "index.json": Target(index, index / "model.safetensors.index.json", 0, is_json=True),
        "gguf": Target(gguf, gguf, gguf_bytes),
        "gguf q4_1": Target(quantized, quantized, gguf_bytes),
        "bin v0": Target(bins[0], bins[0], 28),
        "bin v1": Target(bins[1], bins[1], 64),
        "bin v2": Target(bins[2], bins[2], 64),
        "pt": Target(pt, pt, 1500, 1400),
    }


def _args(config: ModelConfig) -> dict[str, int]:
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")
    return {key: getattr(config, key) for key in keys}


def damage(data: bytes, target: Target, rng: random.Random) -> bytes:
    """One to four random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if target.is_json and rng.random() < 0.8:
            data = _edit_json(data, rng)
        else:
            data = _damage_bytes(data, target, rng)
    return data


def _place(data: bytes, target: Target, rng: random.Random) -> int:
    """Mostly where the structure lies."""
    if not data:
        return 0
    ends = [rng.randrange(min(len(data), target.head or len(data)))]
    if target.tail:
        ends.append(max(0, len(data) - 1 - rng.randrange(target.tail)))
    return rng.choice([*ends, *ends, rng.randrange(len(data))])


def _damage_bytes(data: bytes, target: Target, rng: random.Random) -> bytes:
    at, out = _place(data, target, rng), bytearray(data)
    kind = rng.randrange(8)
    if kind <= 2 and out:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        form = rng.choice(("<B", "<H", "<I", "<Q"))
        value = rng.choice(ABSURD) % (1 << 8 * struct.calcsize(form))
        out[at : at + struct.calcsize(form)] = struct.pack(form, value)
    elif kind == 4:
        del out[rng.choice((at, len(out) - 1 - rng.randrange(40) if len(out) > 40 else 0)) :]
    elif kind == 5:
        del out[at : at + rng.choice((1, 2, 4, 8, 100))]
    elif kind == 6:
        source = _place(data, target, rng)
        out[at:at] = out[source : source + rng.choice((1, 4, 8, 64))]
    else:
        source, n = _place(data, target, rng), rng.choice((1, 4, 8, 64))
        out[at : at + n] = out[source : source + n]
    return bytes(out)


def _edit_json(data: bytes, rng: random.Random) -> bytes:
    try:
        content = json.loads(data)
    except ValueError:
        return data
    part = content
    while isinstance(part, dict) and any(isinstance(v, dict) and v for v in part.values()) and rng.random() < 0.7:
        part = rng.choice([v for v in part.values() if isinstance(v, dict) and v])
    if not isinstance(part, dict) or not part:
        return data
    key = rng.choice(list(part))
    action = rng.randrange(5)
    if action == 0:
        del part[key]
    elif action == 1:
        part[key + rng.choice("_sX")] = rng.choice(JSON_VALUES)
    elif action == 2 and isinstance(part[key], int | float) and not isinstance(part[key], bool):
        part[key] = rng.choice((part[key] + 1, part[key] * 2, -part[key], part[key] / 2, str(part[key])))
    elif action == 3:
        part[key] = part[rng.choice(list(part))]
    else:
        part[key] = rng.choice(JSON_VALUES)
    return json.dumps(content).encode()


def attempt(path: Path) -> Checkpoint | None:
    """Open and read everything; None when refused properly. Any other failure propagates."""
    try:
        opened = open_checkpoint(path)
        for name in opened.weights:
            opened.weights[name].float().sum()
            opened.weights.rows(name, 1, 2)
    except CheckpointError as error:
        if "\n" in str(error) or len(str(error)) > 600:
            raise AssertionError(f"not one short line: {error}") from error
        return None
    return opened


def fuzz(name: str, target: Target, inputs: int, seed: int, report: Callable[[str], None] = print) -> int:
    """Returns the number of findings."""
    original = target.file.read_bytes()
    refused = findings = 0
    for i in range(inputs):
        rng = random.Random(f"{name} {seed} {i}")
        data = damage(original, target, rng)
        target.file.write_bytes(data)
        started = time.perf_counter()
        try:
            refused += attempt(target.path) is None
        except BaseException as error:  # a Rust panic is not an Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            findings += 1
            report(f"{name}: seed {seed} input {i}: {type(error).__name__}: {str(error)[:300]}")
        if time.perf_counter() - started > 2:
            findings += 1
            report(f"{name}: seed {seed} input {i}: took {time.perf_counter() - started:.1f} s")
    target.file.write_bytes(original)
    report(f"{name}: {inputs} inputs, {refused} refused, {inputs - refused - findings} opened, {findings} findings")
    return findings


def limit_memory() -> None:
    """An allocation by an absurd count fails as MemoryError, a finding, instead of filling the machine."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz the checkpoint readers")
    parser.add_argument("--inputs", type=int, default=20_000, help="per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default="", help="comma list; default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        chosen = targets(Path(folder))
        for target in chosen.values():  # everything is imported before the limit is set
            assert attempt(target.path) is not None
            verify(target.path)
        limit_memory()
        names = arguments.readers.split(",") if arguments.readers else list(chosen)
        return sum(fuzz(name, chosen[name], arguments.inputs, arguments.seed) for name in names)


if __name__ == "__main__":
    sys.exit(main() > 0)
