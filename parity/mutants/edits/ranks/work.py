"""Training over ranks, measured: the real loop on a small model and uneven documents, in processes that stay.

    ranks = Ranks(2)
    measured = ranks.run(Job(fsdp=2, edit="averaged-shards"))
    ranks.close()

One process alone runs the same `Job()` in this one. Losses, the gradient of the first step, its norm and the losses
after a save and a resume are what parity/mutants/distributed.py compares.
"""

import os
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from finetune.build import fresh_weights
from finetune.config import TrainConfig, resolve
from finetune.gather import full
from finetune.mesh import DIMENSIONS, MeshSizes
from finetune.parallelize import World, open_world
from finetune.resume import RunFolder
from finetune.train import Loop, Setup
from nanollama.model import ModelConfig, Transformer
from parity.mutants.edits.ranks.edits import EDITS, Together

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, hidden_dim=48, rope_theta=10_000.0)
MICRO_BATCHES, STEPS, SAVED_AT = 4, 4, 2
PEAK = 3.0  # of the fresh weights: sharper attention shows more


@dataclass(frozen=True)
class Job:
    """One training. Without any flag, one process; the batch is always that of four micro-batches."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    edit: str | None = None
    dropout: float = 0.0
    rows: int = 1  # in a micro-batch, of the step's four
    turned: bool = False  # features, heads and hidden units in the other order: the same function, other sums

    @property
    def accumulate(self) -> int:
        return MICRO_BATCHES // self.rows // (self.dp * self.fsdp)


@dataclass
class Measured:
    """Of one training, as rank 0 has it."""

    losses: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    resumed: list[float] = field(default_factory=list)  # losses behind step SAVED_AT, from its checkpoint


class Documents:
    """Random tokens in documents of very different lengths; token 1 is BOS."""

    bos_id = 1
    special_ids: ClassVar[dict[str, int]] = {}  # of the tokenizer whose place it takes, too

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.lengths = generator.integers(3, 40, 60)
        self.texts = [np.append(1, generator.integers(2, SHAPE.vocab_size, n - 1)) for n in self.lengths]

    def tokens(self, document: int, start: int, stop: int) -> Any:
        return self.texts[document][start:stop]

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


def train(job: Job, world: World, folder: Path) -> Measured:
    """The whole job on this rank."""
    out = Measured()
    with ExitStack() as stack:
        together = Together(world.rank, world.size, stack)
        if job.edit:
            EDITS[job.edit](together)
        loop = make_loop(job, world, folder)
        with patch.object(loop, "_clip_", _noting(loop, out, job.turned)):
            for step in range(1, STEPS + 1):
                _step(loop, out, out.losses)
                if step == SAVED_AT:
                    loop.save(wait=True)
        again = make_loop(job, world, folder)
        for _ in range(SAVED_AT, STEPS):
            _step(again, Measured(), out.resumed)
    return out


def make_loop(job: Job, world: World, folder: Path) -> Loop:
    config = TrainConfig(
        init="260K", seq_len=40, batch_size=job.rows, accumulate=job.accumulate, max_steps=STEPS, lr=0.01,
        warmup_steps=0, dropout=job.dropout, grad_clip=0.5, save="sharded", dp=job.dp, fsdp=job.fsdp, tp=job.tp,
    )  # fmt: skip
    weights = fresh_weights(SHAPE, torch.Generator().manual_seed(0))
    weights = {n: w * PEAK if w.ndim > 1 else w for n, w in weights.items()}
    weights = {n: turn(n, w) for n, w in weights.items()} if job.turned else weights
    model = Transformer.from_weights(SHAPE, weights)
    data: Any = Documents(0)
    run = RunFolder(folder, resolve(config, "cpu", 1))
    if world.rank == 0:
        run.write_config()
    return Loop(Setup(run, model, data, data, data, "data", world, str))


def turn(name: str, weight: Tensor) -> Tensor:
    """A weight, or its gradient, with features, hidden units and whole heads in the other order; twice is nothing."""
    kind, d = name.split(".")[-2], SHAPE.head_dim
    if kind in ("wq", "wk", "wv"):
        return weight.view(-1, d, SHAPE.dim).flip(0, 2).reshape(weight.shape)
    if kind == "wo":
        return weight.view(SHAPE.dim, -1, d).flip(0, 1).reshape(weight.shape)
    return weight.flip(1) if kind in ("tok_embeddings", "output") else weight.flip(tuple(range(weight.ndim)))


def _step(loop: Loop, out: Measured, losses: list[float]) -> None:
    before = loop.progress.tokens
    measured, _ = loop.step(0)
    losses.append(measured.loss)
    out.labels.append(loop.progress.tokens - before)
    out.norms.append(measured.grad_norm)


def _noting(loop: Loop, out: Measured, turned: bool) -> Any:
    """The true clipping, with a look at the first step's gradients before it."""
    clip = loop._clip_

    def noted() -> float:
        if not out.gradients:
            named = dict(loop.setup.model.named_parameters())
            out.gradients = {n: full(p.grad).clone() for n, p in named.items() if p.grad is not None}
            out.gradients = {n: turn(n, g) if turned else g for n, g in out.gradients.items()}
        return clip()

    return noted


def train_alone(job: Job) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        return train(job, World(torch.device("cpu")), Path(folder))


# --- Processes -------------------------------------------------------------------------------------------------------


class Ranks:
    """Gloo ranks that run one job after another; an edit is gone when its job is."""

    def __init__(self, size: int, method: str = "spawn") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context: Any = get_context(method)
        self.doors: list[Connection] = []
        self.folder = tempfile.TemporaryDirectory()
        self.jobs = 0
        for rank in range(size):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(rank, size, port, theirs), daemon=True).start()
            theirs.close()
            self.doors.append(ours)

    def run(self, job: Job) -> Measured:
        """What rank 0 measured. Raises RuntimeError with a rank's complaint."""
        self.jobs += 1
        for door in self.doors:
            door.send((job, Path(self.folder.name) / str(self.jobs)))
        answers = [door.recv() for door in self.doors]
        for rank, (complaint, _) in enumerate(answers):
            if complaint:
                raise RuntimeError(f"rank {rank}: {complaint}")
        measured: Measured = answers[0][1]
        return measured

    def close(self) -> None:
        for door in self.doors:
            door.close()
        self.folder.cleanup()


def serve(rank: int, size: int, port: int, door: Connection) -> None:
    """One rank: answer until the other side is gone."""
    meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in meeting.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    world = open_world("cpu", limit_s=120, watched=False)
    while True:
        try:
            job, folder = door.recv()
        except EOFError:
            return
        try:
            measured = train(job, _meshed(world, job), folder)
            door.send((None, measured if rank == 0 else None))
        except Exception as error:
            door.send((f"{type(error).__name__}: {error}", None))


def _meshed(world: World, job: Job) -> World:
    """The same ranks in the job's mesh."""
    sizes = MeshSizes(job.dp, job.fsdp, job.tp)
    shape = (job.dp, job.fsdp, job.tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS) if sizes.is_sharded else None
    dist.barrier()
    return replace(world, sizes=sizes, mesh=mesh)
