"""Edits of training over ranks, by name: mistakes, and what changes nothing but the order of sums.

Each is given what a rank knows of the others, and puts its change on the stack that undoes it.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel
from torch.nn.parallel import DistributedDataParallel

from finetune import build, parallelize, resume, sharding, train
from finetune.data.packing import Cursor
from finetune.gather import local
from finetune.loss_shards import VocabularyShard
from finetune.parallelize import World


@dataclass(frozen=True)
class Together:
    """A rank among the others, and what undoes an edit."""

    rank: int
    size: int
    stack: ExitStack

    def put(self, place: Any, name: str, new: Any) -> None:
        self.stack.enter_context(patch.object(place, name, new))


def averaged_copies(ranks: Together) -> None:
    """DistributedDataParallel's own reduction, which divides by the number of ranks."""

    def average(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0] / ranks.size)

    ranks.put(parallelize, "_sum_gradients", average)


def averaged_shards(ranks: Together) -> None:
    true = FSDPModule.set_gradient_divide_factor
    ranks.put(FSDPModule, "set_gradient_divide_factor", lambda module, factor: true(module, float(ranks.size)))


def kept_gradients(ranks: Together) -> None:
    """Each rank updates by its own rows."""

    def keep(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ranks.put(parallelize, "_sum_gradients", keep)


def first_micro_batch_synced(ranks: Together) -> None:
    """Gradients are summed behind the first micro-batch, and those of the last stay on their rank."""
    true = train.no_sync
    ranks.put(train, "no_sync", lambda module, is_last: true(module, not is_last))


def norms_not_reduced(ranks: Together) -> None:
    true = DistributedDataParallel.__init__

    def make(copy: DistributedDataParallel, module: nn.Module, **settings: Any) -> None:
        norms = [name for name, p in module.named_parameters() if p.ndim == 1]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, norms)
        true(copy, module, **settings)

    ranks.put(DistributedDataParallel, "__init__", make)


def reduced_in_bf16(ranks: Together) -> None:
    ranks.put(sharding, "MixedPrecisionPolicy", lambda **given: MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))


def clipped_by_own_norm(ranks: Together) -> None:
    """Each rank takes the norm of its own shards for that of all."""

    def clip(loop: train.Loop) -> float:
        grads = [local(p.grad) for p in loop.parameters if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads))
        for grad in grads:
            grad.mul_(min(1.0, loop.config.grad_clip / (norm + 1e-6)))
        return norm

    ranks.put(train.Loop, "_clip_", clip)


def same_documents(ranks: Together) -> None:
    ranks.put(World, "data_rank", property(lambda world: 0))


def labels_counted_per_rank(ranks: Together) -> None:
    true = World.sum
    ranks.put(World, "sum", lambda world, values: torch.tensor(values) if _is_list(values) else true(world, values))


def loss_of_one_rank(ranks: Together) -> None:
    """Gradients are right, and what is shown is this rank's share."""
    true = World.sum
    ranks.put(World, "sum", lambda world, values: true(world, values) if _is_list(values) else values)


def _is_list(values: Any) -> bool:
    return isinstance(values, list)


def cursor_of_one_rank(ranks: Together) -> None:
    """The data order goes on by the rows of one rank, so that steps overlap."""
    true = train.Loop._take

    def take(loop: train.Loop, cursor: Cursor) -> train.StepData:
        data = true(loop, cursor)
        _, behind = loop.packer.take(cursor, len(data.rows) // loop.world.data_size)
        return replace(data, behind=behind)

    ranks.put(train.Loop, "_take", take)


def other_weights_on_each_rank(ranks: Together) -> None:
    """Every rank draws the weights for itself, and keeps its shard of them."""
    true = build.shard_blocks_

    def shard(model: Any, world: World) -> None:
        generator = torch.Generator().manual_seed(ranks.rank)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        true(model, world)

    ranks.put(build, "shard_blocks_", shard)


def stale_gather(ranks: Together) -> None:
    """A forward pass sees the weights from before the last update."""
    true, before = train.accumulate_, dict[int, list[Tensor]]()

    def accumulate(loss_model: nn.Module, *rest: Any) -> Tensor:
        sharding.rest_(getattr(loss_model, "model"))  # noqa: B009
        parts = [local(p.data) for p in loss_model.parameters()]
        now = [part.clone() for part in parts]
        for part, old in zip(parts, before.get(0, now), strict=True):
            part.copy_(old)
        before[0] = now
        nats = true(loss_model, *rest)
        sharding.rest_(getattr(loss_model, "model"))  # noqa: B009
        for part, new in zip(parts, now, strict=True):
            part.copy_(new)
        return nats

    ranks.put(train, "accumulate_", accumulate)


def exchanged_states(ranks: Together) -> None:
    """The shards of the optimizer's states come back to the wrong ranks."""
    true = resume.read_shards

    def read(folder: Any, parameters: Any) -> Any:
        weights, states = true(folder, parameters)
        for name, state in states.items():
            all_parts = [torch.empty_like(state) for _ in range(ranks.size)]
            if len(state) and len(state) * ranks.size == len(parameters[name.partition(":")[0]]):
                dist.all_gather(all_parts, state.contiguous())
                state.copy_(all_parts[(ranks.rank + 1) % ranks.size])
        return weights, states

    ranks.put(resume, "read_shards", read)


def transposed_states(ranks: Together) -> None:
    """Square states come back transposed, shard by shard put together by columns."""
    true = resume.read_shards

    def read(folder: Any, parameters: Any) -> Any:
        weights, states = true(folder, parameters)
        for name, state in states.items():
            parameter = parameters[name.partition(":")[0]]
            if state.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
                parts = [torch.empty_like(state) for _ in range(ranks.size)]
                dist.all_gather(parts, state.contiguous())
                state.copy_(torch.cat(parts).T[ranks.rank * len(state) : (ranks.rank + 1) * len(state)])
        return weights, states

    ranks.put(resume, "read_shards", read)


def forgotten_step_count(ranks: Together) -> None:
    """AdamW's bias correction begins anew after a resume."""
    true = resume._restore_optimizer_

    def restore(optimizer: Any, parameters: Any, tensors: Any, scalars: dict[str, float]) -> None:
        true(optimizer, parameters, tensors, dict.fromkeys(scalars, 0.0))

    ranks.put(resume, "_restore_optimizer_", restore)


# --- Parts of layers -------------------------------------------------------------------------------------------------


class Unsummed(RowwiseParallel):
    """Each rank goes on with its own summand."""

    @staticmethod
    def _prepare_output_fn(layouts: Any, local_output: bool, module: nn.Module, outputs: Any, mesh: Any) -> Tensor:
        return outputs.to_local()


def _unsummed(ending: str) -> Callable[[Together], None]:
    """No sum over the ranks behind the linears with this name."""

    def edit(ranks: Together) -> None:
        true = sharding.plan

        def plan(model: Any) -> dict[str, ParallelStyle]:
            return {name: Unsummed() if name.endswith(ending) else style for name, style in true(model).items()}

        ranks.put(sharding, "plan", plan)

    return edit


def embedding_offset(ranks: Together) -> None:
    """Where the second rank's rows of the vocabulary begin is off by one, for what goes in."""
    true = sharding.parallelize_module

    def cut(model: Any, *rest: Any, **given: Any) -> Any:
        done = true(model, *rest, **given)
        start = -(-model.tok_embeddings.weight.shape[0] // ranks.size)
        shift = lambda _, inputs: torch.where(inputs[0] >= start, inputs[0] - 1, inputs[0])
        model.tok_embeddings.register_forward_pre_hook(shift, prepend=True)
        return done

    ranks.put(sharding, "parallelize_module", cut)


def loss_offset(ranks: Together) -> None:
    """Where the second rank's rows of the vocabulary begin is off by one, for the labels."""

    def own(shard: VocabularyShard, labels: Tensor) -> tuple[Tensor, Tensor]:
        ids = labels - shard.start + bool(shard.start)
        here = (ids >= 0) & (ids < shard.rows)
        return here, ids[here]

    ranks.put(VocabularyShard, "own", own)


def softmax_of_own_rows(ranks: Together) -> None:
    """The softmax's denominator counts a rank's own rows of the vocabulary alone."""

    def join(shard: VocabularyShard, largest: Tensor, sums: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        dist.all_reduce(picked, group=shard.group)
        return sums, sums.log() + largest - picked

    ranks.put(VocabularyShard, "join", join)


def hidden_gradients_of_own_rows(ranks: Together) -> None:
    """What the loss gives back to the model is not summed over the shards of the vocabulary."""
    ranks.put(VocabularyShard, "sum_", lambda shard, grad_rows: grad_rows)


def heads_apart(ranks: Together) -> None:
    """The keys and values of a rank's queries are on the other rank."""
    true = sharding.parallelize_module

    def cut(model: Any, *rest: Any, **given: Any) -> Any:
        with torch.no_grad():
            for block in model.layers:
                for linear in (block.attention.wk, block.attention.wv):
                    linear.weight.copy_(linear.weight.roll(len(linear.weight) // ranks.size, 0))
        return true(model, *rest, **given)

    ranks.put(sharding, "parallelize_module", cut)


def other_dropout_on_each_rank(ranks: Together) -> None:
    """Activations that every rank has whole lose other numbers on each."""
    true = train.mixed_seed
    ranks.put(train, "mixed_seed", lambda seed, step, rank: true(seed, step, ranks.rank))


# --- What changes nothing but the order of sums ----------------------------------------------------------------------


def small_buckets(ranks: Together) -> None:
    true = DistributedDataParallel.__init__
    ranks.put(DistributedDataParallel, "__init__", lambda copy, module: true(copy, module, bucket_cap_mb=0.001))


def other_turns(ranks: Together) -> None:
    """The last rank is the first one's place in the data, and so on."""
    true = World.data_rank.fget  # type: ignore[attr-defined]
    ranks.put(World, "data_rank", property(lambda world: world.data_size - 1 - true(world)))


def kept_gathered(ranks: Together) -> None:
    """Blocks stay gathered between forward and backward pass."""
    ranks.put(sharding, "fully_shard", partial(fully_shard, reshard_after_forward=False))


def one_unit(ranks: Together) -> None:
    """The whole model is gathered at once: one bucket."""

    def shard(module: nn.Module, **given: Any) -> None:
        if not hasattr(module, "attention"):
            fully_shard(module, **given)

    ranks.put(sharding, "fully_shard", shard)


EDITS: dict[str, Callable[[Together], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        averaged_copies, averaged_shards, kept_gradients, first_micro_batch_synced, norms_not_reduced, reduced_in_bf16,
        clipped_by_own_norm, same_documents, labels_counted_per_rank, loss_of_one_rank, cursor_of_one_rank,
        other_weights_on_each_rank, stale_gather, exchanged_states, transposed_states, forgotten_step_count,
        embedding_offset, loss_offset, softmax_of_own_rows, hidden_gradients_of_own_rows, heads_apart,
        other_dropout_on_each_rank, small_buckets, other_turns, kept_gathered, one_unit,
    )
} | {f"unsummed-{name}": _unsummed(name) for name in ("wo", "w2")}  # fmt: skip
