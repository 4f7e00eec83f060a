"""The only training loop. Entries prepare a Setup; features wrap the model from outside; the loop knows neither.

One step: count the labels of all ranks, sum the loss over them and divide by their number, clip, update. A step depends
on the checkpoint before it and on (seed, step, rank), so a resumed run repeats it bit by bit.

    python -m finetune.tinystories --max_steps 100 --out out/first
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.average import averaged, update_average_, use_average_
from finetune.best import Best, load_best_, write_best
from finetune.build import mixed_precision, wrap_
from finetune.config import DTYPES
from finetune.data.appended import Extent
from finetune.data.documents import Documents
from finetune.data.packing import Cursor, MicroBatch
from finetune.errors import TrainingStopped, UserError
from finetune.evaluate import Score, hold_out, loss_model_of
from finetune.gather import full, gathering
from finetune.memory import plan_memory
from finetune.metrics import Metrics, StepMetrics, flops_per_token, peak_bytes, peak_flops, read_metrics
from finetune.objective import NEXT_TOKEN, Objective
from finetune.optim import StepInBackward, learning_rate, make_optimizer, mixed_seed, set_learning_rate_, trained
from finetune.parallelize import World, no_sync
from finetune.preview import plan_lines
from finetune.restore import check_cursor
from finetune.resume import Data, Progress, RunFolder
from finetune.save import Saver
from finetune.sharding import rest_, sum_partial_
from finetune.stopping import StoppedAmid, StopSignals, stopping_between_layers
from finetune.verdict import Verdict, Yardsticks, doubt, judge, yardsticks
from finetune.watch import Watch
from nanollama.checkpoint.weights import Weights
from nanollama.model import Transformer
from nanollama.tensor_parallel import fill_
from nanollama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Setup:
    """What a run is made of."""

    folder: RunFolder
    model: Transformer
    tokenizer: Tokenizer
    train: Documents
    val: Documents
    fingerprint: str  # of the data
    world: World
    sample: Callable[[Transformer], str]  # a text that the model continues
    unread: Weights | None = None  # of a model on the meta device: read when it is sharded, each rank its own part
    objective: Objective = NEXT_TOKEN  # what is learned
    tokenizer_file: str = ""
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # what a resumed run does otherwise than before

    @property
    def micro_batches(self) -> int:
        """In a step, on all ranks together."""
        return self.folder.micro_batches_of(self.world)


@dataclass(frozen=True)
class Outcome:
    progress: Progress
    score: Score  # of the held-out documents, with the parameters that are kept
    step: int  # whose they are
    yards: Yardsticks | None  # None where the loss is not that of the next token: chance and a bigram have no such loss
    verdict: Verdict


def train(setup: Setup) -> Outcome:
    """Train from the newest checkpoint of the run's folder, or from step 0; the model ends with the parameters that are
    kept. Raises TrainingStopped, UserError.
    """
    config, world = setup.folder.config, setup.world
    loop = Loop(setup)
    if world.is_main:
        setup.folder.write_config()
    with StopSignals() as signals, Metrics(setup.folder, world, loop.progress.step) as metrics:
        try:
            with stopping_between_layers(setup.model, config, world, signals):
                return _train(loop, metrics, signals)
        except StoppedAmid:
            loop.forget()
            loop.save(wait=True)
            step, name = loop.progress.step, signal.Signals(signals.caught).name
            raise TrainingStopped(
                f"stopped by {name} amid what follows step {step}, which is saved", 128 + signals.caught
            ) from None


def _train(loop: "Loop", metrics: Metrics, signals: StopSignals) -> Outcome:
    setup, config, world = loop.setup, loop.config, loop.world
    plan = None if world.mesh else plan_memory(setup.model, config, world.device)
    if world.is_main:
        rows = config.batch_size * setup.micro_batches
        for line in plan_lines(config, setup.model, loop.packer, loop.held_out, plan, rows):
            metrics.say(line)
    metrics.write_changes(loop.progress.step, setup.changed)
    if loop.news:
        metrics.say(loop.news)
    if loop.progress.step == config.max_steps:
        metrics.say(f"all {config.max_steps:,} steps are done: --max_steps with a larger number goes on")
    yards = world.from_main(lambda: yardsticks(setup.train, loop.held_out, setup.tokenizer.vocab_size))
    began = began_with(loop, metrics, yards)
    entries = world.from_main(lambda: read_metrics(setup.folder.path / "metrics.jsonl"))
    watch = Watch.replayed(entries)
    step = loop.progress.step
    if step and loop.is_judged_at(step) and not any(e["step"] == step and "val_loss" in e for e in entries):
        metrics.write_score(step, loop.judge())  # a signal came amid it
    while loop.progress.step < config.max_steps and not loop.out_of_patience:
        measured, stop = loop.step(signals.caught)
        step = loop.progress.step
        is_last = step == config.max_steps
        metrics.write_step(step, measured)
        if loop.is_judged_at(step):
            metrics.write_score(step, loop.judge())
        trouble = watch.see(measured.loss, measured.grad_norm)
        if trouble:
            metrics.say(f"step {step}: {trouble}; its batch holds documents {loop.documents()}")
        if config.sample_every and step % config.sample_every == 0 and (world.is_main or world.mesh):
            metrics.write_sample(step, setup.sample(setup.model))  # over shards by all ranks together
        if step % config.save_every == 0 or is_last or stop or watch.diverged or loop.out_of_patience:
            loop.save(wait=bool(stop or watch.diverged) or is_last or loop.out_of_patience)
        if stop and not is_last:
            name = signal.Signals(stop).name
            raise TrainingStopped(f"stopped by {name} after step {step}, which is saved", 128 + stop)
        if watch.diverged and not is_last:
            raise TrainingStopped(f"step {step}: {watch.diverged}; the state is saved: continue with a lower --lr", 1)
    if loop.out_of_patience:
        metrics.say(f"step {loop.progress.step}: {config.patience} validations without a better one: stopped early")
    metrics.say(loop.saver.text())
    loop.saver.close()
    planned = f", {plan.total / 1e6:,.0f} MB planned" if plan else ""
    metrics.say(f"memory: {peak_bytes(world.device) / 1e6:,.0f} MB at the peak{planned}")
    return loop.outcome(yards, began)


def began_with(loop: "Loop", metrics: Metrics, yards: Yardsticks) -> Score | None:
    """The validation before the first step, or, of a run that goes on, the one that it wrote down then."""
    step, out = loop.progress.step, loop.setup.folder.path
    if not step or loop.news:
        score = loop.evaluate()
        metrics.write_score(step, score)
        metrics.say(f"step {step}: beside it {yards.text()}")
        if loop.config.ckpt and loop.objective.scores_text and (word := doubt(yards, score)):
            metrics.say(word)
        return score
    found = loop.world.from_main(lambda: [e for e in read_metrics(out / "metrics.jsonl") if "val_loss" in e])
    first = next((e for e in found if e["step"] == 0), None)
    return Score(first["val_loss"], first["val_bpb"]) if first else None


@dataclass(frozen=True)
class StepData:
    """What one step trains on."""

    rows: list[list[int]]  # of all ranks, each a list of pieces
    batches: list[MicroBatch]  # this rank's micro-batches of them
    behind: Cursor  # of the row after them


class Loop:
    """The state of a run between two steps."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config, self.world = setup, setup.folder.config, setup.world
        config, model = self.config, setup.model
        masked = config.doc_mask == "on"
        self.objective = setup.objective
        self.packer = self.objective.packer(setup.train, config.seq_len, seed=config.seed, doc_mask=masked)
        held_out = self.objective.packer(setup.val, config.seq_len, seed=0, doc_mask=masked)
        self.held_out = hold_out(held_out, setup.tokenizer, config.eval_tokens)
        self.loss_model = wrap_(model, config, self.world, self.objective.loss_model)
        if setup.unread is not None:
            fill_(model, setup.unread, DTYPES[config.weights], self.world.device)
        self.optimizer = make_optimizer(model, config)
        self.parameters = list(trained(model).values())
        self.in_backward = StepInBackward(self.optimizer) if config.optimizer_in_backward else None
        if self.in_backward and self.world.size > 1:
            raise UserError("--optimizer_in_backward runs in one process: gradients are not summed over ranks yet")
        train, val = Extent.of(setup.train), Extent.of(setup.val)
        self.data = Data(setup.fingerprint, train, val, setup.tokenizer_file)
        self.progress = setup.folder.restore_(model, self.optimizer, self.data)
        self.news = self.progress.news
        check_cursor(self.packer, self.progress.cursor)
        self.saver = Saver(setup.folder, self.world, self.data, self.progress.step)
        self.ahead: StepData | None = None  # of the next step
        self.rows: list[list[int]] = []  # of the step that was done last
        self.judged: tuple[int, Score] | None = None  # the last validation, and its step
        self.autocast = mixed_precision(config, self.world.device)
        parameters = sum(p.numel() for p in model.parameters())
        self.flops_per_token = flops_per_token(model.config, parameters, config.seq_len)
        self.peak_flops = peak_flops(self.world.device, config.dtype)

    def step(self, stop: int) -> tuple[StepMetrics, int]:
        """One optimizer step; returns its metrics and the largest `stop` of all ranks (a signal's number, or 0).

        Raises TrainingStopped, with the state before the step saved, when the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        data = self.ahead or self._take(self.progress.cursor)

        # 1. Labels: their number on all ranks is known before any forward pass, so that each weighs the same.
        mine = [float(sum(numbers)) for numbers in zip(*((b.valid, b.count) for b in data.batches), strict=True)]
        labels, count = map(int, self.world.sum(mine))
        stop = self.world.max(stop)

        # 2. Forward and backward: the gradients of the mean loss over these labels.
        lr = learning_rate(self.config, self.progress.step)
        set_learning_rate_(self.optimizer, lr)  # already here: the backward pass itself may update
        if self.in_backward:
            self.saver.before_update()
        torch.manual_seed(mixed_seed(self.config.seed, self.progress.step, self.world.data_rank))  # of dropout
        nats = accumulate_(self.loss_model, data.batches, count, self.autocast, self.world)
        self.ahead = self._take(data.behind)  # while a GPU is still busy with this step (docs/LOG.md)
        grad_norm = self._clip_()
        loss = float(self.world.sum(nats)) / count
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise self._stopped_before_update(loss, grad_norm, data)

        # 3. Update.
        self.saver.before_update()
        self.optimizer.step()  # no parameter has a gradient left where the backward pass updated them
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.ema:
            update_average_(self.optimizer, self.parameters, self.config.ema)
        self.rows, now = data.rows, self.progress
        self.progress = replace(now, step=now.step + 1, tokens=now.tokens + labels, cursor=data.behind)
        return self._measure(loss, lr, grad_norm, labels / (time.perf_counter() - started)), stop

    def _take(self, cursor: Cursor) -> StepData:
        """The rows of a step from `cursor` on. The ranks take turns with micro-batches of them, so k ranks see what
        one rank sees in k times as many; where they do not come out even, some ranks end with empty rows.
        """
        size, world = self.config.batch_size, self.world
        count = self.setup.folder.micro_batches_of(world)
        rows, behind = self.packer.take(cursor, size * count)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        parts += [[[]] * size] * (-count % world.data_size)
        batches = [self.packer.batch(part) for part in parts[world.data_rank :: world.data_size]]
        return StepData(rows, [b.pinned() for b in batches] if world.device.type == "cuda" else batches, behind)

    def _clip_(self) -> float:
        """Scale the gradients down to `--grad_clip`; returns their norm before."""
        if self.in_backward:
            return self.in_backward.norm()
        return float(full(nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)))

    def _stopped_before_update(self, loss: float, grad_norm: float, data: StepData) -> TrainingStopped:
        """The parameters are still those before the step: save them, so that the step can be looked at again.

        Those that the backward pass has updated are not: the last checkpoint is what is left.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if not self.in_backward:
            self.save(wait=True)
        left = "the last checkpoint is from before" if self.in_backward else "the state before the step is saved"
        documents = self.packer.documents_in(data.rows)
        return TrainingStopped(
            f"step {self.progress.step + 1}: loss {loss}, gradient norm {grad_norm}; the batch holds documents "
            f"{documents}; {left}: lower --lr or look at those documents",
            1,
        )

    def _measure(self, loss: float, lr: float, grad_norm: float, labels_per_s: float) -> StepMetrics:
        """Of the step that is done."""
        peak = self.peak_flops
        return StepMetrics(
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=self.progress.tokens,
            tokens_per_s=round(labels_per_s, 1),
            peak_bytes=peak_bytes(self.world.device),
            mfu=labels_per_s * self.flops_per_token / peak / self.world.size if peak else None,
            more=self.objective.measure_step(loss_model_of(self.loss_model), self.world),
        )

    def evaluate(self) -> Score:
        """Of the weights; with --ema, of their average too."""
        score = self._score()
        if not self.config.ema:
            return score
        with averaged(self.optimizer, self.parameters):
            average = self._score()
        return replace(score, more=score.more | {"val_ema_loss": average.loss, "val_ema_bpb": average.bpb})

    def _score(self) -> Score:
        model = loss_model_of(self.loss_model)
        return self.objective.evaluate(model, self.held_out, self.world, self.config.batch_size, self.autocast)

    def is_judged_at(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.config.max_steps or bool(every and step % every == 0)

    def judge(self) -> Score:
        """Validate, and keep the parameters where they are the best so far."""
        score, step = self.evaluate(), self.progress.step
        kept = self._of_what_is_left(score)
        self.judged = step, kept
        best = self.progress.best.after(step, kept) if self.progress.best else Best(step, kept)
        self.progress = replace(self.progress, best=best)
        if best.step == step and self.config.keep == "best":
            rest_(self.setup.model)
            left = averaged(self.optimizer, self.parameters) if self.config.ema else nullcontext()
            with left, gathering(trained(self.setup.model), self.world) as whole:
                if whole is not None:
                    write_best(self.setup.folder.path, step, self.setup.model, whole)
            self.world.wait_for_main()
        return score

    def _of_what_is_left(self, score: Score) -> Score:
        """The score of what the run leaves: with --ema, of the average."""
        if "val_ema_loss" not in score.more:
            return replace(score, more={})
        return Score(score.more["val_ema_loss"], score.more["val_ema_bpb"])

    @property
    def out_of_patience(self) -> bool:
        best = self.progress.best
        return bool(self.config.patience and best and best.waited >= self.config.patience)

    def outcome(self, yards: Yardsticks, began: Score | None) -> Outcome:
        """The verdict on the run; the model gets the parameters that are kept."""
        step, best = self.progress.step, self.progress.best
        if best and best.step == step:
            self.judged = step, best.score
        last = self.judged[1] if self.judged and self.judged[0] == step else self._of_what_is_left(self.evaluate())
        kept, at = last, step
        if best and best.step != step and self.config.keep == "best":
            kept, at = best.score, best.step
            rest_(self.setup.model)
            if self.world.is_main or self.world.mesh:
                load_best_(self.setup.folder.path, at, self.setup.model)
        elif self.config.ema:
            use_average_(self.optimizer, self.parameters)
        verdict = judge(yards, began, kept, at, last, step, learns_text=self.objective.scores_text)
        return Outcome(self.progress, kept, at, yards if self.objective.scores_text else None, verdict)

    def documents(self) -> list[int]:
        """Those of the last step's batch."""
        return self.packer.documents_in(self.rows)

    def forget(self) -> None:
        """Drop what a step that was not finished has left: the state is that before it."""
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, *, wait: bool) -> None:
        """One checkpoint, continued on any number of ranks. wait: until it is on the disk, even if async."""
        rest_(self.setup.model)
        self.saver.save(self.progress, self.setup.model, self.optimizer, wait=wait)


def accumulate_(
    loss_model: nn.Module, batches: Sequence[MicroBatch], count: float, autocast: torch.autocast, world: World
) -> Tensor:
    """Add the gradients of (summed loss / count) of all micro-batches; returns this rank's summed loss, float64."""
    nats = torch.zeros((), dtype=torch.float64, device="cpu" if world.device.type == "mps" else world.device)
    for i, batch in enumerate(batches):
        on_device = batch.to(world.device)
        with no_sync(loss_model, is_last=i == len(batches) - 1):
            with autocast:
                loss = loss_model(*on_device.inputs())
            (loss / count).backward()
        nats += loss.detach().to(nats.device)
    if world.sizes.tp > 1:
        sum_partial_(loss_model.parameters())
    return nats
