"""The model of a run: fresh weights or a checkpoint's, what is put on them (mean rows for chat tokens, a 4-bit base,
adapters), and what wraps it from outside (dropout, activation checkpointing and its offload, compiling).

The order matters: rows are filled before they are copied into a table of their own, and layers become 4-bit before
adapters go around them. All of it follows from the config and the checkpoint, so a resumed run builds the same.

    python -m finetune.tinystories --init 15M          python -m finetune.text --data notes.txt --ckpt Llama-3.2-1B
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from finetune.config import DTYPES, LORA_METHODS, TrainConfig, init_shape, lora_targets
from finetune.errors import UserError
from finetune.lora import add_lora_, add_rows_, quantize_base_, wear_
from finetune.loss import LossModel
from finetune.loss_shards import sharded_cross_entropy
from finetune.optim import select_trained_
from finetune.parallelize import World, replicate
from finetune.sharding import cut_layers_, shard_blocks_
from nanollama.checkpoint import Checkpoint, open_checkpoint
from nanollama.checkpoint.adapter import LINEARS, Adapter, read_adapter, target_names
from nanollama.checkpoint.weights import Weights, as_weights
from nanollama.model import Context, ModelConfig, Transformer
from nanollama.tokenizer import Tokenizer

LLAMA2C_STD = 0.02


def init_std(dim: int) -> float:
    """llama2.c's 0.02; more for small models, which it leaves near zero (260K: see docs/finetune.md)."""
    return LLAMA2C_STD if dim >= 256 else 0.8 / math.sqrt(dim)


@dataclass(frozen=True)
class Start:
    checkpoint: Checkpoint | None = None  # None: from scratch

    @property
    def tokenizer(self) -> Path | None:
        return self.checkpoint.tokenizer if self.checkpoint else None

    @property
    def rows(self) -> int:
        """Of the checkpoint's embedding; 0 where there is none."""
        return self.checkpoint.config.vocab_size if self.checkpoint else 0


def open_start(config: TrainConfig) -> Start:
    """Opens what `--ckpt` names; reads no weights yet."""
    return Start(open_checkpoint(config.ckpt) if config.ckpt else None)


def build_model(start: Start, config: TrainConfig, vocab_size: int, device: torch.device) -> Transformer:
    """The model on the device, weights as `--weights` says, in memory of its own. vocab_size: of one from scratch.

    On the meta device a checkpoint's model is empty, and nothing is read. Raises UserError for rows that are longer
    than the checkpoint's context.
    """
    dtype = DTYPES[config.weights]
    if start.checkpoint is None:
        shape = init_shape(config, vocab_size)
        fresh = as_weights(fresh_weights(shape, torch.Generator().manual_seed(config.seed)))
        return Transformer.from_weights(shape, Copies(fresh, device, dtype), dtype=dtype, device=device)
    shape, stored = start.checkpoint.config, start.checkpoint.weights
    if config.seq_len > shape.max_seq_len:
        raise UserError(f"--seq_len {config.seq_len}: {config.ckpt} was made for at most {shape.max_seq_len} tokens")
    if device.type == "meta":
        with device:
            return Transformer(shape)
    later = frozenset(target_names(shape, LINEARS) if config.method == "qlora" else ())
    model = Transformer.from_weights(shape, Copies(stored, device, dtype, later), dtype=dtype, device=device)
    if later:
        quantize_base_(model, Copies(stored, device, dtype))
    return model


@dataclass(frozen=True)
class Copies(Mapping[str, Tensor]):
    """Weights in memory of their own, each copied when it is asked for: one at a time is there twice.

    later: names of those that are one number, seen in their shape, since something smaller takes their place.
    """

    stored: Weights
    device: torch.device
    dtype: torch.dtype
    later: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor:
        if name in self.later:
            return torch.zeros(1, dtype=self.dtype, device=self.device).expand(self.stored.shapes[name])
        # copy=True: an optimizer must never write into a memory-mapped file.
        return self.stored[name].to(self.device, self.dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def fresh_weights(shape: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """llama2.c's initialization (`Transformer._init_weights`): normal, narrower for wo and w3, norms 1."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(shape).state_dict().items()}
    weights = {}
    for name, size in shapes.items():
        is_residual = name.endswith(("wo.weight", "w3.weight"))
        std = init_std(shape.dim) / (math.sqrt(2 * shape.n_layers) if is_residual else 1)
        norm = len(size) == 1
        weights[name] = torch.ones(size) if norm else torch.empty(size).normal_(0, std, generator=generator)
    return weights


# --- Adapters and chat rows ------------------------------------------------------------------------------------------


# Of Llama 3's format; where the checkpoint has a template of its own, the special tokens that it names.
CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
UNTRAINED_NORM = 0.1  # of the median row's: shorter rows were never pulled away from zero


def adapt_(model: Transformer, config: TrainConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Everything that the config says of adapters and chat rows. Raises UserError."""
    adapter = read_adapter(config.adapter, model.config) if config.adapter else None
    ids = chat_rows(model, tokenizer, config.chat_rows)
    if ids:
        if config.method in ("norms", "no_embeddings"):
            raise UserError(
                f"--method {config.method} does not train the chat words, and their rows are untrained: choose "
                "--method full or lora, or --chat_rows keep"
            )
        reset_rows_(model, ids, ordinary_tokens(tokenizer, model))
        names = ", ".join(name for name, i in sorted(tokenizer.special_ids.items()) if i in ids)
        say(f"chat: the rows of {names} start from the mean of the trained ones, and are trained")
    if config.method in LORA_METHODS:
        _add_adapter_(model, config, adapter, ids)


def _add_adapter_(model: Transformer, config: TrainConfig, adapter: Adapter | None, ids: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    if adapter:
        _refuse_other_shape(config, adapter)
        wear_(model, adapter, config.lora_dropout, generator)
    else:
        rank, targets = config.lora_rank, lora_targets(config)
        # rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(rank): plain LoRA with an alpha of sqrt(rank) as much.
        alpha = config.lora_alpha * (math.sqrt(rank) if config.lora_scale == "sqrt" else 1.0)
        add_lora_(model, rank, alpha, targets, config.lora_dropout, generator, dora=config.dora)
    if ids and not (adapter and adapter.rows):
        add_rows_(model, ids)


def _refuse_other_shape(config: TrainConfig, adapter: Adapter) -> None:
    """A flag that has its default value counts as not given; one that was given must be the adapter's."""
    saved: dict[str, set[Any]] = {
        "rank": set(adapter.ranks.values()),
        "alpha": set(adapter.alphas.values()),
        "targets": set(adapter.targets),
    }
    given, usual = _shape(config), _shape(TrainConfig())
    for name, theirs in saved.items():
        if given[name] not in (usual[name], theirs):
            shown = ",".join(map(str, sorted(theirs)))
            raise UserError(f"--adapter {config.adapter} has {name} {shown}: drop --lora_{name}, which says otherwise")
    if config.dora and not adapter.magnitudes:
        raise UserError(f"--adapter {config.adapter} is no DoRA: drop --dora, which says otherwise")


def _shape(config: TrainConfig) -> dict[str, set[Any]]:
    return {"rank": {config.lora_rank}, "alpha": {config.lora_alpha}, "targets": set(lora_targets(config))}


def chat_rows(model: Transformer, tokenizer: Tokenizer, choice: str) -> tuple[int, ...]:
    """Ids of the chat tokens whose rows are to be filled anew: none (keep), all (reinit), the untrained ones (auto).

    Untrained is a row of the embedding or head that is much shorter than the others, or equal to another chat word's.
    """
    named, template = tokenizer.special_ids.items(), tokenizer.chat_template or ""
    tokens = [i for name, i in named if name in CHAT_TOKENS or (name in template and i != tokenizer.bos_id)]
    tokens = [i for i in tokens if i < model.config.vocab_size]
    if choice == "keep" or not tokens:
        return ()
    if choice == "reinit":
        return tuple(sorted(tokens))
    found = set()
    ordinary = ordinary_tokens(tokenizer, model)
    for matrix in _matrices(model):
        sample = matrix[ordinary[::16]].float()
        least = UNTRAINED_NORM * sample.norm(dim=1).median()
        rows = {i: matrix[i].float() for i in tokens}
        for i, row in rows.items():
            if row.norm() < least or any(torch.equal(row, other) for j, other in rows.items() if j != i):
                found.add(i)
    return tuple(sorted(found))


def ordinary_tokens(tokenizer: Tokenizer, model: Transformer) -> list[int]:
    """Ids of the tokens that are no specials, and have rows."""
    special = set(tokenizer.special_ids.values())
    return [i for i in range(min(tokenizer.vocab_size, model.config.vocab_size)) if i not in special]


@torch.no_grad()
def reset_rows_(model: Transformer, ids: tuple[int, ...], ordinary: list[int]) -> None:
    """Rows `ids` of embedding and head become the mean of the ordinary tokens' rows."""
    for matrix in _matrices(model):
        matrix[list(ids)] = matrix[ordinary].mean(dim=0)


def _matrices(model: Transformer) -> list[torch.Tensor]:
    head = [] if model.output is None else [model.output.weight]
    return [model.tok_embeddings.weight, *head]


# --- Wraps: the model knows of none ----------------------------------------------------------------------------------


def wrap_(
    model: Transformer,
    config: TrainConfig,
    world: World,
    loss_model: Callable[[Transformer], nn.Module] = LossModel,
) -> nn.Module:
    """Everything that `config` puts around the model, in the order in which it has to be; loss_model: the last."""
    select_trained_(model, config.method)
    cut_layers_(model, world)
    if config.dropout:
        add_dropout_(model, config.dropout)
    if config.activation_checkpointing:
        checkpoint_blocks_(model, offload=config.offload_activations and world.device.type != "cpu")
    if config.compile:
        compile_blocks_(model)
    shard_blocks_(model, world)
    return replicate(_over_vocabulary(loss_model(model), world).train(), world)


def _over_vocabulary(loss_model: nn.Module, world: World) -> nn.Module:
    """The same loss of a head whose rows are shared out. Raises UserError for one that needs them all."""
    if world.sizes.tp > 1:
        if not isinstance(loss_model, LossModel):
            raise UserError("--tp cuts the head by its rows, and this loss needs them all: use --fsdp")
        loss_model.loss = sharded_cross_entropy
    return loss_model


def mixed_precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Matrix products in the dtype that `--dtype` names.

    Casts of weights are not kept: each is used once a pass, and autocast would hold all of them until the pass ends,
    16 GB of an 8B whose blocks are checkpointed.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16", cache_enabled=False)


def add_dropout_(model: Transformer, p: float) -> None:
    """Zero a share `p` of the embedding and of what each attention and feed-forward adds, in training mode only."""

    def drop(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return F.dropout(output, p, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("tok_embeddings", "attention.wo", "feed_forward.w2")):
            module.register_forward_hook(drop)


def checkpoint_blocks_(model: Transformer, *, offload: bool = False) -> None:
    """Keep only each block's input, offload: in the CPU's memory, and run the block again in the backward pass."""
    for block in model.layers:
        kept = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = partial(_offloaded, kept) if offload else kept


def _offloaded(block: Callable[[Tensor, Context], Tensor], x: Tensor, ctx: Context) -> Tensor:
    with save_on_cpu(pin_memory=x.device.type == "cuda"):
        return block(x, ctx)


def compile_blocks_(model: Transformer) -> None:
    """Compile the block once for all layers, which are alike: minutes less to wait for than for the whole model."""
    for block in model.layers:
        block.compile()
