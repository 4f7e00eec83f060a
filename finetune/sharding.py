"""The model over a mesh, from outside: FSDP2 shards each block's weights, gradients and states, and gathers a block
when it is at work.

The numbers are those of one process. Weights are gathered as they are, and what computes in bf16 casts them as it does
alone; gradients are reduced in fp32 and summed, since each rank has divided its loss by the number of labels of all.

    shard_(model, config, world)
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from finetune.config import TrainConfig
from finetune.errors import UserError
from finetune.mesh import MeshSizes
from finetune.parallelize import World
from nanollama.model import Transformer


def refuse_unshardable(config: TrainConfig, sizes: MeshSizes) -> None:
    """What does not work over shards, by name. Raises UserError."""
    if not sizes.is_sharded:
        return
    alone = {
        "--method qlora": (config.method == "qlora", "its 4-bit base is no tensor that is sharded: use --method lora"),
        "--optimizer adamw8bit": (
            config.optimizer == "adamw8bit",
            "256 bytes share a scale, whichever rank they are on: use --optimizer adamw",
        ),
    }
    for flag, (given, why) in alone.items():
        if given:
            raise UserError(f"{flag} with {sizes}: {why}, or --dp alone")


def shard_(model: Transformer, config: TrainConfig, world: World) -> None:
    """Spread `model` over the mesh of `world`; nothing for a run without one."""
    if world.mesh is None:
        return
    if world.data_size > 1:
        fully_shard_(model, world.mesh["dp", "fsdp"] if world.sizes.dp > 1 else world.mesh["fsdp"])


def fully_shard_(model: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2, a unit for each block; what is around the blocks is gathered for the whole step, since the loss reads it.

    mesh: of one dimension, the shards; of two, copies and shards.
    """
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
