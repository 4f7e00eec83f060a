"""LoRA adapters in PEFT's format: read, write, and add to a checkpoint's weights as they are read.

An adapter is a low-rank change of some matrices, W + (alpha / rank) B A (arXiv 2106.09685), and, where a chat format's
words were untrained, whole rows of embedding and head. Inside it carries Meta's names and rows; the file has Hugging
Face's, so lora_B of q and k is reordered. Rows are PEFT's `trainable_token_indices`.

    python -m nanollama generate --ckpt BASE --adapter out/RUN/adapter --prompt "Once upon a time"
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollama.checkpoint.fields import read_json
from nanollama.checkpoint.names import hf_name, is_rotary, meta_from_hf, to_hf_rows, to_meta_rows, weight_shapes
from nanollama.checkpoint.staging import staged
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import CheckpointError, Lazy, Weights, as_weights, lazy, streamed
from nanollama.model import ModelConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ("wq", "wk", "wv", "wo")
LINEARS = (*ATTENTION, "w1", "w2", "w3")
TARGETS = (*LINEARS, "output")
PREFIX = "base_model.model."
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # PEFT's name; the tensor is the rows themselves
ROW_MATRICES = ("tok_embeddings.weight", "output.weight")
# Kinds of LoRA that change the formula: refused unless they are off.
FOREIGN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")


@dataclass(frozen=True)
class Adapter:
    """pairs: weight name -> lora_A (rank, inputs) and lora_B (outputs, rank). rows: matrix name -> (n, C) new rows."""

    rank: int
    alpha: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    row_ids: tuple[int, ...] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0  # while training

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """Short names of the matrices, as in TARGETS."""
        return tuple(t for t in TARGETS if any(short_name(name) == t for name in self.pairs))


def short_name(weight: str) -> str:
    """layers.3.attention.wq.weight -> wq."""
    return weight.removesuffix(".weight").rpartition(".")[2]


def target_names(config: ModelConfig, targets: tuple[str, ...]) -> list[str]:
    """The weights that `targets` (of TARGETS) name. Raises ValueError for an unknown one, or a tied head."""
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"lora target {target}: expected all, attention, or some of {', '.join(TARGETS)}")
    if "output" in targets and config.tied:
        raise ValueError("lora target output: the head is tied to the embedding, so it has no matrix of its own")
    return [name for name in weight_shapes(config) if short_name(name) in targets]


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What an adapter adds to a matrix, in fp32: scale * B A."""
    return (b.float() @ a.float()) * scale


def merged(weights: Mapping[str, Tensor], adapter: Adapter) -> Weights:
    """The weights with the adapter in them: summed in fp32 and cast once, as each is read."""
    whole = as_weights(weights)
    ids = {token: i for i, token in enumerate(adapter.row_ids)}

    def entry(name: str) -> Lazy:
        def read(start: int, stop: int) -> Tensor:
            block = whole.rows(name, start, stop)
            if name in adapter.pairs:
                a, b = adapter.pairs[name]
                block = (block.float() + delta(a, b[start:stop], adapter.scale)).to(block.dtype)
            if name in adapter.rows:
                block = block.clone()
                for token in (t for t in ids if start <= t < stop):
                    block[token - start] = adapter.rows[name][ids[token]].to(block.dtype)
            return block

        return Lazy(whole.shapes[name], whole.dtypes[name], read)

    changed = adapter.pairs.keys() | adapter.rows.keys()
    return Weights({name: entry(name) if name in changed else whole.entry(name) for name in whole})


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_adapter(folder: str | Path, adapter: Adapter, config: ModelConfig, *, base: str) -> None:
    """A folder that `peft.PeftModel.from_pretrained` reads, tensors in fp32. base: the checkpoint it belongs to."""
    with staged(folder) as stage:
        with stage.open(TENSORS) as file:
            write_safetensors(file, *streamed({name: lazy(t) for name, t in _stored(adapter, config)}))
        stage.text(CONFIG, json.dumps(_peft_config(adapter, base), indent=2) + "\n")


def _stored(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, (a, b) in adapter.pairs.items():
        module = PREFIX + hf_name(name).removesuffix(".weight")
        b = to_hf_rows(b, config.head_dim) if is_rotary(name) else b
        yield f"{module}.lora_A.weight", a.detach().float().cpu()
        yield f"{module}.lora_B.weight", b.detach().float().cpu()
    for name, rows in adapter.rows.items():
        yield PREFIX + hf_name(name).removesuffix(".weight") + ROWS_SUFFIX, rows.detach().float().cpu()


def _peft_config(adapter: Adapter, base: str) -> dict[str, Any]:
    rows = {_hf_module(name): list(adapter.row_ids) for name in adapter.rows}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": sorted({_hf_module(name) for name in adapter.pairs}),
        "trainable_token_indices": rows or None,
    }


def _hf_module(weight: str) -> str:
    """layers.3.attention.wq.weight -> q_proj."""
    return short_name(hf_name(weight))


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in `folder` for a model of this shape. Raises CheckpointError for what does not fit."""
    folder = Path(folder)
    rank, alpha, dropout, token_ids = _read_config(folder)
    tensors = _read_tensors(folder / TENSORS)
    shapes, pairs, rows = weight_shapes(config), {}, {}
    for stored in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = stored.removesuffix(".lora_A.weight")
        name = _weight_name(folder, module, shapes)
        other = f"{module}.lora_B.weight"
        if other not in tensors:
            raise CheckpointError(folder / TENSORS, f"{other} is missing: copy the adapter again")
        a, b = tensors.pop(stored), tensors.pop(other)
        _check_shape(folder, stored, a, (rank, shapes[name][1]))
        _check_shape(folder, other, b, (shapes[name][0], rank))
        pairs[name] = (a, to_meta_rows(b, config.head_dim) if is_rotary(name) else b)
    for stored in [name for name in tensors if name.endswith(ROWS_SUFFIX)]:
        name = _weight_name(folder, stored.removesuffix(ROWS_SUFFIX), shapes)
        _check_shape(folder, stored, tensors[stored], (len(token_ids), config.dim))
        rows[name] = tensors.pop(stored)
    if tensors:
        raise CheckpointError(folder / TENSORS, f"tensor {min(tensors)} is unknown: only LoRA and token rows are read")
    _check_complete(folder, config, pairs, token_ids, rows)
    ordered = {name: pairs[name] for name in shapes if name in pairs}
    return Adapter(rank, alpha, ordered, token_ids, rows, dropout)


def _read_config(folder: Path) -> tuple[int, float, float, tuple[int, ...]]:
    """(rank, alpha, dropout, ids of the rows)."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(folder, f"holds no {CONFIG}: expected the folder of an adapter in PEFT's format")
    found = read_json(path)
    if found.get("peft_type") != "LORA":
        raise CheckpointError(path, f"peft_type is {found.get('peft_type')!r}: only LORA adapters can be read")
    for key in FOREIGN:
        if found.get(key):
            raise CheckpointError(
                path, f"{key} is {found[key]!r}: this kind of LoRA cannot be read; merge it with peft"
            )
    if found.get("bias", "none") != "none":
        raise CheckpointError(path, f"bias is {found['bias']!r}: Llama has no biases; expected 'none'")
    rank, alpha, dropout = found.get("r"), found.get("lora_alpha"), found.get("lora_dropout", 0.0)
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(path, f"r is {rank!r}: expected a whole number of at least 1")
    if not isinstance(alpha, (int, float)) or not isinstance(dropout, (int, float)):
        raise CheckpointError(path, f"lora_alpha is {alpha!r}, lora_dropout {dropout!r}: expected numbers")
    return rank, alpha, dropout, _token_ids(path, found.get("trainable_token_indices"))


def _token_ids(path: Path, found: Any) -> tuple[int, ...]:
    lists = list(found.values()) if isinstance(found, dict) else [found] if found else []
    if any(ids != lists[0] or not isinstance(ids, list) or not all(type(i) is int for i in ids) for ids in lists):
        raise CheckpointError(path, "trainable_token_indices: expected the same list of ids for embedding and head")
    return tuple(lists[0]) if lists else ()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return {name: t.float() for name, t in safetensors.torch.load_file(path).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read ({error}): copy the adapter again") from None


def _weight_name(folder: Path, module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Meta's name of the weight that a PEFT module changes."""
    name = meta_from_hf(module.removeprefix(PREFIX) + ".weight")
    if name is None or len(shapes.get(name, ())) != 2:
        raise CheckpointError(folder / TENSORS, f"{module} is no matrix of this model: it belongs to another base")
    return name


def _check_shape(folder: Path, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        what = f"{name} has shape {tuple(tensor.shape)}, the base asks for {expected}: it belongs to another base"
        raise CheckpointError(folder / TENSORS, what)


def _check_complete(
    folder: Path, config: ModelConfig, pairs: Mapping[str, Any], ids: tuple[int, ...], rows: Mapping[str, Tensor]
) -> None:
    """Every layer has what one layer has, and embedding and head have the same rows."""
    targets = tuple({short_name(name) for name in pairs} & set(TARGETS))
    missing = set(target_names(config, targets)) - pairs.keys()
    if missing or not pairs:
        lost = hf_name(min(missing)) if missing else "every lora_A"
        raise CheckpointError(folder / TENSORS, f"{lost} is missing: the adapter is incomplete; copy it again")
    expected = {name for name in ROW_MATRICES if name in weight_shapes(config)} if ids else set()
    if rows.keys() != expected:
        raise CheckpointError(folder / TENSORS, "the rows of trainable_token_indices are missing for embedding or head")
    if any(not 0 <= token < config.vocab_size for token in ids):
        raise CheckpointError(folder / CONFIG, f"trainable_token_indices: expected ids below {config.vocab_size}")
