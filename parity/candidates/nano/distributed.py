"""nanollama over several processes as a candidate: `--tp 2` and `--fsdp 2` of parity.check make it the one that is
judged, forward and training.

This process starts the ranks and speaks for them: every call goes to all, and the first one's answer comes back. What
does not depend on ranks (ids, config, stored weights) is nanollama's own.

    python -m parity.check --tp 2                        # parity.candidates.nano.distributed:tp2
"""

import os
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from finetune.data.documents import IGNORE
from finetune.data.packing import Batch
from finetune.gather import full, local
from finetune.loss import LossModel, linear_cross_entropy
from finetune.loss_shards import sharded_cross_entropy
from finetune.mesh import mesh_sizes
from finetune.optim import select_trained_, trained
from finetune.parallelize import open_world
from finetune.sharding import cut_layers_, shard_blocks_
from finetune.train import accumulate_
from nanollama.checkpoint import open_checkpoint
from nanollama.model import Transformer
from nanollama.tensor_parallel import decode_by_parts_, fill_, part_of, refuse_uncuttable
from parity.candidates.nano.model import Nano
from parity.candidates.nano.training import NanoTrainer
from parity.run.training import Document, Grads

OWN = ("config", "weights", "rope", "encode", "encode_plain", "encode_chat", "use_tokenizer")


def name_of(fsdp: int, tp: int) -> str:
    """The candidate for parity's table: MODULE:fsdp2tp2."""
    return f"{__name__}:" + "".join(f"{name}{size}" for name, size in (("fsdp", fsdp), ("tp", tp)) if size > 1)


def __getattr__(name: str) -> Callable[..., "Distributed"]:
    found = re.fullmatch(r"(?:fsdp(\d+))?(?:tp(\d+))?", name)
    if not found or not name:
        raise AttributeError(f"module {__name__} has no attribute {name!r}: expected tp2, fsdp2, fsdp2tp2, ...")
    fsdp, tp = (int(size or 1) for size in found.groups())
    return lambda checkpoint, dtype, device: Distributed(checkpoint, dtype, device, fsdp, tp)


class Distributed:
    """The candidate: fsdp * tp processes."""

    def __init__(self, checkpoint: str, dtype: torch.dtype, device: str, fsdp: int, tp: int) -> None:
        opened = open_checkpoint(checkpoint)
        refuse_uncuttable(opened.config, tp)
        with torch.device("meta"):
            nano = Nano(checkpoint, dtype, device, "fast", model=Transformer(opened.config))
        self.notices, self.trainer = nano.notices, lambda: Trainer(self, NanoTrainer(nano))
        for method in OWN:
            setattr(self, method, getattr(nano, method))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context, size = torch.multiprocessing.get_context("spawn"), fsdp * tp
        self.doors: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, port, theirs, checkpoint, dtype, device, fsdp, tp)
            context.Process(target=serve, args=arguments, daemon=True).start()
            theirs.close()  # so that a rank's end is seen
            self.doors.append(ours)

    def ask(self, method: str, *args: Any) -> Any:
        """What the first rank answers. Raises RuntimeError with the first complaint, or that a rank has ended."""
        for door in self.doors:
            door.send((method, args))
        missing, answer = list(self.doors), None
        while missing:
            for ready in wait(missing):
                assert isinstance(ready, Connection)
                try:
                    complaint, out = ready.recv()
                except (EOFError, ConnectionError):
                    complaint = "it has ended"
                if complaint:
                    raise RuntimeError(f"rank {self.doors.index(ready)}: {complaint}")
                missing.remove(ready)
                answer = out if ready is self.doors[0] else answer
        return answer

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.ask("__call__", tokens)

    def packed(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        return self.ask("packed", tokens, doc_ids)

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.ask("prefill", tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.ask("decode", tokens)

    def loss_and_grads(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Grads]:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.ask("train", [Batch(tokens, targets, positions, None, int((targets != IGNORE).sum()))])


class Trainer:
    """What of interface.TRAINER depends on ranks, and the labels, which come before them."""

    def __init__(self, candidate: Distributed, alone: NanoTrainer) -> None:
        self.candidate, self.alone = candidate, alone

    def packed(self, documents: list[Document]) -> tuple[Tensor, Grads]:
        return self.candidate.ask("train", [self.alone.batch(documents)])

    def accumulated(self, parts: list[list[Document]]) -> tuple[Tensor, Grads]:
        return self.candidate.ask("train", [self.alone.batch(part) for part in parts])

    def labels(self, documents: list[list[int]]) -> list[list[int]]:
        return self.alone.labels(documents)

    def adamw(self, steps: list[Callable[[Tensor], Tensor]], hyper: dict) -> list[Grads]:
        stored = self.alone.nano.opened.weights
        grads = [{name: make(stored[name].float()) for name in stored} for make in steps]
        return self.candidate.ask("adamw", grads, hyper)

    def losses(self, batches: list[list[Document]], hyper: dict) -> list[float]:
        # A document a micro-batch, so that every rank has some.
        made = [[self.alone.batch([document]) for document in documents] for documents in batches]
        return self.candidate.ask("losses", made, hyper)


# --- A rank ----------------------------------------------------------------------------------------------------------


def serve(rank: int, size: int, port: int, door: Connection, *model: Any) -> None:
    """Answer until the other side is gone."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    part: Rank | None = None
    while True:
        try:
            method, args = door.recv()
        except EOFError:
            return
        try:
            part = part or Rank(*model)
            out = getattr(part, method)(*args)
            door.send((None, out if rank == 0 else None))
        except Exception as error:
            door.send((f"{type(error).__name__}: {error}", None))


class Rank:
    """One process's part of the model, and of a copy in fp32 for each training."""

    def __init__(self, checkpoint: str, dtype: torch.dtype, device: str, fsdp: int, tp: int) -> None:
        self.world = open_world(device, mesh_sizes(0, fsdp, tp, world_size=fsdp * tp), watched=False)
        self.opened, self.dtype, self.given = open_checkpoint(checkpoint), dtype, (checkpoint, dtype, device, "fast")
        self.nano: Nano | None = None

    def model(self, dtype: torch.dtype) -> Transformer:
        """Read from this rank's part of the file."""
        with torch.device("meta"):
            model = Transformer(self.opened.config)
        select_trained_(model, "full")
        cut_layers_(model, self.world)
        shard_blocks_(model, self.world)
        fill_(model, self.opened.weights, dtype, self.world.device)
        return model

    def answerer(self) -> Nano:
        """nanollama as the whole candidate is, around this part."""
        if self.nano is None:
            model = self.model(self.dtype).eval()
            if self.world.sizes.tp > 1:
                assert self.world.mesh is not None
                decode_by_parts_(model, self.world.mesh["tp"])
            self.nano = Nano(*self.given, model=model)
            self.nano.cfg = model.config  # which counts this part's heads
        return self.nano

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        return self.answerer()(tokens)

    @torch.no_grad()
    def packed(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        return self.answerer().packed(tokens, doc_ids)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        return self.answerer().prefill(tokens)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return self.answerer().decode(tokens)

    def train(self, batches: list[Batch]) -> tuple[Tensor, Grads]:
        model = self.model(torch.float32)
        loss = self._accumulate(model, self._loss_model(model), batches)
        return loss, {name: full(p.grad).clone() for name, p in trained(model).items() if p.grad is not None}

    def losses(self, batches: list[list[Batch]], hyper: dict) -> list[float]:
        model = self.model(torch.float32)
        loss_model, optimizer, found = self._loss_model(model), self._optimizer(model, hyper), []
        for micro_batches in batches:
            found.append(float(self._accumulate(model, loss_model, micro_batches)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return found

    def adamw(self, steps: list[Grads], hyper: dict) -> list[Grads]:
        model = self.model(torch.float32)
        optimizer, found = self._optimizer(model, hyper), []
        for grads in steps:
            for name, parameter in trained(model).items():
                parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(grads[name][part_of(parameter)])
            optimizer.step()
            found.append({name: full(p).clone() for name, p in trained(model).items()})
        return found

    def _optimizer(self, model: Transformer, hyper: dict) -> torch.optim.Optimizer:
        return NanoTrainer(self.answerer()).optimizer(model, hyper)

    def _loss_model(self, model: Transformer) -> LossModel:
        return LossModel(model, sharded_cross_entropy if self.world.sizes.tp > 1 else linear_cross_entropy).train()

    def _accumulate(self, model: Transformer, loss_model: LossModel, batches: list[Batch]) -> Tensor:
        """Mean loss over all ranks; the gradients are the model's. Rows are dealt out, one a micro-batch."""
        rows = [row for batch in batches for row in split(batch)]
        rows += [nothing(rows[0])] * (-len(rows) % self.world.data_size)
        labels = sum(row.valid for row in rows)
        fp32 = torch.autocast(self.world.device.type, enabled=False)
        mine = rows[self.world.data_rank :: self.world.data_size]
        return self.world.sum(accumulate_(loss_model, mine, labels, fp32, self.world)) / labels


def split(batch: Batch) -> list[Batch]:
    """Its rows, one by one."""
    parts = zip(*(t.split(1) for t in (batch.tokens, batch.labels, batch.positions)), strict=True)
    docs = [None] * len(batch.tokens) if batch.doc_ids is None else batch.doc_ids.split(1)
    return [
        Batch(tokens, labels, positions, doc_ids, int((labels != IGNORE).sum()))
        for (tokens, labels, positions), doc_ids in zip(parts, docs, strict=True)
    ]


def nothing(row: Batch) -> Batch:
    """A row that the others wait for, and that trains nothing."""
    return replace(row, labels=torch.full_like(row.labels, IGNORE), valid=0)
