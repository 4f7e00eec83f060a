"""LoRA adapters in PEFT's format: read, write, and add to a checkpoint's weights as they are read.

An adapter is a low-rank change of some matrices, W + (alpha / rank) B A (arXiv 2106.09685), each with a rank and alpha
of its own; DoRA (arXiv 2402.09353) also gives each row of the sum a length of its own. Besides, whole matrices (PEFT's
`modules_to_save`) and rows of embedding and head (PEFT's `trainable_token_indices`) can be stored as they are. Inside
it carries Meta's names and rows; the file has Hugging Face's, so lora_B of q and k, and their lengths, are reordered.

    python -m nanollama generate --ckpt BASE --adapter out/RUN/adapter --prompt "Once upon a time"
"""

import json
import re
from collections import Counter
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama import gate
from nanollama.checkpoint import pth
from nanollama.checkpoint.names import EMBEDDING, HEAD, hf_name, is_rotary, to_hf_rows, to_meta_rows, weight_shapes
from nanollama.checkpoint.peft_config import read_config
from nanollama.checkpoint.staging import staged
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import CheckpointError, Lazy, Weights, as_weights, lazy
from nanollama.model import ModelConfig

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ATTENTION = ("wq", "wk", "wv", "wo")
LINEARS = (*ATTENTION, "w1", "w2", "w3")
TARGETS = (*LINEARS, "output")
PREFIX = "base_model.model."
ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"  # PEFT's name; the tensor is the rows themselves
TINY = torch.finfo(torch.float32).tiny
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, peft's name
ROW_MATRICES = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Adapter:
    """pairs: weight name -> lora_A (rank, inputs) and lora_B (outputs, rank). alphas: each pair's alpha.

    rows: matrix name -> ids and their (n, C) new rows. whole: weight name -> what stands in its place. magnitudes: of
    DoRA, of every pair or of none: the length (outputs,) of each row.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    alphas: Mapping[str, float]
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0  # while training
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: len(a) for name, (a, _) in self.pairs.items()}

    @property
    def targets(self) -> tuple[str, ...]:
        """Short names of the matrices, as in TARGETS."""
        return tuple(t for t in TARGETS if any(short_name(name) == t for name in self.pairs))


def short_name(weight: str) -> str:
    """layers.3.attention.wq.weight, or without .weight -> wq."""
    return weight.removesuffix(".weight").rpartition(".")[2]


def target_names(config: ModelConfig, targets: tuple[str, ...]) -> list[str]:
    """The weights that `targets` (of TARGETS) name. Raises ValueError for an unknown one, or a tied head."""
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"lora target {target}: expected all, attention, or some of {', '.join(TARGETS)}")
    if "output" in targets and config.tied:
        raise ValueError("lora target output: the head is tied to the embedding, so it has no matrix of its own")
    return [name for name in weight_shapes(config) if short_name(name) in targets]


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight (outputs, inputs) + scale * B A: summed in fp32 and cast once."""
    return (weight.float() + (b.float() @ a.float()) * scale).to(weight.dtype)


def row_lengths(weight: Tensor) -> Tensor:
    """weight (outputs, inputs) -> the norm of each row, (outputs,) fp32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def set_row_lengths(weight: Tensor, lengths: Tensor) -> Tensor:
    """weight (outputs, inputs), whose rows become as long as `lengths` (outputs,) says: in fp32. Zeros stay zeros."""
    weight = weight.float()
    return weight * (lengths.float() / row_lengths(weight).clamp(min=TINY)).unsqueeze(1)


def merged(weights: Mapping[str, Tensor], adapter: Adapter) -> Weights:
    """The weights with the adapter in them: summed in fp32 and cast once, as each is read."""
    before = as_weights(weights)
    changed = adapter.pairs.keys() | adapter.rows.keys() | adapter.whole.keys()
    return Weights({n: _changed(before.entry(n), n, adapter) if n in changed else before.entry(n) for n in before})


def _changed(entry: Lazy, name: str, adapter: Adapter) -> Lazy:
    whole = adapter.whole.get(name)
    ids, rows = adapter.rows.get(name, ((), None))

    def read(start: int, stop: int) -> Tensor:
        block = entry.read(start, stop) if whole is None else whole[start:stop].to(entry.dtype)
        if name in adapter.pairs:
            a, b = adapter.pairs[name]
            block = block.float() if name in adapter.magnitudes else block
            block = add_low_rank(block, a, b[start:stop], adapter.alphas[name] / len(a))
        if name in adapter.magnitudes:
            block = set_row_lengths(block, adapter.magnitudes[name][start:stop]).to(entry.dtype)
        mine = [i for i, token in enumerate(ids) if start <= token < stop]
        if rows is not None and mine:
            block = block.clone()
            block[[ids[i] - start for i in mine]] = rows[mine].to(entry.dtype)
        return block

    return Lazy(entry.shape, entry.dtype, read)


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_adapter(folder: str | Path, adapter: Adapter, config: ModelConfig, *, base: str) -> None:
    """A folder that `peft.PeftModel.from_pretrained` reads, tensors in fp32. base: the checkpoint it belongs to."""
    with staged(folder) as stage:
        with stage.open(TENSORS) as file:
            write_safetensors(file, {name: lazy(t) for name, t in _stored(adapter, config)})
        stage.text(CONFIG, json.dumps(_peft_config(adapter, config, base), indent=2) + "\n")


def _stored(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, (a, b) in adapter.pairs.items():
        b = to_hf_rows(b, config.head_dim) if is_rotary(name) else b
        yield f"{PREFIX}{_module(name)}.lora_A.weight", a.detach().float().cpu()
        yield f"{PREFIX}{_module(name)}.lora_B.weight", b.detach().float().cpu()
    for name, lengths in adapter.magnitudes.items():
        lengths = to_hf_rows(lengths, config.head_dim) if is_rotary(name) else lengths
        yield f"{PREFIX}{_module(name)}.{MAGNITUDE}", lengths.detach().float().cpu()
    for name, (_, rows) in adapter.rows.items():
        yield f"{PREFIX}{_module(name)}.{ROWS_SUFFIX}", rows.detach().float().cpu()


def _peft_config(adapter: Adapter, config: ModelConfig, base: str) -> dict[str, Any]:
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (adapter.ranks, adapter.alphas))
    everywhere = adapter.pairs.keys() == set(target_names(config, adapter.targets))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_module(name): r for name, r in adapter.ranks.items() if r != rank},
        "alpha_pattern": {_module(name): a for name, a in adapter.alphas.items() if a != alpha},
        "lora_dropout": adapter.dropout,
        "use_dora": bool(adapter.magnitudes),
        "bias": "none",
        "target_modules": sorted({(short_name(_module(n)) if everywhere else _module(n)) for n in adapter.pairs}),
        "trainable_token_indices": {_module(name): list(ids) for name, (ids, _) in adapter.rows.items()} or None,
    }


def _module(weight: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj."""
    return hf_name(weight).removesuffix(".weight")


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in `folder` for a model of this shape. Raises CheckpointError for what does not fit."""
    folder = Path(folder).expanduser()
    said = read_config(_find_config(folder))
    file = _File(folder)
    pairs, rows, whole, magnitudes = {}, {}, {}, {}
    shapes = weight_shapes(config)
    for name, shape in {**shapes, HEAD: shapes[EMBEDDING]}.items():
        module = _module(name)
        if len(shape) == 2 and said.changes(module):
            pairs[name] = _read_pair(file, name, said.rank_of(module), shape, config)
        if name in pairs and said.dora:
            _refuse_columns(folder, name)
            lengths = file.take(f"{module}.{MAGNITUDE}", shape[:1])
            magnitudes[name] = to_meta_rows(lengths, config.head_dim) if is_rotary(name) else lengths
        if ids := said.rows_of(module):
            rows[name] = (ids, file.take(f"{module}.{ROWS_SUFFIX}", (len(ids), config.dim)))
        if stored := file.stored_whole(module, expected=said.is_whole(module)):
            copy = file.take(stored, shape)
            whole[name] = to_meta_rows(copy, config.head_dim) if is_rotary(name) else copy
    alphas = {name: said.alpha_of(_module(name)) for name in pairs}
    adapter = Adapter(pairs, alphas, rows, whole, magnitudes=magnitudes)
    _check_fit(folder, adapter, config)
    file.finish()
    return _with_one_matrix(folder, adapter) if config.tied else adapter


def _find_config(folder: Path) -> Path:
    """Raises CheckpointError that says what the path is instead, and which folder was meant."""
    if (folder / CONFIG).is_file():
        return folder / CONFIG
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if folder.is_file():
        problem = f"is a file: give the folder that holds it and {CONFIG}"
    elif inside:
        problem = f"is no adapter, but {inside[-1]} is: give that folder"
    elif (folder / TENSORS).exists() or (folder / PICKLE).exists():
        problem = f"holds no {CONFIG} beside its tensors: copy that file too"
    elif any(any(folder.glob(kind)) for kind in ("params.json", "*.safetensors", "*.pth", "*.gguf")):
        problem = f"is a whole checkpoint (it holds no {CONFIG}): open it with --ckpt, without --adapter"
    elif folder.exists():
        problem = f"holds no {CONFIG}: expected the folder of an adapter in PEFT's format"
    else:
        problem = (
            "does not exist: expected the folder of an adapter (of one on the hub: hf download ID --local-dir DIR)"
        )
    raise CheckpointError(folder, problem)


class _File:
    """The tensors of an adapter by peft's names without prefixes, taken one by one; what is left over is an error."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / (TENSORS if (folder / TENSORS).exists() else PICKLE)
        # A compiled model's prefix, and names of peft's modules where a state dict was saved by hand.
        noise = rf"_orig_mod\.|(?<={MAGNITUDE})(\.default)?\.weight$|\.default(?=\.|$)"
        self._left = {re.sub(noise, "", k.removeprefix(PREFIX)): t for k, t in self._read()}

    def _read(self) -> ItemsView[str, Tensor]:
        import safetensors.torch

        if not self.path.exists():
            raise CheckpointError(self.path.parent, f"holds neither {TENSORS} nor {PICKLE}: copy the adapter again")
        gate.refuse_strangers(self.path)
        if self.path.name == PICKLE:
            return pth.load(self.path).items()
        try:
            return safetensors.torch.load_file(self.path).items()
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(self.path, f"cannot be read ({gate.reason(error)}): copy the adapter again") from None

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise CheckpointError(self.path, f"{name} is missing: the adapter is incomplete, or of another base")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(self.path, f"{name} is no tensor of floating-point numbers: copy the adapter again")
        if tuple(tensor.shape) != shape:
            what = f"{name} has shape {tuple(tensor.shape)}, {CONFIG} and the base ask for {shape}"
            if re.search(r"(?:embed_tokens|lm_head)\b", name) and tensor.ndim == 2 and tensor.shape[1:] == shape[1:]:
                resize = f"give the base its {len(tensor)} rows first (transformers: resize_token_embeddings, save)"
                raise CheckpointError(self.path, f"{what}: tokens were added before it was trained; {resize}")
            raise CheckpointError(self.path, f"{what}: it belongs to another base")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(self.path, f"{name} holds no finite numbers: train or copy the adapter again")
        return tensor

    def stored_whole(self, module: str, *, expected: bool) -> str | None:
        """The name of a matrix that is stored as it is; peft also stores the base of a changed embedding."""
        names = (f"{module}.weight", f"{module}.base_layer.weight")
        return next((name for name in names if name in self._left), names[0] if expected else None)

    def finish(self) -> None:
        if self._left:
            what = f"tensor {min(self._left)} is nothing that {CONFIG} describes for this base"
            raise CheckpointError(self.path, f"{what}: it belongs to another base")


def _read_pair(file: _File, name: str, rank: int, shape: tuple[int, ...], config: ModelConfig) -> tuple[Tensor, Tensor]:
    module, (outputs, inputs) = _module(name), shape
    if name == EMBEDDING:  # peft's is (C, V), the other way round
        a = file.take(f"{module}.lora_embedding_A", (rank, outputs))
        return file.take(f"{module}.lora_embedding_B", (inputs, rank)).T, a.T
    a = file.take(f"{module}.lora_A.weight", (rank, inputs))
    b = file.take(f"{module}.lora_B.weight", (outputs, rank))
    return a, to_meta_rows(b, config.head_dim) if is_rotary(name) else b


def _refuse_columns(folder: Path, name: str) -> None:
    if name == EMBEDDING:  # its columns have lengths, so no row can be made alone
        raise CheckpointError(folder / CONFIG, "use_dora of embed_tokens is not read: merge it with peft")


def _check_fit(folder: Path, adapter: Adapter, config: ModelConfig) -> None:
    path = folder / CONFIG
    if not adapter.pairs:
        raise CheckpointError(path, "target_modules names no matrix of this model: it belongs to another base")
    if adapter.rows.keys() & (adapter.pairs.keys() | adapter.whole.keys()):
        raise CheckpointError(
            path, "trainable_token_indices in a matrix that is changed otherwise too: merge it with peft"
        )
    if any(token >= config.vocab_size for ids, _ in adapter.rows.values() for token in ids):
        raise CheckpointError(path, f"trainable_token_indices: expected ids below {config.vocab_size}")


def _with_one_matrix(folder: Path, adapter: Adapter) -> Adapter:
    """Of a tied base: head and embedding are one matrix, so neither can be changed alone."""
    embedding, head = (adapter.whole.get(name) for name in ROW_MATRICES)
    same = embedding is head if embedding is None or head is None else torch.equal(embedding, head)
    if not same or HEAD in adapter.rows or adapter.pairs.keys() & set(ROW_MATRICES):
        what = "changes embed_tokens or lm_head alone, but its base ties them to one matrix"
        raise CheckpointError(folder / CONFIG, f"{what}: untie and merge it with peft, then open the result")
    return replace(adapter, whole={name: copy for name, copy in adapter.whole.items() if name != HEAD})
