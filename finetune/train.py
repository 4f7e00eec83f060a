"""The only training loop. Entries prepare a Setup; features wrap the model from outside; the loop knows neither.

One step: take rows, sum the loss over their valid labels on all ranks, divide by the number of those labels, clip,
update. A step depends on the checkpoint before it and on (seed, step, rank), so a resumed run repeats it bit by bit.

    python -m finetune.tinystories --max_steps 100 --out out/first
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import nn

from finetune.build import add_dropout_, checkpoint_blocks_, compile_blocks_
from finetune.config import TrainConfig, to_json
from finetune.data.documents import Documents
from finetune.data.packing import Batch, Cursor, Packer
from finetune.evaluate import HeldOut, Score, evaluate, hold_out, loss_model_of
from finetune.loss import LossModel
from finetune.memory import plan_memory
from finetune.metrics import Metrics, flops_per_token, peak_bytes, peak_flops
from finetune.optim import (
    StepInBackward,
    learning_rate,
    make_optimizer,
    mixed_seed,
    select_trained_,
    set_learning_rate_,
    trained,
)
from finetune.parallelize import World, no_sync, replicate
from finetune.resume import Progress, restore_, save
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer


class TrainingStopped(RuntimeError):
    """The run ended before its last step; the message says why and where its state is. `code`: the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Setup:
    """What a run is made of. `config` is resolved: no None is left that the loop reads."""

    config: TrainConfig
    model: Transformer
    tokenizer: Tokenizer
    train: Documents
    val: Documents
    fingerprint: str  # of the data
    out: Path
    world: World
    sample: Callable[[Transformer], str]  # a text that the model continues


@dataclass(frozen=True)
class Outcome:
    progress: Progress
    score: Score  # of the held-out documents, at the end
    held_out: HeldOut


class StopSignals:
    """SIGINT and SIGTERM set `caught`, and the loop stops behind the step; a second one acts as usual."""

    def __init__(self) -> None:
        self.caught = 0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()


def train(setup: Setup) -> Outcome:
    """Train from the newest checkpoint in `setup.out`, or from step 0. Raises TrainingStopped, ValueError."""
    config, world = setup.config, setup.world
    loop = Loop(setup)
    with StopSignals() as signals, Metrics(setup.out, config, world, loop.progress.step) as metrics:
        plan = plan_memory(setup.model, config, world.device)
        metrics.say(plan.text())
        score = None
        while loop.progress.step < config.max_steps:
            values, stop = loop.step(signals.caught)
            step = loop.progress.step
            metrics.write(step, values)
            metrics.progress(values)
            is_last = step == config.max_steps
            if step % config.eval_every == 0 or is_last:
                score = loop.evaluate()
                metrics.write(step, {"val_loss": score.loss, "val_bpb": score.bpb})
                metrics.say(f"step {step}: validation loss {score.loss:.4f}, {score.bpb:.4f} bits per byte")
            if config.sample_every and step % config.sample_every == 0 and world.is_main:
                metrics.say(f"step {step}: {setup.sample(setup.model)}")
            if step % config.save_every == 0 or is_last or stop:
                loop.save()
            if stop and not is_last:
                name = signal.Signals(stop).name
                raise TrainingStopped(f"stopped by {name} after step {step}, which is saved", 128 + stop)
        metrics.say(f"memory: {peak_bytes(world.device) / 1e6:,.0f} MB at the peak, {plan.total / 1e6:,.0f} MB planned")
        return Outcome(loop.progress, score or loop.evaluate(), loop.held_out)


class Loop:
    """The state of a run between two steps."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config, self.world = setup, setup.config, setup.world
        masked = self.config.doc_mask == "on"
        self.packer = Packer(setup.train, self.config.seq_len, seed=self.config.seed, doc_mask=masked)
        held_out = Packer(setup.val, self.config.seq_len, doc_mask=masked)
        self.held_out = hold_out(held_out, setup.tokenizer, self.config.eval_tokens)
        self.loss_model = wrap_(setup.model, self.config, self.world)
        self.optimizer = make_optimizer(setup.model, self.config)
        self.parameters = list(trained(setup.model).values())
        self.in_backward = StepInBackward(self.optimizer) if self.config.optimizer_in_backward else None
        if self.in_backward and self.world.size > 1:
            raise ValueError("--optimizer_in_backward runs in one process: gradients are not summed over ranks yet")
        self.progress = restore_(setup.out, setup.model, self.optimizer, fingerprint=setup.fingerprint)
        self.ahead: tuple[list[list[int]], Cursor, list[Batch]] | None = None  # of the next step
        bf16 = self.config.dtype == "bf16"
        self.autocast = torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16)
        count = sum(p.numel() for p in setup.model.parameters())
        self.flops_per_token = flops_per_token(setup.model.config, count, self.config.seq_len)
        self.peak_flops = peak_flops(self.world.device, self.config.dtype)

    def step(self, stop: int) -> tuple[dict[str, float], int]:
        """One optimizer step; returns its metrics and the largest `stop` of all ranks.

        Raises TrainingStopped, with the state before the step saved, when the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        rows, cursor, batches = self.ahead or self._prepare(self.progress.cursor)
        # One sum tells every rank the number of labels, and whether any of them was asked to stop.
        count, stop_sum = self.world.sum([float(sum(b.valid for b in batches)), float(stop)]).tolist()
        lr = learning_rate(self.config, self.progress.step)
        set_learning_rate_(self.optimizer, lr)
        torch.manual_seed(mixed_seed(self.config.seed, self.progress.step, self.world.rank))  # of dropout
        nats = accumulate_(self.loss_model, batches, count, self.autocast, self.world)
        self.ahead = self._prepare(cursor)  # while a GPU is still busy with this step
        if self.in_backward:
            norm: float | torch.Tensor = self.in_backward.norm()
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        loss, grad_norm = float(self.world.sum(nats)) / count, float(norm)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self._refuse(loss, grad_norm, rows)
        self.optimizer.step()  # no parameter has a gradient left where the backward pass updated them
        self.optimizer.zero_grad(set_to_none=True)
        done = Progress(self.progress.step + 1, self.progress.tokens + int(count), cursor)
        self.progress = done
        speed = count / (time.perf_counter() - started)
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": done.tokens,
            "tokens_per_s": round(speed, 1),
        }
        values["peak_bytes"] = peak_bytes(self.world.device)
        if self.peak_flops:
            values["mfu"] = speed * self.flops_per_token / self.peak_flops / self.world.size
        return values, round(stop_sum / self.world.size) if stop_sum else 0

    def _prepare(self, cursor: Cursor) -> tuple[list[list[int]], Cursor, list[Batch]]:
        """The rows of a step, the cursor behind them, and this rank's micro-batches of them."""
        rows, behind = self.packer.take(cursor, self._rows_per_step())
        batches = [self.packer.batch(part) for part in self._mine(rows)]
        return rows, behind, [batch.pinned() for batch in batches] if self.world.device.type == "cuda" else batches

    def _rows_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.world.size

    def _mine(self, rows: list[list[int]]) -> list[list[list[int]]]:
        """This rank's micro-batches: the ranks take turns, so k ranks see what one rank sees in k micro-batches."""
        size = self._rows_per_step() // self.config.accumulate // self.world.size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return parts[self.world.rank :: self.world.size]

    def _refuse(self, loss: float, grad_norm: float, rows: list[list[int]]) -> None:
        """The parameters are still those before the step: save them, so that the step can be looked at again.

        Those that the backward pass has updated are not: the last checkpoint is what is left.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if not self.in_backward:
            self.save()
        left = "the last checkpoint is from before" if self.in_backward else "the state before the step is saved"
        documents = self.packer.documents_in(rows)
        raise TrainingStopped(
            f"step {self.progress.step + 1}: loss {loss}, gradient norm {grad_norm}; the batch holds documents "
            f"{documents}; {left}: lower --lr or look at those documents",
            1,
        )

    def evaluate(self) -> Score:
        model = loss_model_of(self.loss_model)
        return evaluate(model, self.held_out, self.world, self.config.batch_size, self.autocast)

    def save(self) -> None:
        if self.world.is_main:
            config, fingerprint = to_json(replace(self.config, resume=False)), self.setup.fingerprint
            model = self.setup.model
            save(self.setup.out, self.progress, model, self.optimizer, config=config, fingerprint=fingerprint)
        self.world.barrier()


def wrap_(model: Transformer, config: TrainConfig, world: World) -> nn.Module:
    """Everything that `config` puts around the model, in the order in which it has to be."""
    select_trained_(model, config.method)
    if config.dropout:
        add_dropout_(model, config.dropout)
    if config.activation_checkpointing:
        checkpoint_blocks_(model, offload=config.offload_activations and world.device.type != "cpu")
    if config.compile:
        compile_blocks_(model)
    return replicate(LossModel(model).train(), world)


def accumulate_(
    loss_model: nn.Module, batches: list[Batch], count: float, autocast: torch.autocast, world: World
) -> torch.Tensor:
    """Add the gradients of (summed loss / count) of all micro-batches; returns this rank's summed loss, float64."""
    nats = torch.zeros((), dtype=torch.float64, device="cpu" if world.device.type == "mps" else world.device)
    for i, batch in enumerate(batches):
        on_device = batch.to(world.device)
        with no_sync(loss_model, is_last=i == len(batches) - 1):
            with autocast:
                loss = loss_model(on_device.tokens, on_device.labels, on_device.positions, on_device.doc_ids)
            (loss / count).backward()
        nats += loss.detach().to(nats.device)
    return nats
