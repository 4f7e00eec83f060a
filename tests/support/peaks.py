"""The most bytes that torch's allocator has handed out at a time in a training step: what a plan is held against.

Allocations are those that torch's profiler reports, from the building of the model on, whoever asked for them; their
running sum is the memory in use. The kernel's own peak (VmHWM) agrees within 1% where the C library gives memory back
at once (docs/LOG.md), but a process holds 300 MB of libraries beside it.

    measured_peak(shape, config, MeshSizes())         # in this process
    measured_peak(shape, config, MeshSizes(fsdp=4))   # in four that meet over gloo
"""

import ctypes
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch.profiler import ProfilerActivity, profile

from finetune.build import fresh_weights
from finetune.config import DTYPES, LORA_METHODS, TrainConfig, lora_targets
from finetune.lora import add_lora_
from finetune.mesh import MeshSizes
from finetune.parallelize import World, open_world
from finetune.resume import RunFolder
from finetune.trace import FullRows, NoTokenizer
from finetune.train import Loop, Setup
from nanollama.checkpoint.names import weight_shapes
from nanollama.checkpoint.weights import Lazy, Weights
from nanollama.machine import peak_memory_bytes
from nanollama.model import ModelConfig, Transformer

M_MMAP_THRESHOLD = -3  # of mallopt: what is larger lies in pages of its own, which are given back


Measure = Callable[[ModelConfig, TrainConfig, World], int]


def measured_peak(shape: ModelConfig, config: TrainConfig, sizes: MeshSizes) -> int:
    """Bytes of the first rank in the second step of a run on the CPU."""
    return _of_first_rank(_allocated_here, shape, config, sizes)


def resident_peak(shape: ModelConfig, config: TrainConfig, sizes: MeshSizes) -> int:
    """The same by the kernel's count, gloo's copies and the allocator's gaps with it: for models whose profile
    would not fit. What a model of two small layers has left behind, libraries and all, is taken off."""
    return _of_first_rank(_resident_here, shape, config, sizes)


def _of_first_rank(measure: Measure, shape: ModelConfig, config: TrainConfig, sizes: MeshSizes) -> int:
    config = replace(config, device="cpu")
    ranks = sizes.dp * sizes.fsdp * sizes.tp
    if ranks == 1:
        return measure(shape, config, World(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        result = Path(folder) / "peak"
        # Forked from a process that has torch loaded already, which takes longer than the two steps.
        multiprocessing.set_forkserver_preload(["peaks"])
        arguments = (ranks, port, measure, shape, config, sizes, result)
        torch.multiprocessing.start_processes(_rank, args=arguments, nprocs=ranks, start_method="forkserver")
        return int(result.read_text())


def _rank(
    rank: int,
    ranks: int,
    port: int,
    measure: Measure,
    shape: ModelConfig,
    config: TrainConfig,
    sizes: MeshSizes,
    result: Path,
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = open_world("cpu", sizes)
    peak = measure(shape, config, world)
    if world.is_main:
        result.write_text(str(peak))
    world.barrier()
    world.close()


def _allocated_here(shape: ModelConfig, config: TrainConfig, world: World) -> int:
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loop = _loop(shape, config, world, Path(folder))
            loop.step(0)
            second = time.time_ns()
            loop.step(0)
        return _most_since(second, profiler)


def _resident_here(shape: ModelConfig, config: TrainConfig, world: World) -> int:
    if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16) != 1:
        raise OSError("the C library gives no memory back at once: mallopt failed")
    small = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=64, hidden_dim=128, max_seq_len=64)
    with tempfile.TemporaryDirectory() as folder:
        loop = _loop(small, config, world, Path(folder) / "small")
        loop.step(0)
        del loop
        before = _since_now()
        loop = _loop(shape, config, world, Path(folder) / "large")
        loop.step(0)
        _since_now()
        loop.step(0)
        return int(peak_memory_bytes() or 0) - before


def _since_now() -> int:
    """From here on the kernel counts its peak anew; what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak_memory_bytes() or 0)


def _loop(shape: ModelConfig, config: TrainConfig, world: World, folder: Path) -> Loop:
    unread = Weights({name: drawn(size) for name, size in weight_shapes(shape).items()}) if world.mesh else None
    if unread is None:
        weights = fresh_weights(shape, torch.Generator().manual_seed(0))
        model = Transformer.from_weights(shape, {name: w.to(DTYPES[config.weights]) for name, w in weights.items()})
    else:
        with torch.device("meta"):
            model = Transformer(shape)
    if config.method in LORA_METHODS:
        rank, alpha, targets = config.lora_rank, config.lora_alpha, lora_targets(config)
        add_lora_(model, rank, alpha, targets, config.lora_dropout, torch.Generator().manual_seed(0))
    rows: Any = FullRows(config.seq_len)
    tokenizer: Any = NoTokenizer()
    return Loop(Setup(RunFolder(folder, config), model, tokenizer, rows, rows, "", world, lambda _: "", unread=unread))


def drawn(size: tuple[int, ...]) -> Lazy:
    """A weight that is drawn a few rows at a time, so that no rank ever has the whole."""
    return Lazy(size, torch.float32, lambda start, stop: 0.02 * torch.randn(stop - start, *size[1:]))


def _most_since(moment_ns: int, profiler: profile) -> int:
    """Of the running sum of what was allocated and freed, the largest value after a moment."""
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    in_use = most = 0
    for at_ns, change in changes:
        in_use += change
        if at_ns >= moment_ns:
            most = max(most, in_use)
    assert most, "the profiler saw no allocation"
    return most
