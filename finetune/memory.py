"""How much memory a run will need, said before it begins: what is there already, gradients, optimizer states,
activations, loss.

What a block keeps for its backward pass is not estimated but counted, on one row and on two: the rest is linear.

    memory plan: 1,024 MB = 460 now + 60 gradients + 120 optimizer states + 330 activations + 54 loss
"""

import os
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from finetune.build import mixed_precision
from finetune.config import DTYPES, TrainConfig
from finetune.loss import chunk_tokens
from finetune.muon import is_orthogonalised
from finetune.optim import block_numbers, moments_bytes, trained
from nanollama.model import Transformer

ROUNDING_BLOCKS = 6  # of fp32 numbers that an update in pieces holds
BACKWARD_BUFFERS = 4  # of a feed-forward's width, while a block's backward pass runs
AT_WORK_BYTES = 32_000_000  # what libraries take when they begin to work: seen on CPU with the smallest models


@dataclass(frozen=True)
class Plan:
    """Bytes. now: libraries, weights and data, as they are before the first step, and a little when they begin."""

    now: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def text(self) -> str:
        names = {"optimizer": "optimizer states"}
        parts = [f"{value / 1e6:,.0f} {names.get(name, name)}" for name, value in asdict(self).items()]
        return f"memory plan: {self.total / 1e6:,.0f} MB = {' + '.join(parts)}"


def plan_memory(model: Transformer, config: TrainConfig, device: torch.device) -> Plan:
    """`model` with everything around it that the run puts there; nothing is changed."""
    parameters = list(trained(model).values())
    sizes = [p.numel() * p.element_size() for p in parameters]
    eight_bit = config.optimizer == "adamw8bit"
    rounding = ROUNDING_BLOCKS * 4 * min(block_numbers(device), max(p.numel() for p in parameters))
    return Plan(
        now=resident_bytes(device) + AT_WORK_BYTES,
        gradients=(max(sizes) if config.optimizer_in_backward else sum(sizes)) + _second_gradient(model),
        optimizer=moments_bytes(parameters, eight_bit)
        + _of_other_states(model, config)
        + (rounding if eight_bit or config.weights == "bf16" else 0),
        activations=_activations(model, config, device),
        loss=_loss(model, config),
    )


def _of_other_states(model: Transformer, config: TrainConfig) -> int:
    """Muon keeps one moment where AdamW keeps two; an average is fp32, and a copy of the weights while it is scored."""
    named = trained(model)
    muon = [p.nbytes for n, p in named.items() if config.optimizer == "muon" and is_orthogonalised(n, p)]
    average = sum(4 * p.numel() + p.nbytes for p in named.values()) if config.ema else 0
    return average - sum(muon)


def _second_gradient(model: Transformer) -> int:
    """A tied matrix gets its gradient as the head, then one as the embedding, before they are summed."""
    table = model.tok_embeddings.weight
    return table.nbytes if model.output is None and table.requires_grad else 0


def _activations(model: Transformer, config: TrainConfig, device: torch.device) -> int:
    fixed, row = _block_bytes(model, config, device)
    rows, layers = config.batch_size, len(model.layers)
    width = torch.finfo(DTYPES[config.dtype]).bits // 8
    stream = rows * config.seq_len * model.config.dim * model.tok_embeddings.weight.element_size()
    at_once = 1 if config.activation_checkpointing else layers
    offloaded = config.offload_activations and device.type != "cpu"
    inputs = layers * stream if config.activation_checkpointing and not offloaded else 0
    buffers = BACKWARD_BUFFERS * rows * config.seq_len * model.config.hidden_dim * width
    return at_once * (fixed + rows * row) + inputs + buffers


def _block_bytes(model: Transformer, config: TrainConfig, device: torch.device) -> tuple[int, int]:
    """(bytes that a block keeps whatever the batch, bytes a row)."""
    one, two = (_saved(model, config, device, rows) for rows in (1, 2))
    return max(0, 2 * one - two), two - one


def _saved(model: Transformer, config: TrainConfig, device: torch.device, rows: int) -> int:
    """Bytes that the first block's forward pass keeps beside its parameters."""
    tokens = torch.zeros(rows, config.seq_len, dtype=torch.int64, device=device)
    doc_ids = torch.zeros_like(tokens) if config.doc_mask == "on" else None
    positions = torch.arange(config.seq_len, device=device).expand_as(tokens)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor  # a 4-bit base: a weight that has no storage of its own
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.zeros(rows, config.seq_len, model.config.dim, dtype=model.tok_embeddings.weight.dtype, device=device)
    block: nn.Module = model.layers[0]
    # A checkpointed block is counted as it is when it runs again: by its class's own forward.
    forward = type(block).forward if config.activation_checkpointing else nn.Module.__call__
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed_precision(config, device):
        out = forward(block, hidden.requires_grad_(), model.context(tokens, positions, doc_ids))
    del out
    return sum(kept.values())


def _loss(model: Transformer, config: TrainConfig) -> int:
    """A chunk of logits, on a GPU beside its copy in fp32, and the head in the computation's dtype."""
    vocab, dim = model.config.vocab_size, model.config.dim
    compute, head = DTYPES[config.dtype], model.head()
    tokens = min(config.batch_size * config.seq_len, chunk_tokens(head))
    copied = compute != torch.float32 and head.device.type != "cpu"
    copy = vocab * dim * compute.itemsize if head.dtype != compute else 0
    return tokens * vocab * (compute.itemsize + 4 * copied) + copy + _head_sums(model, config)


def _head_sums(model: Transformer, config: TrainConfig) -> int:
    """The fp32 sum of a bf16 head's gradient, beside the product of one chunk; other gradients come when it is gone."""
    head, sizes = model.head(), [p.nbytes for p in trained(model).values()]
    if not head.requires_grad or head.dtype != torch.bfloat16:
        return 0
    later = sum(sizes) if config.accumulate == 1 and not config.optimizer_in_backward else 0
    return max(0, head.numel() * (4 + DTYPES[config.dtype].itemsize) - later)


def resident_bytes(device: torch.device) -> int:
    """Memory in use: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
