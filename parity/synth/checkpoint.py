"""Seeded checkpoints of any published Llama shape, made to show errors: how, stands above `SMALL_ROWS`.

    python -m parity.synth --shape tiny --out /tmp/tiny        # prints: /tmp/tiny: 33,711,232 parameters, meta, ...
    python -m parity.synth --dim 96 --heads 6 --kv_heads 3 --hidden 200 --eps 1e-6 --vocab 512 --out /tmp/odd

A weight's numbers depend on the seed, its name and its row alone, so the same seed gives the same model in both
formats, in any number of shards. Files are written through a memory map, one block of rows at a time: 405B-shaped needs
no more memory than tiny. A sha256 manifest (SHA256SUMS) lies beside the files.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import MAP_SHARED
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanollama.cli import execute
from parity.contract import DTYPES, UsageError
from parity.synth.shapes import SHAPES, Shape, Sizes, sized, weight_shapes

BLOCK_ELEMENTS = 1 << 24
SAFETENSORS_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
MAX_SHARD_BYTES = 5 * 10**9  # of a safetensors file, as the hub's uploads have
# The stimulus decides whether an error shows:
# - q and k have gain 2, so attention is peaked and a wrong angle, mask or head changes it;
# - norm weights differ from 1 and from each other;
# - one embedding row in four is small (RMS 0.003 to 0.03), so that eps 2e-5 against 1e-5 is seen;
# - the head's rows have log-normal lengths and the blocks' outputs are halved, so that the best token stands clear of
#   the second at more than half of the positions in bf16.
SMALL_ROWS = 4
HEAD_SPREAD = 1.0
GAINS = {"wq.weight": 2.0, "wk.weight": 2.0, "wo.weight": 0.5, "w2.weight": 0.5}


def block_rows(width: int) -> int:
    """Rows that are made at once; a block begins at a multiple of them."""
    return max(1, BLOCK_ELEMENTS // width)


def block_values(seed: int, name: str, start: int, rows: int, width: int) -> Tensor:
    """Rows start..start+rows of a weight, (rows, width) float32, from a generator seeded by (seed, name, start)."""
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(f"{name}/{start}".encode()))
    x = torch.randn(rows, width, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.25 * x
    if name.startswith("tok_embeddings"):
        scale = torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
        small = torch.arange(start, start + rows).unsqueeze(1) % SMALL_ROWS == 1
        tiny = 0.003 * 10 ** torch.rand(rows, 1, generator=generator)
        return x * torch.where(small, tiny, scale)
    if name.startswith("output"):
        return x * torch.exp(HEAD_SPREAD * torch.randn(rows, 1, generator=generator)) / width**0.5
    return x * GAINS.get(name.split(".", 3)[-1], 1.0) / width**0.5


def row_blocks(seed: int, name: str, size: tuple[int, ...], shape: Shape) -> Iterator[tuple[int, Tensor]]:
    """(first row, values) blocks that cover a weight; a norm is one row of `size[0]` values."""
    if len(size) == 1:
        yield 0, block_values(seed, name, 0, 1, size[0])[0]
        return
    source = "tok_embeddings.weight" if shape.tied and name == "output.weight" else name
    step = block_rows(size[1])
    for start in range(0, size[0], step):
        yield start, block_values(seed, source, start, min(step, size[0] - start), size[1])


def meta_params(shape: Shape) -> dict[str, Any]:
    """params.json as Meta writes it; the factor is recorded when it is not the one that their code assumes."""
    params: dict[str, Any] = {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "vocab_size": shape.vocab_size,
        "multiple_of": shape.multiple_of,
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
    }
    if shape.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = shape.ffn_dim_multiplier
    if shape.rope_factor is not None:
        params["use_scaled_rope"] = True
        params |= {} if shape.rope_factor == 8.0 else {"rope_scaling_factor": shape.rope_factor}
    if shape.llama2:
        del params["rope_theta"]
    return params


def hf_config(shape: Shape, dtype: str) -> dict[str, Any]:
    """config.json as the hub's repositories have it."""
    scaling = None
    if shape.rope_factor is not None:
        scaling = {
            "factor": shape.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": shape.original_context,
            "rope_type": "llama3",
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1 if shape.llama2 else 128_000,
        "eos_token_id": 2 if shape.llama2 else 128_001,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
    }


HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    top = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    return f"model.layers.{layer}.{HF_NAMES[rest]}.weight"


def half_split_rows(rows: int, head_dim: int) -> Tensor:
    """Where each of Meta's interleaved q/k rows goes in HF's layout: pair i of a head at i and i + head_dim/2."""
    index = torch.arange(rows)
    head, feature = index // head_dim, index % head_dim
    return head * head_dim + (feature % 2) * (head_dim // 2) + feature // 2


def write_hf(folder: Path, shape: Shape, seed: int, dtype: str) -> None:
    """config.json and safetensors of at most MAX_SHARD_BYTES each."""
    sizes = {n: s for n, s in weight_shapes(shape).items() if not (shape.tied and n == "output.weight")}
    groups: list[list[str]] = [[]]
    item, used = DTYPES[dtype].itemsize, 0
    for name, size in sizes.items():
        n_bytes = torch.Size(size).numel() * item
        if groups[-1] and used + n_bytes > MAX_SHARD_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += n_bytes
    weight_map: dict[str, str] = {}
    for n, names in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors"
        _write_safetensors(folder / file, {name: sizes[name] for name in names}, shape, seed, dtype)
        weight_map |= {hf_name(name): file for name in names}
    if len(groups) > 1:
        total = sum(torch.Size(s).numel() * item for s in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(hf_config(shape, dtype), indent=1))


def _write_safetensors(path: Path, sizes: dict[str, tuple[int, ...]], shape: Shape, seed: int, dtype: str) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, size in sizes.items():
        end = offset + torch.Size(size).numel() * DTYPES[dtype].itemsize
        header[hf_name(name)] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    raw = torch.from_file(str(path), shared=True, size=8 + len(text) + offset, dtype=torch.uint8)
    for name, size in sizes.items():
        begin, end = (8 + len(text) + n for n in header[hf_name(name)]["data_offsets"])
        target = raw[begin:end].view(DTYPES[dtype]).view(size)
        permuted = half_split_rows(size[0], shape.head_dim) if name.endswith(("wq.weight", "wk.weight")) else None
        for start, values in row_blocks(seed, name, size, shape):
            stop = start + values.shape[0]
            if permuted is None:
                target[start:stop] = values
            else:
                target[permuted[start:stop]] = values.to(target.dtype)


def shard_slice(name: str, size: tuple[int, ...], shard: int, shards: int, shape: Shape) -> tuple[slice, slice]:
    """The (rows, columns) of a weight that one model-parallel shard holds, in fairscale's layout.

    Column-parallel weights and Llama 3's embedding are split by rows; row-parallel ones and Llama 2's embedding by
    columns; norms are repeated, and so are kv heads when there are fewer of them than shards (405B on 16).
    """
    if len(size) == 1:
        return slice(None), slice(None)
    rows, columns = size
    if name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok_embeddings") and shape.llama2):
        step = columns // shards
        return slice(None), slice(shard * step, (shard + 1) * step)
    if name.endswith(("wk.weight", "wv.weight")) and shards > shape.n_kv_heads:
        head = shard * shape.n_kv_heads // shards
        return slice(head * shape.head_dim, (head + 1) * shape.head_dim), slice(None)
    step = rows // shards
    return slice(shard * step, (shard + 1) * step), slice(None)


def write_meta(folder: Path, shape: Shape, seed: int, dtype: str, shards: int) -> None:
    """params.json and consolidated.NN.pth: torch.save's archive with its space left free, filled through a map."""
    sizes = weight_shapes(shape)
    for shard in range(shards):
        held = {}
        for name, size in sizes.items():
            cut = shard_slice(name, size, shard, shards, shape)
            held[name] = torch.empty([len(range(n)[c]) for n, c in zip(size, cut, strict=False)], dtype=DTYPES[dtype])
        path = folder / f"consolidated.{shard:02d}.pth"
        with torch.serialization.skip_data():
            torch.save(held, path)  # the tensors' memory is never touched
        del held
    with torch.serialization.set_default_mmap_options(MAP_SHARED), warnings.catch_warnings():
        files = [torch.load(folder / f"consolidated.{s:02d}.pth", mmap=True, weights_only=True) for s in range(shards)]
    for name, size in sizes.items():
        for start, values in row_blocks(seed, name, size, shape):
            for shard, file in enumerate(files):
                _fill(file[name], name, size, start, values, shard_slice(name, size, shard, shards, shape))
    (folder / "params.json").write_text(json.dumps(meta_params(shape), indent=1))


def _fill(
    target: Tensor, name: str, size: tuple[int, ...], start: int, values: Tensor, cut: tuple[slice, slice]
) -> None:
    """Copy the part of a block of rows that falls into one shard."""
    if len(size) == 1:
        target.copy_(values)
        return
    held = range(size[0])[cut[0]]
    first, last = max(start, held.start), min(start + values.shape[0], held.stop)
    if first < last:
        target[first - held.start : last - held.start] = values[first - start : last - start, cut[1]]


def llama3_tokenizer() -> Path:
    """The real Llama 3 tokenizer file, which ships inside the llama_models package."""
    spec = importlib.util.find_spec("llama_models")
    path = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model" if spec else Path("?")  # type: ignore[index]
    if not path.is_file():
        raise UsageError("the Llama 3 tokenizer was not found: install llama_models, or give --tokenizer FILE")
    return path


def write_manifest(folder: Path) -> None:
    """SHA256SUMS in sha256sum's format."""
    lines = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        lines.append(f"{sha256(path)}  {path.name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` at the end: a broken run leaves nothing. Raises UsageError."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError(f"{flag} {out} exists and is not empty: give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield work
        os.chmod(work, 0o755)
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def synthesise(
    shape: Shape,
    out: Path,
    *,
    format: str = "meta",
    seed: int = 0,
    shards: int = 1,
    dtype: str = "bf16",
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint folder, all at once: a broken run leaves nothing at `out`. Raises UsageError."""
    if shape.n_heads % shards or (shards > shape.n_kv_heads and shards % shape.n_kv_heads):
        raise UsageError(f"--shards {shards} does not divide {shape.n_heads} heads and {shape.n_kv_heads} kv heads")
    if tokenizer is None and shape.vocab_size == 128_256:
        tokenizer = llama3_tokenizer()
    with new_folder(out) as work:
        need = sum(torch.Size(s).numel() for s in weight_shapes(shape).values()) * DTYPES[dtype].itemsize
        free = shutil.disk_usage(work).free
        if need > free:  # a hole in a mapped file that cannot be filled kills the process: ask before
            raise UsageError(f"--out {out}: needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        try:
            if format == "hf":
                write_hf(work, shape, seed, dtype)
            else:
                write_meta(work, shape, seed, dtype, shards)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, work / "tokenizer.model")
            write_manifest(work)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UsageError(f"--out {out}: no space left on the disk, {need / 1e9:.1f} GB are needed") from None
            raise


def parameters(shape: Shape) -> int:
    return sum(
        torch.Size(s).numel() for n, s in weight_shapes(shape).items() if not (shape.tied and n == "output.weight")
    )


def main(argv: list[str] | None = None) -> int:
    return execute(write_seeded, argv, prog="python -m parity.synth", doc=__doc__, errors=())


def write_seeded(
    *,
    shape: str = "tiny",  # of a published Llama; `list` prints them
    out: Path | None = None,  # folder to write
    layers: int | None = None,  # blocks; default: the shape's
    sizes: Sizes = Sizes(),
    format: Literal["meta", "hf"] = "meta",  # of the files
    shards: Literal[1, 2, 4, 8, 16] = 1,  # model-parallel files (meta)
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16",  # of the weights
    seed: int = 0,  # the same seed, the same model
    tokenizer: Path | None = None,  # a tokenizer file; default: Llama 3's where the vocabulary fits
) -> int:
    """Write a seeded checkpoint, or list the shapes."""
    if shape == "list":
        for name, known in SHAPES.items():
            print(f"{name:12} {parameters(known):>16,} parameters, {known.n_layers} layers")
        return 0
    if shape not in SHAPES:
        raise UsageError(f"--shape {shape!r} is unknown: expected one of {', '.join(SHAPES)}")
    if out is None:
        raise UsageError("--out is missing: give the folder to write")
    if layers is not None and layers < 1:
        raise UsageError(f"--layers {layers}: expected at least 1")
    if tokenizer is not None and not tokenizer.is_file():
        raise UsageError(f"--tokenizer {tokenizer} does not exist")
    made = sized(SHAPES[shape], layers, sizes, format)
    synthesise(made, out, format=format, seed=seed, shards=shards, dtype=dtype, tokenizer=tokenizer)
    print(f"{out}: {parameters(made):,} parameters, {format}, {dtype}, seed {seed}")
    return 0
