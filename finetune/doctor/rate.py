"""The learning rate: a few steps on one batch at some rates, each from the same weights. A model that learns makes one
batch much more likely; a rate that is too large makes it less so, one that is too small does nothing.

    for trial in trials(patient, rates_around(patient.config.lr)):
        print(trial.rate, trial.losses[-1])
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from finetune.doctor.patient import Finding, Patient, unchanged
from finetune.optim import make_optimizer, trained

STEPS = 8
TIME_S = 20.0  # for all trials; on a large model they have fewer steps
LEARNS = 0.02  # nats that a batch gets more likely within the steps, at some rate
TOO_HIGH = 0.02  # of the loss: so much worse than at a hundredth of the rate
RUN_LEARNS = 0.1  # nats that the whole run would gain at the pace of the trial
NEAR = (0.01, 0.1, 1.0, 10.0, 100.0)
RANGE = tuple(10 ** (k / 2) for k in range(-6, 5))  # of --find_lr, times the rate


class Trial(NamedTuple):
    rate: float
    losses: list[float]  # nats, before each step and after the last

    @property
    def last(self) -> float:
        return self.losses[-1] if all(map(math.isfinite, self.losses)) else math.inf


def check_rate(patient: Patient) -> Iterator[Finding]:
    """One batch is learned, and the run's rate is one that learns it."""
    lr = patient.config.lr
    if not patient.part().valid or lr <= 0:
        return
    tried = {round(t.rate / lr, 4): t for t in trials(patient, [lr * factor for factor in NEAR])}
    mine, slow = tried[1.0], tried[0.01]
    first, steps = mine.losses[0], len(mine.losses) - 1
    if not math.isfinite(first) or steps < 2:
        return
    patient.facts.append(f"one batch, {steps} steps at --lr {lr:g}: loss {first:.2f} -> {mine.last:.2f}")
    best, faster = min(tried.values(), key=lambda t: t.last), min((tried[10.0], tried[100.0]), key=lambda t: t.last)
    if best.last > first - LEARNS and mine.last <= first + TOO_HIGH * first:
        yield Finding(
            "does not learn",
            f"{steps} steps on one batch leave its loss at {first:.3f} (at best {best.last:.3f}, at --lr {best.rate:g})"
            ": raise --lr, or look at which tensors are trained",
        )
    elif mine.last > slow.last + TOO_HIGH * first:
        yield Finding(
            "rate too high",
            f"at --lr {lr:g} {steps} steps on one batch bring its loss from {first:.2f} to {mine.last:.2f}, at "
            f"{best.rate:g} to {best.last:.2f}: lower --lr",
        )
    elif _gain(mine) * patient.config.max_steps / steps < RUN_LEARNS and _gain(faster) > max(3 * _gain(mine), LEARNS):
        yield Finding(
            "rate too low",
            f"at --lr {lr:g} {steps} steps on one batch bring its loss from {first:.3f} to {mine.last:.3f}, at "
            f"{faster.rate:g} to {faster.last:.3f}: the run's {patient.config.max_steps} steps would change nothing",
        )


def _gain(trial: Trial) -> float:
    return trial.losses[0] - trial.last


def find_rate(patient: Patient) -> tuple[list[Trial], float]:
    """The range test of --find_lr, and the rate that it suggests: a third of the one that learns the batch best."""
    found = list(trials(patient, [patient.config.lr * factor for factor in RANGE]))
    return found, min(found, key=lambda trial: trial.last).rate / 3


def trials(patient: Patient, rates: Sequence[float]) -> Iterator[Trial]:
    """Steps at each rate on the first row, or as much of it as there is time for."""
    started = time.perf_counter()
    with unchanged(patient):
        patient.nats(patient.part()).backward()
    once_s = time.perf_counter() - started
    steps = max(2, min(STEPS, int(TIME_S / once_s / len(rates))))
    for rate in rates:
        with unchanged(patient):
            yield Trial(rate, _losses(patient, rate, steps))


def _losses(patient: Patient, rate: float, steps: int) -> list[float]:
    config = patient.config
    optimizer = make_optimizer(patient.model, replace(config, lr=rate))
    parameters, batch, losses = list(trained(patient.model).values()), patient.part(), list[float]()
    for _ in range(steps):
        loss = patient.nats(batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return losses
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [*losses, float(patient.nats(batch).detach())]
