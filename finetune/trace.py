"""One step of the training loop without its memory and without its peers: the loop's own code, on fake tensors and in a
fake process group, watched by finetune/tracker.py.

    traced = trace_step(ModelConfig(...), TrainConfig(...), MeshSizes(fsdp=8), gpu=True)
    traced.moments["backward, first block"].total()     # bytes of one rank
    traced.sent                                         # bytes that it sends

The first step is not traced: those behind it find optimizer states and FSDP's buffers where it has put them. Fake
tensors are said to be on the CPU, since a torch without CUDA has no backward pass for any others. What the code decides
by the device is decided as on a GPU all the same: sizes of chunks and blocks, heads repeated for CUDA's attention.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from finetune import loss, loss_shards, optim, parallelize
from finetune.config import DTYPES, LORA_METHODS, TrainConfig, lora_targets
from finetune.data.documents import Ints
from finetune.lora import add_lora_, quantize_base_
from finetune.mesh import DIMENSIONS, MeshSizes
from finetune.parallelize import World
from finetune.resume import RunFolder
from finetune.tracker import Kind, StepTracker
from finetune.train import Loop, Setup
from nanollama.model import Attention, Context, ModelConfig, Transformer, fast_attention, repeat_kv


@dataclass(frozen=True)
class Traced:
    """Bytes of one rank in one step."""

    moments: dict[str, Counter[Kind]]  # by kind, at the fullest instant of each moment
    sent: Counter[tuple[str, int]]  # by (collective, ranks)


def trace_step(shape: ModelConfig, config: TrainConfig, sizes: MeshSizes, *, gpu: bool) -> Traced:
    """A step of this config. gpu: as it is on one; else on the CPU."""
    return trace_batches(shape, config, sizes, (config.batch_size,), gpu=gpu)[0]


def trace_batches(
    shape: ModelConfig, config: TrainConfig, sizes: MeshSizes, batches: tuple[int, ...], *, gpu: bool
) -> list[Traced]:
    """Steps of micro-batches of so many rows each, one after the other."""
    offloaded = gpu and config.offload_activations
    config = replace(config, device="cpu", compile=False, offload_activations=False, save="whole")
    with ExitStack() as stack:
        folder = RunFolder(Path(stack.enter_context(TemporaryDirectory())), config)
        world = stack.enter_context(fake_world(sizes))
        stack.enter_context(swapped(FAKES + (GPU_SIZES if gpu else ())))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tracker = stack.enter_context(StepTracker())
        model = _fake_model(shape, config)
        if gpu:
            for module in model.modules():
                if isinstance(module, Attention):
                    module.attend = gpu_attention
        tracker.kind = Kind.COMMUNICATION  # all that wraps put around the weights
        documents: Any = FullRows(config.seq_len)
        tokenizer: Any = NoTokenizer()
        loop = Loop(Setup(folder, model, tokenizer, documents, documents, "", world, lambda _: ""))
        if offloaded:
            for block in model.layers:
                block.forward = partial(_keep_elsewhere, block.forward)
        _tell_moments(tracker, model)
        tracker.kind = Kind.ACTIVATIONS
        loop.step(0)
        for states in loop.optimizer.state.values():
            for state in states.values():
                tracker.label(state, Kind.STATES)
        traced = []
        for rows in batches:
            loop.config, loop.ahead = replace(config, batch_size=rows), None
            tracker.begin_step()
            loop.step(0)
            traced.append(Traced(dict(tracker.moments), Counter(tracker.sent)))
    return traced


# --- What the loop is given ------------------------------------------------------------------------------------------


class FullRows:
    """Documents that each fill a row, of tokens that nobody reads."""

    bos_id = 0

    def __init__(self, seq_len: int) -> None:
        self.lengths: Ints = np.full(64, seq_len, dtype=np.int64)

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return np.zeros(stop - start, dtype=np.int64)


class NoTokenizer:
    """What is held out counts as one character."""

    def __init__(self) -> None:
        self.special_ids: dict[str, int] = {}

    def decode(self, ids: list[int]) -> str:
        return "x"


@contextmanager
def fake_world(sizes: MeshSizes) -> Iterator[World]:
    """Rank 0 of a process group whose other members do not exist."""
    size = sizes.dp * sizes.fsdp * sizes.tp
    if size == 1:
        yield World(torch.device("cpu"))
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        shape = (sizes.dp, sizes.fsdp, sizes.tp)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS) if sizes.is_sharded else None
        yield World(torch.device("cpu"), 0, size, sizes, mesh)
    finally:
        dist.destroy_process_group()


def _fake_model(shape: ModelConfig, config: TrainConfig) -> Transformer:
    """The model with its adapters, as finetune/build.py makes it."""
    with torch.device("meta"):
        sizes = {name: weight.shape for name, weight in Transformer(shape).state_dict().items()}
    weights = {name: torch.empty(size, dtype=DTYPES[config.weights]) for name, size in sizes.items()}
    model = Transformer.from_weights(shape, weights)
    if config.method == "qlora":
        quantize_base_(model)
    if config.method in LORA_METHODS:
        rank, alpha, targets = config.lora_rank, config.lora_alpha, lora_targets(config)
        add_lora_(model, rank, alpha, targets, config.lora_dropout, torch.Generator(), dora=config.dora)
    return model


# --- What is said of the step ----------------------------------------------------------------------------------------


def _tell_moments(tracker: StepTracker, model: Transformer) -> None:
    """Name the moments of a step by the block that is at work, and say what each tensor is when it is known."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tracker.label(tensor, Kind.WEIGHTS)
    last = len(model.layers) - 1
    for i, block in enumerate(model.layers):
        place = {0: "first", last: "last"}.get(i, "middle")
        block.register_forward_pre_hook(partial(_begin_forward, tracker, place))
        block.register_forward_hook(partial(_await_backward, tracker, model, f"{place} block"))
    model.tok_embeddings.register_forward_hook(partial(_await_backward, tracker, model, "embedding"))
    model.norm.register_forward_hook(lambda *_: tracker.enter("loss", Kind.LOSS))


def _begin_forward(tracker: StepTracker, place: str, block: nn.Module, args: object) -> None:
    if not tracker.moment.startswith("backward"):  # else it runs again, for activation checkpointing
        tracker.enter(f"forward, {place} block", Kind.ACTIVATIONS)


def _await_backward(
    tracker: StepTracker, model: Transformer, place: str, module: nn.Module, args: object, out: Tensor
) -> None:
    """The backward pass through a module begins when the gradient of its output is there."""

    def begin(grad: Tensor) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                tracker.label(parameter.grad, Kind.GRADIENTS)
        tracker.enter(f"backward, {place}", Kind.ACTIVATIONS)

    if out.requires_grad and not tracker.moment.startswith("backward"):
        out.register_hook(begin)


# --- What stands in for a part of the loop ---------------------------------------------------------------------------


class Replica(nn.Module):
    """DistributedDataParallel's memory and traffic: its reducer looks into tensors, which fake ones have no inside for.

    It keeps a second copy of the gradients in buckets, and sums them over the ranks when they are there.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.sums = module, True
        for parameter in module.parameters():
            if parameter.requires_grad:
                bucket = torch.empty_like(parameter, requires_grad=False)
                parameter.register_post_accumulate_grad_hook(partial(self._reduce, bucket))

    def _reduce(self, bucket: Tensor, parameter: Tensor) -> None:
        if self.sums:
            dist.all_reduce(bucket)

    def register_comm_hook(self, state: object, hook: Callable[..., object]) -> None:
        """Ours sums as DistributedDataParallel does."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.sums = False
        yield
        self.sums = True

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args)


def gpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """nanollama.model.fast_attention, as it is on CUDA."""
    if mask is not None or q.dtype == torch.float32:
        n_rep = q.shape[2] // k.shape[2]
        k, v = repeat_kv(k, n_rep), repeat_kv(v, n_rep)  # (B, S, H, D)
    return fast_attention(q, k, v, mask)


def _keep_elsewhere(block: Callable[[Tensor, Context], Tensor], x: Tensor, ctx: Context) -> Tensor:
    """What --offload_activations keeps is in the host's memory, and comes back when it is asked for."""
    with saved_tensors_hooks(lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1])):
        return block(x, ctx)


def _on_real_numbers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Ranks and parts are worked out in small tensors: these have numbers, and are none of the step's memory."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    return call


Swap = tuple[ModuleType | type, str, Any]
FAKES: tuple[Swap, ...] = (
    (parallelize, "DistributedDataParallel", Replica),
    (DeviceMesh, "__init__", _on_real_numbers(DeviceMesh.__init__)),
    (DeviceMesh, "__getitem__", _on_real_numbers(DeviceMesh.__getitem__)),
    (optim, "part_of", _on_real_numbers(optim.part_of)),
    (loss_shards, "part_of", _on_real_numbers(loss_shards.part_of)),
)
GPU_SIZES: tuple[Swap, ...] = (
    (loss, "CHUNK_LOGITS", loss.CHUNK_LOGITS_GPU),
    (loss, "BLOCK_NUMBERS", 2**62),  # elementwise passes go over a whole chunk
    (optim, "BLOCK_NUMBERS", optim.BLOCK_NUMBERS_GPU),
)


@contextmanager
def swapped(swaps: tuple[Swap, ...]) -> Iterator[None]:
    before = [getattr(module, name) for module, name, _ in swaps]
    try:
        for module, name, value in swaps:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(swaps, before, strict=True):
            setattr(module, name, value)
