"""Tensor parallelism from outside: a plan for PyTorch's own `parallelize_module`, so that each rank of a mesh holds a
part of every layer. model.py knows nothing of it: it infers the number of heads from what it is given.

Attention and feed-forward are cut by columns going in and by rows coming out, with one sum over the ranks behind each;
the embedding and the head are cut by rows of the vocabulary. What lies between layers is whole on every rank.

    with torch.device("meta"):
        model = Transformer(config)
    parallelize_module(model, mesh, plan(model))     # mesh of one dimension
    fill_(model, weights, torch.bfloat16, "cpu")     # each rank reads its own rows and columns
    with decoding(model, mesh):
        ...                                          # caches hold this rank's heads, logits are whole on every rank
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
)

from nanollama.checkpoint.weights import Weights
from nanollama.model import ModelConfig, Transformer

COLUMNS = {"attention": ("wq", "wk", "wv"), "feed_forward": ("w1", "w3")}  # outputs are cut: heads, hidden units
BLOCK_BYTES = 1 << 26  # of a file that are read at a time
ROWS = {"attention": ("wo",), "feed_forward": ("w2",)}  # inputs are cut; outputs are summed


def refuse_uncuttable(config: ModelConfig, parts: int) -> None:
    """Raises ValueError for a model whose layers cannot be cut into so many equal parts."""
    for name in ("n_heads", "n_kv_heads", "hidden_dim"):
        if getattr(config, name) % parts:
            raise ValueError(
                f"--tp {parts}: {name} is {getattr(config, name)}, which {parts} ranks cannot share evenly: choose a "
                "--tp that divides n_heads, n_kv_heads and hidden_dim"
            )
    if -(-config.vocab_size // parts) * (parts - 1) >= config.vocab_size:
        raise ValueError(f"--tp {parts}: a vocabulary of {config.vocab_size} leaves the last rank without a row")


class Replicated(ParallelStyle):
    """A module whose parameters and input every rank has whole, such as a norm. Its parameters become DTensors too,
    so that an optimizer and a norm of gradients meet one kind of tensor.

    copies: the output is no view, which FSDP2 cannot watch where a module that it wraps returns it.
    """

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def take(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

        def give(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local().clone() if self.copies else output.to_local()

        return distribute_module(module, mesh, None, take, give)


def plan(model: Transformer) -> dict[str, ParallelStyle]:
    """What becomes of each module, by its name."""
    whole = Replicate()
    styles: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=whole),
        "norm": Replicated(copies=True),
    }
    if model.output is not None:
        styles["output"] = ColwiseParallel(output_layouts=Shard(-1))  # never called: others multiply its weight
    for name in (f"layers.{i}" for i in range(len(model.layers))):
        styles |= {f"{name}.attention_norm": Replicated(), f"{name}.ffn_norm": Replicated()}
        # Said once for wq, wk and wv, so that their gradients are summed over the ranks once, and not each.
        styles[f"{name}.attention"] = PrepareModuleInput(
            input_layouts=(whole, None), desired_input_layouts=(whole, None)
        )
        styles[f"{name}.feed_forward"] = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,))
        for part, linears in COLUMNS.items():
            styles |= {f"{name}.{part}.{linear}": ColwiseParallel() for linear in linears}
        for part, linears in ROWS.items():
            styles |= {f"{name}.{part}.{linear}": RowwiseParallel() for linear in linears}
    return styles


# --- Loading ---------------------------------------------------------------------------------------------------------


def part_of(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole: one slice a dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """`part`, this rank's part of something with the shape and layout of `tensor`."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def fill_(model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give every parameter that is on the meta device its numbers: this rank's part of the weight with its name.

    Nothing else is read, and no more than a block of it is in memory beside the parameters.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            stored = name.replace(".base.", ".")  # an adapter's layer keeps its matrix there
            state[name] = like(_read(weights, stored, part_of(tensor), dtype, device), tensor)
    model.load_state_dict(state, strict=False, assign=True)


def _read(
    weights: Weights, name: str, part: tuple[slice, ...], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    rows, columns = part[0], (slice(None), *part[1:])
    out = torch.empty([s.stop - s.start for s in part], dtype=dtype, device=device)
    entry = weights.entry(name)
    step = max(1, BLOCK_BYTES // max(1, entry.nbytes // max(1, entry.shape[0])))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        out[start - rows.start : stop - rows.start] = weights.rows(name, start, stop)[columns]
    return out


# --- Decoding --------------------------------------------------------------------------------------------------------


def decode_by_parts_(model: Transformer, mesh: DeviceMesh) -> None:
    """From now on the model's config counts this rank's heads, which are what a cache holds; its logits are whole."""
    config, parts = model.config, mesh.size()

    def logits(hidden: Tensor) -> Tensor:
        whole = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        shared = F.linear(whole, model.head())  # (..., V), of which this rank has some columns
        assert isinstance(shared, DTensor)
        return shared.full_tensor().float()

    model.config = replace(
        config, n_heads=config.n_heads // parts, n_kv_heads=config.n_kv_heads // parts, head_dim=config.head_dim
    )
    model.logits = logits  # type: ignore[method-assign]


@contextmanager
def decoding(model: Transformer, mesh: DeviceMesh) -> Iterator[None]:
    """`decode_by_parts_` for a while."""
    config = model.config
    decode_by_parts_(model, mesh)
    try:
        yield
    finally:
        model.config = config
        del model.logits
