"""The model over a mesh, from outside: FSDP2 shards each block's weights, gradients and states, and gathers a block
when it is at work; tensor parallelism cuts the layers themselves (nanollama/tensor_parallel.py).

The numbers are those of one process. Weights are gathered as they are, and what computes in bf16 casts them as it does
alone; gradients are reduced in fp32 and summed, since each rank has divided its loss by the number of labels of all.

    cut_layers_(model, world)
    shard_blocks_(model, world)
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from finetune.config import TrainConfig
from finetune.errors import UserError
from finetune.lora import LoraLinear, TokenRows
from finetune.mesh import MeshSizes
from finetune.parallelize import World
from nanollama.model import Transformer
from nanollama.tensor_parallel import decoding, plan, refuse_uncuttable

DORA = "its lengths of rows need whole matrices: use LoRA"


def refuse_unshardable(entry: str, config: TrainConfig, sizes: MeshSizes) -> None:
    """What does not work over shards, by name. Raises UserError."""
    if not sizes.is_sharded:
        return
    alone = {
        "finetune.preference": (
            entry == "preference",
            "its reference and its losses need whole models: leave them out",
        ),
        "--method qlora": (config.method == "qlora", "its 4-bit base is no tensor that is sharded: use --method lora"),
        "--dora": (config.dora, DORA),
        "--optimizer adamw8bit": (
            config.optimizer == "adamw8bit",
            "256 bytes share a scale, whichever rank they are on: use --optimizer adamw",
        ),
        "--teacher": (config.teacher is not None, "every process holds a whole teacher and student"),
        "--optimizer muon": (config.optimizer == "muon", "it needs whole matrices: use --optimizer adamw"),
        "--ema": (config.ema > 0, "the average is kept of whole weights"),
        "--compile": (config.compile and sizes.tp > 1, "its parts of layers are not compiled: leave it out"),
        "--optimizer_in_backward": (
            config.optimizer_in_backward,
            "gradients are not reduced yet when it updates: leave it out",
        ),
    }
    for flag, (given, why) in alone.items():
        if given:
            raise UserError(f"{flag} with {sizes}: {why}, or --dp alone")


def cut_layers_(model: Transformer, world: World) -> None:
    """Tensor parallelism, adapters included, where the mesh has a dimension for it. What is put on the outputs
    of layers comes after it.

    Raises UserError for what cannot be cut.
    """
    if world.mesh is None:
        return
    if any(isinstance(module, LoraLinear) and module.lora_magnitude is not None for module in model.modules()):
        raise UserError(f"--adapter of DoRA with {world.sizes}: {DORA}, or --dp alone")
    if world.sizes.tp == 1:
        return
    mesh = world.mesh["tp"]
    if any(isinstance(module, TokenRows) for module in model.modules()):
        raise UserError(
            "--tp with chat rows in an adapter: their table is not cut: add --chat_rows keep, or use --fsdp"
        )
    try:
        refuse_uncuttable(model.config, mesh.size())
    except ValueError as error:
        raise UserError(str(error)) from None
    styles = plan(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            styles[name] = LoraParallel(by_rows=isinstance(styles[name], RowwiseParallel), is_head=name == "output")
    parallelize_module(model, mesh, styles, src_data_rank=None)  # every rank has the whole and cuts its own part


class LoraParallel(ParallelStyle):
    """A LoraLinear is cut as its base is: by columns B's rows are, by rows A's columns are."""

    def __init__(self, *, by_rows: bool, is_head: bool) -> None:
        super().__init__()
        self.by_rows, self.is_head = by_rows, is_head

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, LoraLinear)
        base = RowwiseParallel if self.by_rows else partial(ColwiseParallel, output_layouts=Shard(-1))
        style: ParallelStyle = base(use_local_output=False)
        style.src_data_rank = None
        style._apply(module.base, mesh)
        _distribute_(module, "lora_A", mesh, Shard(1) if self.by_rows else Replicate())
        _distribute_(module, "lora_B", mesh, Replicate() if self.by_rows else Shard(0))
        taken: Placement = Shard(-1) if self.by_rows else Replicate()

        def take(_: nn.Module, inputs: tuple[Any, ...]) -> DTensor:
            x = inputs[0]
            return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [taken], run_check=False)

        module.register_forward_pre_hook(take)
        module.register_forward_hook(lambda _, inputs, output: output.to_local())
        return module


def _distribute_(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = getattr(module, name)
    spread = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


@torch.no_grad()
def sum_partial_(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients that each part of a layer has a summand of are summed; FSDP2 does so by itself."""
    for parameter in parameters:
        grad: Tensor | None = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def shard_blocks_(model: Transformer, world: World) -> None:
    """FSDP2, where the mesh has ranks for it, a unit for each block; what is around the blocks is gathered for the
    whole step, since the loss reads it. Comes last, when all parameters are there.
    """
    if world.mesh is None or world.data_size == 1:
        return
    mesh = world.mesh["dp", "fsdp"] if world.sizes.dp > 1 else world.mesh["fsdp"]  # copies of shards, or shards alone
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")  # which training and decoding call, and not the model's forward
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def rest_(model: Transformer) -> None:
    """Free what was gathered for a forward pass that no backward pass followed: every parameter is its shard again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def answering(model: Transformer, world: World) -> AbstractContextManager[None]:
    """In here the model generates, all ranks together."""
    return decoding(model, world.mesh["tp"]) if world.mesh and world.sizes.tp > 1 else nullcontext()
