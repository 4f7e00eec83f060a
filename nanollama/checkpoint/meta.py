"""Meta's own format: a folder of params.json and consolidated.00.pth ... consolidated.15.pth (model-parallel shards).

Shards are merged lazily, by fairscale's layout: column-parallel weights (wq, wk, wv, w1, w3, output) are split by rows,
row-parallel ones (wo, w2) by columns, the embedding by rows (Llama 3) or by columns (Llama 2), norms are repeated.

    python -m nanollama inspect Meta-Llama-3.1-8B

Sources: `llama_models.llama3.model` and `.args` for the keys and defaults, fairscale's parallel layers for the splits.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama import gate
from nanollama.checkpoint import pth
from nanollama.checkpoint.fields import Fields, read_json
from nanollama.checkpoint.names import EMBEDDING, HEAD
from nanollama.checkpoint.staging import refuse_occupied, staged
from nanollama.checkpoint.streams import write_pth
from nanollama.checkpoint.weights import Checkpoint, CheckpointError, Lazy, make_config, opened, same_numbers, to_write
from nanollama.model import ModelConfig, RopeScaling
from nanollama.vocabulary import read
from nanollama.vocabulary.write import fitting, meta_files

MAX_SHARDS = 16
KV, ROW_PARALLEL = (".wk.weight", ".wv.weight"), (".wo.weight", ".w2.weight")
# Sizes of buffers and of the machine, not of the model.
HARMLESS = frozenset(("max_batch_size", "max_seq_len", "model_parallel_size"))
# Beginnings of keys that change the computation, in Llama 4's params.json and the like; what nothing reads opens.
COMPUTES = re.compile(
    "attention|attn_|ffn_|floor_|head_|lora_|moe|n_|nope_|norm|qk_|quant|rope|sliding|tie|use_|vision"
)
# Llama 3.2 1B and 3B (dim, n_layers, n_heads, n_kv_heads): their params.json does not record the factor, 32.
FACTOR_32_SHAPES = ((2048, 16, 32, 8), (3072, 28, 24, 8))


def open_meta(folder: Path) -> Checkpoint:
    """Read a Meta folder. Raises CheckpointError unless params.json and the shards fit each other exactly."""
    params, notices = folder / "params.json", list[str]()
    raw = read_json(params)
    shards = [pth.read(path) for path in shard_files(folder)]
    for shard in shards:
        shard.pop("rope.freqs", None)  # Llama 2 stores the RoPE table's frequencies; every code recomputes them
    _check_shards_agree(folder, shards)
    head = shards[0].get(HEAD)
    config = read_params(params, raw, 0 if head is None or head.ndim != 2 else len(head) * len(shards), notices)
    entries = merge_shards(folder, shards, config)
    if _is_tied(shards, entries):
        config, entries = replace(config, tied=True), {k: v for k, v in entries.items() if k != HEAD}
    found = opened("meta", folder, config, entries, "params.json", notices)
    found.weights.rows("layers.0.attention.wk.weight", 0, 1)  # repeated kv heads that differ are found here, not later
    return found


def shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01.pth, ... without gaps."""
    found = sorted(p for p in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", p.name))
    if not 1 <= len(found) <= MAX_SHARDS:
        raise CheckpointError(folder, f"holds {len(found)} files consolidated.NN.pth: expected 1 to {MAX_SHARDS}")
    for i, path in enumerate(found):
        if path.name != f"consolidated.{i:02d}.pth":
            missing = folder / f"consolidated.{i:02d}.pth"
            raise CheckpointError(missing, "is missing while later shards are there: download it again")
    return found


def read_params(path: Path, raw: dict[str, Any], vocab_size_stored: int, notices: list[str]) -> ModelConfig:
    """params.json -> config, untied.

    vocab_size_stored: what the weights say, since Llama 2's params.json says -1. Adds to `notices`.
    """
    fields = Fields(path, raw)
    dim, n_layers, n_heads = (fields.integer(key) for key in ("dim", "n_layers", "n_heads"))
    n_kv_heads = fields.integer("n_kv_heads", n_heads)
    shape = (dim, n_layers, n_heads, n_kv_heads)
    # Ours: how often each head is repeated where n_kv_heads is the number that Meta's code needs, one per shard.
    repeats = fields.integer("kv_head_repeats", 1)
    if n_kv_heads % repeats:
        raise fields.error("kv_head_repeats", f"is {repeats}: expected a divisor of n_kv_heads {n_kv_heads}")
    if dim % n_heads:
        raise fields.error("dim", f"is {dim}: expected a multiple of n_heads {n_heads}")
    vocab_size = fields.integer("vocab_size", -1, alias=-1)
    hidden_dim = ffn_hidden_dim(dim, fields.integer("multiple_of", 256), fields.number("ffn_dim_multiplier", None))
    theta = fields.number("rope_theta", 10_000.0)
    scaling = _read_scaling(fields, shape, notices)
    config = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads // repeats,
        "vocab_size": vocab_size_stored if vocab_size == -1 else vocab_size,
        "hidden_dim": hidden_dim,
        "norm_eps": fields.number("norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        # Ours: Meta's files do not say it.
        "max_seq_len": fields.integer("max_position_embeddings", context_guess(theta, scaling)),
    }
    _refuse_vision(fields)
    unread = {key for key in raw if key in fields and not COMPUTES.match(key)}
    if unread - HARMLESS:
        notices.append(f"params.json: {', '.join(sorted(unread - HARMLESS))[:200]}: nothing reads this")
    fields.finish(HARMLESS | unread)
    return make_config(path, **config)


def _read_scaling(fields: Fields, shape: tuple[int, ...], notices: list[str]) -> RopeScaling | None:
    scaled = fields.flag("use_scaled_rope")
    factor = fields.number("rope_scaling_factor", None)
    low = fields.number("rope_low_freq_factor", 1.0)
    high = fields.number("rope_high_freq_factor", 4.0)
    original = fields.integer("rope_original_context", 8192)
    if not scaled:
        if factor is not None:
            raise fields.error("rope_scaling_factor", f"is {factor} while use_scaled_rope is not true: remove one")
        return None
    if high <= low:
        raise fields.error("rope_high_freq_factor", f"is {high}: expected more than rope_low_freq_factor {low}")
    if factor is None:
        factor = 32.0 if shape in FACTOR_32_SHAPES else 8.0
        said = "params.json does not record the RoPE scaling factor; 32 is taken, as published for Llama 3.2 1B and 3B"
        notices += [said] if factor == 32.0 else []
    return RopeScaling(factor, low, high, original)


def _refuse_vision(fields: Fields) -> None:
    """Meta's text models carry the switches of the vision tower, off; their sizes then mean nothing."""
    for key in ("vision_chunk_size", "vision_num_cross_attention_layers"):
        value = fields.take(key, -1)
        if value != -1:
            raise fields.error(key, f"is {gate.shown(value)}: only text models can be read")
    fields.take("vision_max_num_chunks", 4)


def ffn_hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule (`FeedForward.__init__`): two thirds of 4*dim, times the multiplier, up to the next multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def context_guess(theta: float, scaling: RopeScaling | None) -> int:
    """Tokens that the family was trained for, where no file says it: 3.1 and later, Llama 2, Llama 3."""
    return 131_072 if scaling else 4096 if theta == 10_000.0 else 8192


def _check_shards_agree(folder: Path, shards: Sequence[dict[str, Tensor]]) -> None:
    """Same names, shapes and dtypes in every shard; the replicated norms equal."""
    first = shards[0]
    for i, shard in enumerate(shards[1:], start=1):
        if what := _difference(shard, first):
            where = folder / f"consolidated.{i:02d}.pth"
            raise CheckpointError(where, f"disagrees with consolidated.00.pth: {what}; download both again")


def _difference(shard: dict[str, Tensor], first: dict[str, Tensor]) -> str | None:
    for name in sorted(first.keys() ^ shard.keys()):
        return f"{name} is {'only' if name in shard else 'missing'} there"
    for name, tensor in shard.items():
        here, there = ((t.dtype, tuple(t.shape)) for t in (tensor, first[name]))
        if here != there:
            return f"{name} is {here[0]} {here[1]}, there {there[0]} {there[1]}"
        if tensor.ndim == 1 and not torch.equal(tensor, first[name]):
            return f"{name} must be equal in all shards"
    return None


def merge_shards(folder: Path, shards: Sequence[dict[str, Tensor]], config: ModelConfig) -> dict[str, Lazy]:
    """Every name of the shards as one lazy tensor of the whole model."""
    merged = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        is_kv = name.endswith(KV)
        if len(parts) == 1 or parts[0].ndim != 2:
            merged[name] = _by_rows(parts[:1])
        # Llama 2's ParallelEmbedding is split by columns; Llama 3's VocabParallelEmbedding by rows.
        elif name.endswith(ROW_PARALLEL) or (name == EMBEDDING and parts[0].shape[1] * len(parts) == config.dim):
            merged[name] = _by_columns(parts)
        elif is_kv and len(parts) > config.n_kv_heads and parts[0].shape[0] == config.head_dim:
            merged[name] = _by_repeated_heads(f"{folder}: {name}", parts, config)
        else:
            merged[name] = _by_rows(parts)
    return merged


def _by_rows(parts: Sequence[Tensor]) -> Lazy:
    """Shard s holds rows s*n ... (s+1)*n."""
    n = parts[0].shape[0] if parts[0].ndim else 0

    def read(start: int, stop: int) -> Tensor:
        pieces = [p[max(start - s * n, 0) : max(stop - s * n, 0)] for s, p in enumerate(parts)]
        pieces = [p for p in pieces if len(p)] or pieces[:1]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Lazy((n * len(parts), *parts[0].shape[1:]), parts[0].dtype, read)


def _by_columns(parts: Sequence[Tensor]) -> Lazy:
    rows, columns = parts[0].shape
    shape = (rows, columns * len(parts))
    return Lazy(shape, parts[0].dtype, lambda start, stop: torch.cat([p[start:stop] for p in parts], dim=1))


def _by_repeated_heads(where: str, parts: Sequence[Tensor], config: ModelConfig) -> Lazy:
    """More shards than kv heads: consecutive shards hold the same head, of which one copy is the model's."""
    if len(parts) % config.n_kv_heads:
        what = f"{len(parts)} shards cannot share {config.n_kv_heads} kv heads evenly: is one missing?"
        raise CheckpointError(where, what)
    repeats = len(parts) // config.n_kv_heads
    copies = [_by_rows(parts[i::repeats]) for i in range(repeats)]

    def read(start: int, stop: int) -> Tensor:
        rows = copies[0].read(start, stop)
        if not all(torch.equal(rows, copy.read(start, stop)) for copy in copies[1:]):
            raise CheckpointError(where, "the copies of a kv head differ between shards; download the shards again")
        return rows

    return Lazy(copies[0].shape, copies[0].dtype, read)


def _is_tied(shards: Sequence[dict[str, Tensor]], entries: dict[str, Lazy]) -> bool:
    """Meta's files always hold both matrices; equal ones (Llama 3.2 1B and 3B) are one parameter.

    A few rows settle it for every untied model; only a tied one is compared whole, in blocks.
    """
    if EMBEDDING not in entries or HEAD not in entries or entries[EMBEDDING].shape != entries[HEAD].shape:
        return False
    if all(shard[EMBEDDING].data_ptr() == shard[HEAD].data_ptr() for shard in shards):
        return True  # one matrix in the file
    return same_numbers(entries[EMBEDDING], entries[HEAD])


def write_meta(
    folder: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    embedding_split: str = "rows",
) -> None:
    """Write a Meta folder that Meta's own code opens, streaming; weights as `open_checkpoint` returns them, or a dict.

    tokenizer: a file of any kind, written as tokenizer.model. shards: 1 to 16, read by as many processes of Meta's code
    (more shards than kv heads: each head is repeated, as in the 16-shard 405B). embedding_split: "rows" as in Llama 3
    and all of today's code, "columns" as in Llama 2.
    Raises CheckpointError when the model cannot be said in params.json or split so.
    """
    folder = Path(folder)
    refuse_occupied(folder)
    params = make_params(folder, config, shards)
    entries = to_write(folder, config, weights, dtype)
    vocabulary = None if tokenizer is None else fitting(read(tokenizer), config.vocab_size)
    with staged(folder) as stage:
        for s in range(shards):
            parts = {n: _shard(n, entry, s, shards, config, embedding_split) for n, entry in entries.items()}
            aliases = {HEAD: EMBEDDING} if config.tied else {}
            if config.tied and embedding_split != "rows" and shards > 1:
                parts[HEAD], aliases = _shard(HEAD, entries[EMBEDDING], s, shards, config, "rows"), {}
            with stage.open(f"consolidated.{s:02d}.pth") as file:
                write_pth(file, parts, aliases)
        for file_name, data in meta_files(vocabulary).items() if vocabulary else ():
            stage.bytes(file_name, data)
        stage.text("params.json", json.dumps(params, indent=2) + "\n")


def make_params(where: Path, config: ModelConfig, shards: int = 1) -> dict[str, Any]:
    """params.json of a config, with our extra keys only where Meta's do not suffice (Meta's code ignores those)."""
    if config.head_dim * config.n_heads != config.dim:
        what = f"head_dim {config.head_dim} is not dim / n_heads, which Meta's format cannot say: write hf or gguf"
        raise CheckpointError(where, what)
    divided = {name: getattr(config, name) for name in ("n_heads", "hidden_dim", "vocab_size")}
    if not 1 <= shards <= MAX_SHARDS or any(size % shards for size in divided.values()):
        listed = ", ".join(f"{name} {size}" for name, size in divided.items())
        raise CheckpointError(where, f"{shards} shards: expected 1 to {MAX_SHARDS}, dividing {listed}")
    repeats = max(1, shards // config.n_kv_heads)
    if config.n_kv_heads * repeats % shards:
        raise CheckpointError(where, f"{shards} shards cannot share {config.n_kv_heads} kv heads evenly")
    multiple_of, multiplier = _ffn_numbers(config.dim, config.hidden_dim)
    params = {
        key: getattr(config, key) for key in ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta")
    }
    params |= {"n_kv_heads": config.n_kv_heads * repeats, "multiple_of": multiple_of}
    params |= {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
    params |= {"use_scaled_rope": config.rope_scaling is not None, **_scaling_params(config)}
    if repeats > 1:
        params["kv_head_repeats"] = repeats
    if config.max_seq_len != context_guess(config.rope_theta, config.rope_scaling):
        params["max_position_embeddings"] = config.max_seq_len
    return params


def _scaling_params(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    shape = (config.dim, config.n_layers, config.n_heads, config.n_kv_heads)
    extra: dict[str, Any] = {}
    if scaling.factor != 8 or shape in FACTOR_32_SHAPES:
        extra["rope_scaling_factor"] = scaling.factor
    published = RopeScaling(factor=scaling.factor)
    for key in ("low_freq_factor", "high_freq_factor", "original_context"):
        if getattr(scaling, key) != getattr(published, key):
            extra[f"rope_{key}"] = getattr(scaling, key)
    return extra


def _ffn_numbers(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give hidden_dim: a published pair if one does, else hidden_dim itself."""
    for multiple_of in (256, 1024, 4096):
        for multiplier in (None, 1.3, 1.5, 1.2, 1.0):
            if ffn_hidden_dim(dim, multiple_of, multiplier) == hidden_dim:
                return multiple_of, multiplier
    plain = ffn_hidden_dim(dim, 1, None)
    return hidden_dim, None if plain <= hidden_dim else hidden_dim / plain


def _shard(name: str, entry: Lazy, s: int, shards: int, config: ModelConfig, embedding_split: str) -> Lazy:
    """Shard s of a whole weight: the inverse of `merge_shards`. `make_params` has seen that the sizes are multiples."""
    if shards == 1 or len(entry.shape) == 1:
        return entry
    if name.endswith(ROW_PARALLEL) or (name == EMBEDDING and embedding_split == "columns"):
        rows, n = entry.shape[0], entry.shape[1] // shards
        return Lazy((rows, n), entry.dtype, lambda start, stop: entry.read(start, stop)[:, s * n : (s + 1) * n])
    if name.endswith(KV) and shards > config.n_kv_heads:
        n, first = config.head_dim, s * config.n_kv_heads // shards * config.head_dim
    else:
        n = entry.shape[0] // shards
        first = s * n
    return Lazy((n, *entry.shape[1:]), entry.dtype, lambda start, stop: entry.read(first + start, first + stop))
