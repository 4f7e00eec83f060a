"""Meta's folders: params.json and consolidated.NN.pth with 1..16 model-parallel shards.

What real releases contain: Llama 2 says vocab_size -1, has no rope_theta (10,000) and carries rope.freqs in its shards;
Llama 2 splits the embedding along dim, Llama 3 along the vocabulary; the 16-shard 405B repeats its 8 kv heads.

    from reference.files import open_folder
    open_folder("Meta-Llama-3.1-405B-MP16").weights["layers.0.attention.wk.weight"].shape   # (1024, 16384)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama import gate
from nanollama.gate import archive
from reference.files.checkpoint import (
    Checkpoint,
    Config,
    check_config,
    check_names,
    check_weights,
    flag,
    number,
    read_json,
)
from reference.files.weights import Source, Unusable, Weights, row_blocks, through_gate

# Keys that the forward pass uses, and keys that cannot change it (limits of Meta's own run time).
USED = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
USED |= {"rope_theta", "use_scaled_rope", "rope_scaling_factor"}
# Not Meta's: how the converters of this project say what Meta's keys cannot (docs/formats.md).
USED |= {"rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context", "kv_head_repeats"}
HARMLESS = {"max_seq_len", "max_batch_size", "model_parallel_size", "max_position_embeddings"}
HARMLESS_VALUES = {"vision_chunk_size": -1, "vision_num_cross_attention_layers": -1, "vision_max_num_chunks": 4}

LLAMA_32_SHAPES = {(2048, 16), (3072, 28)}  # (dim, n_layers) of the 1B and the 3B, which scale RoPE by 32
COLUMNS = (".wo.weight", ".w2.weight")  # split along their inputs; all other matrices along their outputs
NORMS = ("norm.weight",)  # on every shard alike


def open_meta(folder: Path) -> Checkpoint:
    params_path = folder / "params.json"
    params = _read_params(params_path)
    shards = _open_shards(folder)
    config = _config(params, shards, params_path)
    notices = _notices(params, config)
    check_names(set(shards[0]), config, folder)
    sources = {name: _source(name, [shard[name] for shard in shards], config) for name in shards[0]}
    weights = Weights(sources, layout="meta", head_dim=config["head_dim"])
    check_weights(weights, config, folder)
    if _is_tied(weights, shards):
        config = config | {"tied": True}
        kept = {name: source for name, source in sources.items() if name != "output.weight"}
        weights = Weights(kept, layout="meta", head_dim=config["head_dim"])
    return Checkpoint(folder, "meta", config, weights, notices)


def _is_tied(weights: Weights, shards: list[dict[str, Tensor]]) -> bool:
    """Meta's files hold both matrices, also of a tied model: then they are one storage, or equal row by row.

    Three rows tell nearly every untied model; a tied one is compared whole, block by block.
    """
    first, last = "tok_embeddings.weight", "output.weight"
    if weights.dtypes[first] != weights.dtypes[last]:
        return False
    if all(shard[first].data_ptr() == shard[last].data_ptr() for shard in shards):
        return True
    n_rows = weights.shapes[first][0]
    samples = [(row, row + 1) for row in (0, n_rows // 2, n_rows - 1)]
    blocks = row_blocks(weights.shapes[first], weights.dtypes[first])
    return all(torch.equal(weights.rows(first, *rows), weights.rows(last, *rows)) for rows in samples + blocks)


def hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width as Meta's code computes it: 2/3 of 4 dim, times the multiplier, rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _read_params(path: Path) -> dict[str, Any]:
    params = read_json(path)
    for key, value in params.items():
        known = key in USED | HARMLESS or value is None or HARMLESS_VALUES.get(key, params) == value
        if not known:
            raise Unusable(
                f"{path}: unknown key {gate.shown(key)}, which may change the computation; only dense Llamas are read"
            )
    return params


def _config(params: dict[str, Any], shards: list[dict[str, Tensor]], path: Path) -> Config:
    dim, n_heads = number(params, "dim", path), number(params, "n_heads", path)
    if dim % n_heads:
        raise Unusable(f"{path}: dim {dim} is not a multiple of n_heads {n_heads}")
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        multiplier = number(params, "ffn_dim_multiplier", path, float)
    kv_heads = number(params, "n_kv_heads", path, default=n_heads)
    repeats = number(params, "kv_head_repeats", path, default=1)
    if kv_heads % repeats:
        raise Unusable(f"{path}: kv_head_repeats {repeats} does not divide n_kv_heads {kv_heads}")
    config = {
        "dim": dim,
        "n_layers": number(params, "n_layers", path),
        "n_heads": n_heads,
        "n_kv_heads": kv_heads // repeats,
        "head_dim": dim // n_heads,
        "hidden_dim": hidden_dim(dim, number(params, "multiple_of", path, default=256), multiplier),
        "vocab_size": _vocab_size(params, shards, path),
        "norm_eps": number(params, "norm_eps", path, float),
        "rope_theta": number(params, "rope_theta", path, float, default=10000.0),
        "rope_scaling": _rope_scaling(params, path),
        "tied": False,  # the weights will say
    }
    check_config(config, path)
    return config


def _vocab_size(params: dict[str, Any], shards: list[dict[str, Tensor]], path: Path) -> int:
    """Llama 2 leaves it to the tokenizer (-1); the output matrix, always split by rows, knows."""
    if params.get("vocab_size", -1) != -1:
        return number(params, "vocab_size", path)
    if any("output.weight" not in shard for shard in shards):
        raise Unusable(f"{path.parent}: tensor output.weight is missing; download the files again")
    return sum(len(shard["output.weight"]) for shard in shards)


def _rope_scaling(params: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Meta's numbers are constants of its code; its params.json has no factor, though 3.2 1B and 3B use 32."""
    if not flag(params, "use_scaled_rope", path):
        return None
    default = 32.0 if (params["dim"], params["n_layers"]) in LLAMA_32_SHAPES else 8.0
    factor = number(params, "rope_scaling_factor", path, float, default=default)
    return {
        "factor": factor,
        "low_freq_factor": number(params, "rope_low_freq_factor", path, float, default=1.0),
        "high_freq_factor": number(params, "rope_high_freq_factor", path, float, default=4.0),
        "original_context": number(params, "rope_original_context", path, default=8192),
    }


def _notices(params: dict[str, Any], config: Config) -> tuple[str, ...]:
    guessed = params.get("rope_scaling_factor") is None and config["rope_scaling"] is not None
    if guessed and config["rope_scaling"]["factor"] == 32:
        return ("RoPE scaling factor 32 taken from the shape (Llama 3.2 1B or 3B): params.json does not record it",)
    return ()


def _open_shards(folder: Path) -> list[dict[str, Tensor]]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise Unusable(f"{folder}: no consolidated.NN.pth lies beside params.json")
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02d}.pth":
            raise Unusable(f"{folder}: consolidated.{i:02d}.pth is missing (found {path.name})")
    if len(paths) > 16 or len(paths) & (len(paths) - 1):
        raise Unusable(f"{folder}: {len(paths)} shards; Meta's files come in 1, 2, 4, 8 or 16")
    shards = [_open_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.keys() != shards[0].keys():
            name = sorted(shard.keys() ^ shards[0].keys())[0]
            raise Unusable(f"{path}: shards disagree: tensor {name} is not in all of them")
    return shards


def _load(path: Path) -> object:
    with gate.unchanged(path):
        archive.check(path)
        try:
            return torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a hostile or truncated pickle can raise nearly anything
            raise Unusable(f"{path}: not a readable torch checkpoint ({gate.reason(error)})") from None


def _open_shard(path: Path) -> dict[str, Tensor]:
    loaded = through_gate(_load, path)
    if not isinstance(loaded, dict):
        raise Unusable(f"{path}: holds a {type(loaded).__name__}, not a plain state dict")
    for name, value in loaded.items():
        plain = isinstance(name, str) and type(value) is Tensor and value.layout == torch.strided
        if not plain or value.device.type != "cpu" or value.is_quantized:
            raise Unusable(f"{path}: entry {str(name)[:60]!r} is not a plain tensor; a state dict is expected")
    return {name: value for name, value in loaded.items() if name != "rope.freqs"}  # a table that Llama 2 saved


def _source(name: str, parts: list[Tensor], config: Config) -> Source:
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        raise Unusable(f"tensor {name}: shards disagree about its shape or dtype")
    if name.endswith(NORMS):
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise Unusable(f"tensor {name}: shards disagree about its values, which should be the same on all")
        return Source((parts[0],), label=name)
    if parts[0].dim() != 2:
        return Source((parts[0],), label=name)  # the check of shapes refuses it by name
    if name.endswith(COLUMNS):
        return Source(tuple(parts), dim=1, label=name)
    if name == "tok_embeddings.weight":
        return Source(tuple(parts), dim=0 if parts[0].shape[1] == config["dim"] else 1, label=name)
    copies = len(parts) // config["n_kv_heads"] if name.endswith((".wk.weight", ".wv.weight")) else 1
    repeated = copies > 1 and len(parts[0]) == config["head_dim"]
    return Source(tuple(parts), dim=0, copies=copies if repeated else 1, label=name)
