"""llama2.c's files: `.bin` version 0 (legacy), 1 (fp32) and 2 (int8 groups), and its `.pt` training checkpoints.

The layouts, byte by byte, are in docs/formats.md; they are those that run.c (0) and runq.c (2) map into memory. No
version stores the epsilon or the RoPE base, because the C programs hard-code them: 1e-5 and 10,000.

    python -m nanollama inspect stories260K.bin

Source: karpathy/llama2.c, export.py and run.c for the layouts, model.py and train.py for the training checkpoints.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nanollama import gate
from nanollama.checkpoint import pth
from nanollama.checkpoint.fields import Fields
from nanollama.checkpoint.meta import ffn_hidden_dim
from nanollama.checkpoint.names import EMBEDDING, HEAD, layer_shapes, weight_shapes
from nanollama.checkpoint.staging import Stage, staged
from nanollama.checkpoint.weights import (
    Checkpoint,
    CheckpointError,
    Lazy,
    lazy,
    make_config,
    opened,
    row_blocks,
    to_write,
)
from nanollama.model import ModelConfig
from nanollama.vocabulary import read
from nanollama.vocabulary.write import llama2c_files

SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")  # the header's numbers
HEADER_BYTES = {0: 28, 1: 256, 2: 256}
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0  # in run.c
ATTENTION = tuple(f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = tuple(f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3"))


def file_order(config: ModelConfig, version: int) -> list[str]:
    """Meta names in the order of the file: grouped by kind, all layers of a kind together."""

    def layers(*names: str) -> list[str]:
        return [f"layers.{i}.{name}" for name in names for i in range(config.n_layers)]

    head = [] if config.tied else [HEAD]
    if version == 0:
        before = [EMBEDDING, *layers("attention_norm.weight", *ATTENTION, "ffn_norm.weight", *FEED_FORWARD)]
        return [*before, "norm.weight", *head]  # the RoPE tables lie between these two
    norms = [*layers("attention_norm.weight", "ffn_norm.weight"), "norm.weight"]
    return [*norms, EMBEDDING, *layers(*ATTENTION, *FEED_FORWARD), *head]


def open_bin(path: Path) -> Checkpoint:
    """Read a .bin of version 0, 1 or 2 (by its first bytes). Raises CheckpointError unless its size fits its header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(256)
    if len(header) < 28:
        raise CheckpointError(path, f"is truncated: {size} bytes cannot hold a llama2.c header")
    (version,) = struct.unpack_from("<i", header, 4)
    if not header.startswith(gate.LLAMA2C):
        version, group_size = 0, 1
        numbers = struct.unpack_from("<7i", header)
        tied = numbers[5] > 0  # a negative vocabulary size marks an untied head
    else:
        if version not in (1, 2) or len(header) < 256:
            raise CheckpointError(path, f"has version {version} in its header: 0, 1 and 2 are known")
        numbers = struct.unpack_from("<7i", header, 8)
        tied = header[36] == 1
        group_size = struct.unpack_from("<i", header, 37)[0] if version == 2 else 1
        if header[36] > 1 or group_size < 1:
            raise CheckpointError(path, f"has a damaged header: shared flag {header[36]}, group size {group_size}")
    config = _config(path, numbers, tied, version)
    stored = _stored(path, size, config, version, group_size)
    return opened(
        "llama2c", path, config, stored, "its header", [f"llama2.c version {version}: norm_eps 1e-5 is run.c's"]
    )


def _config(path: Path, numbers: tuple[int, ...], tied: bool, version: int) -> ModelConfig:
    fields = dict(zip(SIZES, numbers, strict=True))
    if version == 0:
        fields["vocab_size"] = abs(fields["vocab_size"])
    if min(fields.values()) < 1 or fields["dim"] % fields["n_heads"]:
        listed = ", ".join(f"{key} {value}" for key, value in fields.items())
        raise CheckpointError(path, f"is not a llama2.c file, or is damaged: its header says {listed}")
    return make_config(path, **fields, norm_eps=NORM_EPS, rope_theta=ROPE_THETA, tied=tied)


def _layout(config: ModelConfig, version: int, group_size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of each weight in the order of the file, and at last the end of the file with no name."""
    shapes, offset = weight_shapes(config), HEADER_BYTES[version]
    tables = 4 * config.max_seq_len * config.head_dim if version == 0 else 0  # cos and sin, recomputed by every reader
    for name in file_order(config, version):
        numel = math.prod(shapes[name])
        offset += tables if name == HEAD else 0
        nbytes = numel + 4 * (numel // group_size) if version == 2 and len(shapes[name]) == 2 else 4 * numel
        yield name, offset, nbytes
        offset += nbytes
    yield "", offset + (tables if config.tied else 0), 0


def _stored(path: Path, size: int, config: ModelConfig, version: int, group_size: int) -> dict[str, Lazy]:
    """The weights, memory-mapped, once the header's numbers fit the file's length."""
    matrices = [config.vocab_size * config.dim, *(math.prod(s) for s in layer_shapes(config).values() if len(s) == 2)]
    if any(numel % group_size for numel in matrices):
        raise CheckpointError(path, f"has group size {group_size}, which does not divide its matrices: damaged")
    # From models of one layer and of two: a header may name a billion layers, of which no list is made.
    one, two = (list(_layout(replace(config, n_layers=n), version, group_size))[-1][1] for n in (1, 2))
    asked = one + (config.n_layers - 1) * (two - one)
    if size != asked:
        what = f"has {size} bytes, its header asks for {asked}: truncated, or not a llama2.c file; download it again"
        raise CheckpointError(path, what)
    data, shapes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8), weight_shapes(config)
    stored = {}
    for name, offset, nbytes in list(_layout(config, version, group_size))[:-1]:
        part, shape = data[offset : offset + nbytes], shapes[name]
        if version == 2 and len(shape) == 2:
            numel = math.prod(shape)
            stored[name] = _dequantized(part[:numel].view(torch.int8), part[numel:], shape, group_size)
        else:
            stored[name] = lazy(part.view(torch.float32).view(shape))
    return stored


def _dequantized(values: Tensor, scales: Tensor, shape: tuple[int, ...], group_size: int) -> Lazy:
    """Groups run through the flattened matrix, so a row may begin within one."""
    columns = shape[1]

    def read(start: int, stop: int) -> Tensor:
        first, last = start * columns // group_size, -(-stop * columns // group_size)
        groups = values[first * group_size : last * group_size].float().view(-1, group_size)
        scale = scales[4 * first : 4 * last].clone().view(torch.float32)  # cloned: int8 data leave them unaligned
        begin = start * columns - first * group_size
        return (groups * scale[:, None]).flatten()[begin : begin + (stop - start) * columns].view(-1, columns)

    return Lazy(shape, torch.float32, read)


def write_bin(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    version: int = 0,
) -> None:
    """Write a .bin that llama2.c's programs read: version 0 for run.c, 1 (fp32), 2 (int8) for runq.c; streaming.

    tokenizer: a file of any sentencepiece kind, written as tokenizer.bin beside the file, as the programs expect.
    64 int8 weights share a scale, or as many as divide dim and hidden_dim, as runq.c needs. Raises CheckpointError for
    a model that the C programs would compute differently.
    """
    path = Path(path)
    if version not in HEADER_BYTES:
        raise CheckpointError(path, f"version {version} of llama2.c's format is unknown: choose 0, 1 or 2")
    _refuse_what_c_cannot(path, config)
    entries = to_write(path, config, weights, torch.float32)
    group_size = math.gcd(64, config.dim, config.hidden_dim)
    files = llama2c_files(read(tokenizer), config.vocab_size) if tokenizer else {}
    with staged(path.parent) as stage:
        for name, data in files.items():
            _write_tokenizer(stage, name, data)
        with stage.open(path.name) as file:
            _write_weights(file, config, entries, version, group_size)


def _write_tokenizer(stage: Stage, name: str, data: bytes) -> None:
    there = stage.folder / name
    if there.exists() and there.read_bytes() != data:
        raise CheckpointError(there, "is another model's tokenizer: choose another folder")
    stage.bytes(name, data)


def _write_weights(
    file: BinaryIO, config: ModelConfig, entries: Mapping[str, Lazy], version: int, group_size: int
) -> None:
    file.write(_header(config, version, group_size))
    for name in file_order(config, version):
        if version == 0 and name == HEAD:
            file.write(_rope_tables(config))
        if version == 2 and len(entries[name].shape) == 2:
            scales = []
            for block in row_blocks(entries[name]):  # whole rows, so whole groups
                values, scale = quantize_groups(block, group_size)
                file.write(values.numpy().data)
                scales.append(scale)
            file.write(torch.cat(scales).numpy().data)
        else:
            for block in row_blocks(entries[name]):
                file.write(block.contiguous().flatten().numpy().data)
    if version == 0 and config.tied:
        file.write(_rope_tables(config))


def _refuse_what_c_cannot(path: Path, config: ModelConfig) -> None:
    if config.max_seq_len > MAX_TABLE_ROWS:
        what = f"max_seq_len is {config.max_seq_len:,}: the file would hold tables of that length"
        raise CheckpointError(path, f"{what}, at most {MAX_TABLE_ROWS:,} are written: write hf or gguf")
    for key, value, fixed in (
        ("norm_eps", config.norm_eps, NORM_EPS),
        ("rope_theta", config.rope_theta, ROPE_THETA),
        ("rope_scaling", config.rope_scaling, None),
        ("head_dim", config.head_dim, config.dim // config.n_heads),
    ):
        if value != fixed:
            raise CheckpointError(path, f"{key} is {value}, llama2.c's programs compute with {fixed}: write hf or gguf")


MAX_TABLE_ROWS = 1 << 20  # of version 0, whose files hold a row for every position of the context


def _header(config: ModelConfig, version: int, group_size: int) -> bytes:
    marked = vars(config) if version or config.tied else {**vars(config), "vocab_size": -config.vocab_size}
    header = struct.pack("<7i", *(marked[size] for size in SIZES))
    if version:
        header = gate.LLAMA2C + struct.pack("<i", version) + header + struct.pack("<B", config.tied)
    if version == 2:
        header += struct.pack("<i", group_size)
    return header.ljust(HEADER_BYTES[version], b"\0")


def _rope_tables(config: ModelConfig) -> bytes:
    """cos then sin, each (max_seq_len, head_dim/2): run.c skips them, the format has them.

    cos() and sin() and not the model's torch.polar: these give the bytes that export.py writes.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), 1.0 / (config.rope_theta**exponents))
    return angles.cos().numpy().tobytes() + angles.sin().numpy().tobytes()


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by groups of the flattened matrix -> int8 (numel,), float32 scales (groups,).

    The error of each weight is at most half its group's scale.
    """
    groups = weight.float().reshape(-1, group_size)
    scale = groups.abs().amax(dim=1) / 127.0
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(groups / safe[:, None]).to(torch.int8).flatten(), scale


def open_pt(path: Path) -> Checkpoint:
    """Read a training checkpoint of llama2.c: {"model": state dict, "model_args": {...}, ...}."""
    saved = pth.load(path)
    model, args = saved.get("model"), saved.get("model_args")
    if not isinstance(model, dict) or not isinstance(args, dict):
        if "model.embed_tokens.weight" in saved or path.name.startswith("pytorch_model"):
            raise CheckpointError(path, gate.to_safetensors(path))
        if EMBEDDING in saved:
            raise CheckpointError(path, "is weights alone, in Meta's form: give its folder, with params.json beside it")
        raise CheckpointError(path, "has no `model` and `model_args`: not a training checkpoint of llama2.c")
    state = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in model.items()}
    for buffer in ("freqs_cos", "freqs_sin", "freqs_cis"):
        state.pop(buffer, None)
    pth.check_plain(path, state)
    config = _config_from_args(path, args)
    if HEAD in state and EMBEDDING in state and torch.equal(state[HEAD], state[EMBEDDING]):
        state.pop(HEAD)  # the same matrix: the training script ties them
    config = replace(config, tied=HEAD not in state)
    return opened("llama2c", path, config, {name: lazy(t) for name, t in state.items()}, "model_args")


def _config_from_args(path: Path, args: Mapping[str, object]) -> ModelConfig:
    fields = Fields(path, {str(key): value for key, value in args.items()}, "model_args.")
    dim, n_heads = fields.integer("dim"), fields.integer("n_heads")
    rule = ffn_hidden_dim(dim, fields.integer("multiple_of", 256), None)
    config = {
        "dim": dim,
        "n_heads": n_heads,
        "n_layers": fields.integer("n_layers"),
        "n_kv_heads": fields.integer("n_kv_heads", n_heads),
        "vocab_size": fields.integer("vocab_size"),
        "hidden_dim": fields.integer("hidden_dim", rule),
        "norm_eps": fields.number("norm_eps", NORM_EPS),
        "max_seq_len": fields.integer("max_seq_len", 2048),
    }
    fields.finish(frozenset(("dropout",)))
    return make_config(path, **config, rope_theta=ROPE_THETA)
