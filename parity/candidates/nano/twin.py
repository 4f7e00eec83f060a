"""A checkpoint's seeded twin: its config, format, names and tokenizer, few layers, and weights that show mistakes.

    python -c "from parity.candidates import describe, twin; from pathlib import Path
    print(twin.write(describe.describe('model.gguf', None), Path('/tmp/twin')))"   # /tmp/twin/model.gguf

Trained weights hide mistakes: their states are large, so that an epsilon of another size drowns in rounding, and their
attention is often flat. The twin's weights follow the rules of parity/synth/checkpoint.py. It differs from its
checkpoint in the number of layers alone, which every reader of such files takes from them.
"""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama import gate, gguf_header
from nanollama.checkpoint import (
    Checkpoint,
    CheckpointError,
    Lazy,
    Weights,
    gguf_types,
    open_checkpoint,
    pth,
    write_bin,
    write_gguf,
    write_hf,
    write_meta,
)
from nanollama.checkpoint.names import weight_shapes
from nanollama.model import ModelConfig
from parity.candidates.nano.checkpoint import Description
from parity.contract import UsageError
from parity.synth.checkpoint import block_rows, block_values

LAYERS = 4  # at most
ROOM_BYTES = 2 * 10**9  # beyond it, two layers have to do
SEEDS = range(64)  # of parity.synth, by which its own checkpoints are recognised
NORM = "layers.0.attention_norm.weight"
# Of what blocks add to the residual stream, by a power of two: states of small embedding rows stay small to the end, so
# that logits alone show the final norm's epsilon, and what attention does to them is most of what they are.
QUIET = {"attention.wo.weight": 0.125, "feed_forward.w2.weight": 0.125}
# What is no part of a small folder's description: weights, their index, checksums.
WEIGHTS = (".safetensors", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".chk", "SHA256SUMS")
OTHERS_BYTES = 1 << 26  # of a file that is copied with the rest


def is_seeded(described: Description) -> bool:
    """Whether the checkpoint is of parity.synth itself, by the first norm's numbers."""
    weights = open_checkpoint(described.path).weights
    found = weights[NORM]
    made = (block_values(seed, NORM, 0, 1, found.numel())[0].to(found.dtype) for seed in SEEDS)
    return any(torch.equal(values, found) for values in made)


def write(described: Description, folder: Path, seed: int = 0) -> Path:
    """Write the twin into `folder`, under the checkpoint's own name; returns the path to load.

    Raises UsageError where there can be none: the reason, in words.
    """
    try:
        opened = open_checkpoint(described.path)
        config = replace(opened.config, n_layers=layers_of(opened.config, opened.weights.dtype))
        weights = stimulus(config, opened.weights.dtype, seed)
        folder.mkdir(parents=True)
        need, free = _bytes(weights), shutil.disk_usage(folder).free
        if 2 * need > free:  # the references may need a copy in another format
            raise UsageError(f"it needs {2 * need / 1e9:.1f} GB, the temporary folder has {free / 1e9:.1f} GB free")
        path = _write_as(opened, folder, config, weights, described.tokenizer)
        if (made := open_checkpoint(path).config) != config:
            differing = [name for name, value in vars(config).items() if getattr(made, name) != value]
            raise UsageError(
                f"its {differing[0]} is not in the file and would be another with {config.n_layers} layers"
            )
    except (CheckpointError, OSError) as error:
        raise UsageError(str(error)) from None
    return path


def layers_of(config: ModelConfig, dtype: torch.dtype) -> int:
    """LAYERS where the files stay small, else two; never more than the checkpoint's own."""
    sizes = {n: _bytes(stimulus(replace(config, n_layers=n), dtype, 0)) for n in (LAYERS, 2)}
    return min(config.n_layers, LAYERS if sizes[LAYERS] <= ROOM_BYTES else 2)


def _bytes(weights: Weights) -> int:
    return sum(weights.dtypes[name].itemsize * torch.Size(shape).numel() for name, shape in weights.shapes.items())


def stimulus(config: ModelConfig, dtype: torch.dtype, seed: int) -> Weights:
    """Seeded weights that are made as they are read, a block of rows at a time."""
    return Weights({name: _made(seed, name, shape, dtype) for name, shape in weight_shapes(config).items()})


def _made(seed: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    if len(shape) == 1:
        row = block_values(seed, name, 0, 1, shape[0])[0].to(dtype)
        return Lazy(shape, dtype, lambda start, stop: row[start:stop])
    step, gain = block_rows(shape[1]), QUIET.get(name.split(".", 2)[-1], 1.0)

    def read(start: int, stop: int) -> Tensor:
        blocks = [
            block_values(seed, name, first, min(step, shape[0] - first), shape[1])[max(0, start - first) : stop - first]
            for first in range(start // step * step, stop, step)
        ]
        return (gain * torch.cat(blocks)).to(dtype)

    return Lazy(shape, dtype, read)


def _write_as(opened: Checkpoint, folder: Path, config: ModelConfig, weights: Weights, tokenizer: Path | None) -> Path:
    path = folder / opened.path.resolve().name
    if opened.format == "hf":
        _write_hf(opened.path, path, config, weights)
    elif opened.format == "meta":
        _write_meta(opened.path, path, config, weights)
    elif opened.format == "gguf":
        part = gguf_header.PART.fullmatch(path.name)  # a split model's twin is one file
        path = folder / f"{part[1]}.gguf" if part else path
        write_gguf(path, config, weights, tokenizer=opened.tokenizer, dtype=_gguf_type(opened.path), name=path.stem)
    elif gate.kind_of(opened.path) == "pt":
        args = pth.load(opened.path)["model_args"] | {"n_layers": config.n_layers}
        torch.save({"model": dict(weights), "model_args": args}, path)
    else:
        write_bin(path, config, weights, version=_bin_version(opened.path))
    if tokenizer is not None and tokenizer != opened.path:
        _bring(tokenizer, opened.path, path)
    return path


def _bring(tokenizer: Path, of: Path, twin: Path) -> None:
    """The tokenizer, as near to the twin as it lies to its checkpoint: in the folder, beside it or above it."""
    near = of.resolve().parent
    if not tokenizer.resolve().is_relative_to(near):
        return  # one that the user named, which stays where it is
    target = twin.parent / tokenizer.resolve().relative_to(near)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer, target)


def _write_hf(source: Path, folder: Path, config: ModelConfig, weights: Weights) -> None:
    """Several files with an index where the checkpoint has such; config.json is its own."""
    indexed, whole = (source / "model.safetensors.index.json").is_file(), _bytes(weights)
    write_hf(folder, config, weights, max_shard_bytes=whole // 2 + 1 if indexed else whole)
    own = _json(source / "config.json") | {"num_hidden_layers": config.n_layers}
    if isinstance(own.get("layer_types"), list):
        own["layer_types"] = own["layer_types"][: config.n_layers]
    (folder / "config.json").write_text(json.dumps(own, indent=2))
    _copy_others(source, folder)


def _write_meta(source: Path, folder: Path, config: ModelConfig, weights: Weights) -> None:
    """In as many shards, split the same way; params.json is its own."""
    files = sorted(source.glob("consolidated.*.pth"))
    rows = len(pth.read(files[0])["tok_embeddings.weight"])
    split = "columns" if len(files) > 1 and rows == config.vocab_size else "rows"
    write_meta(folder, config, weights, shards=len(files), embedding_split=split)
    own = _json(source / "params.json") | {"n_layers": config.n_layers}
    (folder / "params.json").write_text(json.dumps(own, indent=2))
    _copy_others(source, folder)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _copy_others(source: Path, folder: Path) -> None:
    """Tokenizer, templates and whatever else lies in the folder; neither weights nor checksums."""
    for file in (*source.iterdir(), *source.glob("original/tokenizer*")):
        target = folder / file.relative_to(source)
        named = file.name.endswith(WEIGHTS) or (file.suffix == ".bin" and not file.name.startswith("tokenizer"))
        if not file.is_file() or named or target.exists() or file.stat().st_size > OTHERS_BYTES:
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _gguf_type(path: Path) -> str:
    """The type that most of the weights have; Q8_0 in place of one that cannot be written."""
    counted: Counter[str] = Counter()
    for file, header in gguf_header.read_parts(path).items():
        for name, tensor in header.tensors.items():
            counted[gguf_types.type_of(file, name, tensor.type).name.lower()] += torch.Size(tensor.shape).numel()
    plain = {kind.name.lower(): name for name, kind in gguf_types.DTYPES.items()}
    most = counted.most_common(1)[0][0]
    return plain.get(most) or (most if most in gguf_types.writable() else "q8_0")


def _bin_version(path: Path) -> int:
    head = gate.first_bytes(path)
    return int.from_bytes(head[4:8], "little") if head.startswith(gate.LLAMA2C) else 0
