"""The distributed part of the kill matrix: mistakes of training over several processes, on two gloo ranks.

    python -m parity.mutants --only D1,D14

What is judged is finetune's own loop over copies (DDP), shards (FSDP2) or parts of layers (TP), against the same loop
in one process: every mutant by the first of CHECKS that fails. The floor of the gradients is what one process itself
makes of another order of sums: whole batches for micro-batches, and features, heads and hidden units turned round.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from parity.contract import UNIT
from parity.measure.tolerances import BOUNDS, STEP_DIGITS
from parity.mutants.edits.ranks.work import Job, Measured, Ranks, train_alone

# In the order of diagnosis: what a step is made of, then what follows from it.
CHECKS = {
    "labels": "their number in each step",
    "loss": "of the first step",
    "gradients": "of the first step, each parameter's",
    "norm": "of the first step's gradients together",
    "steps": "the losses of four steps",
    "resumed": "the losses behind a save and a resume",
}
LOSS_BOUND = 10.0**-STEP_DIGITS
DROPOUT = 0.1


@dataclass(frozen=True)
class RankMutant:
    """One way of training wrongly over ranks."""

    number: str
    what: str
    job: Job
    killed_by: str  # of CHECKS


@dataclass(frozen=True)
class RankVariant:
    """One way of training rightly over ranks."""

    what: str
    job: Job


def _copies(number: str, what: str, edit: str, killed_by: str) -> RankMutant:
    return RankMutant(number, what, Job(dp=2, edit=edit), killed_by)


def _shards(number: str, what: str, edit: str, killed_by: str) -> RankMutant:
    return RankMutant(number, what, Job(fsdp=2, edit=edit), killed_by)


def _parts(number: str, what: str, edit: str, killed_by: str, **more: Any) -> RankMutant:
    return RankMutant(number, what, Job(tp=2, edit=edit, **more), killed_by)


MUTANTS = (
    _copies("D1", "gradients of copies averaged where they are summed", "averaged-copies", "gradients"),
    _shards("D2", "gradients of shards averaged where they are summed", "averaged-shards", "gradients"),
    _copies("D3", "gradients stay on their rank", "kept-gradients", "gradients"),
    _copies("D4", "gradients summed behind the first micro-batch alone", "first-micro-batch-synced", "gradients"),
    _copies("D5", "norms' gradients not reduced", "norms-not-reduced", "gradients"),
    _shards("D6", "gradients reduced in bf16", "reduced-in-bf16", "gradients"),
    _shards("D7", "clipped by the norm of a rank's own shards", "clipped-by-own-norm", "norm"),
    _copies("D8", "every rank reads the same documents", "same-documents", "labels"),
    _shards("D9", "labels counted per rank", "labels-counted-per-rank", "labels"),
    _copies("D10", "the loss shown is one rank's", "loss-of-one-rank", "loss"),
    _shards("D11", "the data order goes on by one rank's rows", "cursor-of-one-rank", "labels"),
    _shards("D12", "every rank draws weights of its own and keeps its shard", "other-weights-on-each-rank", "loss"),
    _shards("D13", "a forward pass on weights gathered before the update", "stale-gather", "steps"),
    _shards("D14", "optimizer states resharded transposed", "transposed-states", "resumed"),
    _shards("D15", "optimizer states resharded to the wrong ranks", "exchanged-states", "resumed"),
    _copies("D16", "AdamW's step count lost by a resume", "forgotten-step-count", "resumed"),
    _parts("D17", "no sum over ranks behind wo", "unsummed-wo", "loss"),
    _parts("D18", "no sum over ranks behind w2", "unsummed-w2", "loss"),
    _parts("D19", "a vocabulary shard's offset off by one in the embedding", "embedding-offset", "loss"),
    _parts("D20", "a vocabulary shard's offset off by one in the loss", "loss-offset", "loss"),
    _parts("D21", "the loss's denominator counts a rank's own vocabulary", "softmax-of-own-rows", "loss"),
    _parts("D22", "hidden gradients not summed over the vocabulary", "hidden-gradients-of-own-rows", "gradients"),
    _parts("D23", "q and kv heads of a group on different ranks", "heads-apart", "loss"),
    _parts("D24", "other dropout on each rank", "other-dropout-on-each-rank", "loss", dropout=DROPOUT),
)
VARIANTS = (
    RankVariant("two copies", Job(dp=2)),
    RankVariant("two shards", Job(fsdp=2)),
    RankVariant("two copies, buckets of 1 KB", Job(dp=2, edit="small-buckets")),
    RankVariant("two copies, taking turns in the other order", Job(dp=2, edit="other-turns")),
    RankVariant("two copies, micro-batches of two rows", Job(dp=2, rows=2)),
    RankVariant("two shards, blocks kept gathered for the backward pass", Job(fsdp=2, edit="kept-gathered")),
    RankVariant("two shards, the whole model one unit", Job(fsdp=2, edit="one-unit")),
    RankVariant("two shards, taking turns in the other order", Job(fsdp=2, edit="other-turns")),
    RankVariant("layers in two parts", Job(tp=2)),
    RankVariant("layers in two parts, micro-batches of two rows", Job(tp=2, rows=2)),
    RankVariant("layers in two parts, with dropout", Job(tp=2, dropout=DROPOUT)),
)


@dataclass(frozen=True)
class Truth:
    """One process, and how far it departs from itself when it sums in another order."""

    right: Measured
    with_dropout: Measured
    floors: dict[str, float]  # of each gradient, relative to its size


def make_truth() -> Truth:
    right, floors = train_alone(Job()), dict[str, float]()
    for other in (train_alone(Job(rows=4)), train_alone(Job(turned=True))):
        for name, gradient in right.gradients.items():
            departs = _rms(other.gradients[name] - gradient) / _rms(gradient)
            floors[name] = max(floors.get(name, UNIT["fp32"] / 2), departs)
    return Truth(right, train_alone(Job(dropout=DROPOUT)), floors)


def judge(truth: Truth, job: Job, found: Measured) -> dict[str, float]:
    """Each of CHECKS -> the measured difference in % of its bound."""
    right = truth.with_dropout if job.dropout else truth.right
    return {
        "labels": 0.0 if found.labels == right.labels else 1e9,
        "loss": _losses(found.losses[:1], right.losses[:1]),
        "gradients": max(_gradients(truth.floors, found, right)),
        "norm": _losses(found.norms[:1], right.norms[:1]),
        "steps": _losses(found.losses, right.losses),
        "resumed": _losses(found.resumed, right.resumed),
    }


def _losses(found: list[float], right: list[float]) -> float:
    """Relative, beside 1e-5; a missing step is beyond any bound."""
    if len(found) != len(right):
        return 1e9
    return max(100 * abs(a - b) / (LOSS_BOUND * abs(b)) for a, b in zip(found, right, strict=True))


def _gradients(floors: dict[str, float], found: Measured, right: Measured) -> Iterator[float]:
    """G8.grad, with one process as the truth and one that sums in another order as the reference."""
    for name, gradient in right.gradients.items():
        mine = found.gradients.get(name)
        if mine is None or mine.shape != gradient.shape:
            yield 1e9
            continue
        yield 100 * _rms(mine - gradient) / (_rms(gradient) * floors[name]) / BOUNDS["G8.grad"].value


def _rms(x: Any) -> float:
    return float(x.double().pow(2).mean().sqrt())


def killer(percent: dict[str, float]) -> str | None:
    """The first check that fails; nan fails."""
    return next((name for name in CHECKS if not percent[name] <= 100), None)


def evaluate(mutants: list[RankMutant], variants: list[RankVariant], progress: bool) -> dict[str, Any]:
    """The distributed part of the matrix, JSON-ready."""
    if not mutants and not variants:
        return {"mutants": [], "benign": []}
    truth, ranks = make_truth(), Ranks(2)
    try:
        entries = [*mutants, *variants]
        bar = tqdm(entries, disable=not progress, leave=False, desc="training over two ranks")
        found = [judge(truth, entry.job, ranks.run(entry.job)) for entry in bar]
    finally:
        ranks.close()
    return {
        "mutants": [_describe(m, percent) for m, percent in zip(mutants, found, strict=False)],
        "benign": [
            {"what": v.what, "alarm": killer(percent), "worst_percent_of_bound": max(percent.values())}
            for v, percent in zip(variants, found[len(mutants) :], strict=True)
        ],
    }


def is_clean(report: dict[str, Any]) -> bool:
    """Whether every mutant was killed by the check named for it, and no variant by any."""
    killed = all(m["killed_by"] == m["expected_check"] for m in report["mutants"])
    return killed and not any(v["alarm"] for v in report["benign"])


def _describe(mutant: RankMutant, percent: dict[str, float]) -> dict[str, Any]:
    job, first = mutant.job, killer(percent)
    mesh = " ".join(
        f"--{name} {size}" for name, size in (("dp", job.dp), ("fsdp", job.fsdp), ("tp", job.tp)) if size > 1
    )
    failed = [name for name in CHECKS if not percent[name] <= 100]
    return {
        "number": mutant.number,
        "what": mutant.what,
        "mesh": mesh,
        "killed_by": first,
        "expected_check": mutant.killed_by,
        "failed": failed,
        "percent_of_bound": percent,
    }
