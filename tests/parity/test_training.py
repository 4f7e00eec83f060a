"""G8: training is judged by the oracle's own; what is wrong in it is noticed, and named by its metric."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mutant_evidence import base, judge
from parity.candidates.nano.model import Nano
from parity.checks.training import gradient_floor, gradient_noise
from parity.contract import Status
from parity.run.training import padded, splits, training_case

Grads = dict[str, torch.Tensor]


def metrics(load: Any) -> dict[str, Status]:
    """Status of each metric of the check, the worst over references."""
    _, results = judge("train", load)
    found: dict[str, Status] = {}
    for r in (r for r in results if r.check == "training" and r.metric):
        assert r.metric is not None
        found[r.metric] = r.status if found.get(r.metric) is not Status.FAIL else Status.FAIL
    return found


def changed(change: Callable[[Grads], Grads]) -> Any:
    """nanollama whose gradients are changed before they are handed over."""

    class Changed(Nano):
        def loss_and_grads(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Grads]:
            loss, grads = super().loss_and_grads(tokens, targets)
            return loss, change(grads)

    return lambda checkpoint, dtype, device: Changed(checkpoint, dtype, device, "exact")


def test_nanollama_passes_every_metric() -> None:
    found = metrics(changed(lambda grads: grads))
    assert set(found.values()) == {Status.PASS}
    named = {
        "loss",
        "gradient",
        "document mask",
        "accumulation",
        "ten losses",
        "target mask",
        "optimizer step",
        "adapter merge",
    }
    assert named <= set(found)


def refusing(method: str, in_trainer: bool, unless: Callable[..., Any] | None = None) -> Any:
    """nanollama one of whose methods says that it cannot; `unless` raises where it cannot, else the method is run."""

    def refuse(*args: Any) -> Any:
        raise NotImplementedError("not today")

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
        nano = Nano(checkpoint, dtype, device, "exact")
        target: Any = nano.trainer() if in_trainer else nano
        true = getattr(target, method)
        run = refuse if unless is None else lambda *args: unless(*args) and true(*args)
        setattr(target, method, run)
        nano.trainer = lambda: target if in_trainer else Nano.trainer(nano)  # type: ignore[method-assign]
        return nano

    return load


def test_gradients_in_the_wrong_order_are_noticed() -> None:
    """C1: each of these shapes occurs twice, so only names tell them apart."""

    def swap(grads: Grads) -> Grads:
        w1, w3 = (f"layers.0.feed_forward.{w}.weight" for w in ("w1", "w3"))
        return grads | {w1: grads[w3], w3: grads[w1]}

    assert metrics(changed(swap))["gradient"] is Status.FAIL


@pytest.mark.parametrize(
    "change",
    [
        lambda grads: {n: g for n, g in grads.items() if n != "norm.weight"},
        lambda grads: grads | {"norm.weight": grads["norm.weight"][:-1]},
        lambda grads: grads | {"norm.weight": grads["norm.weight"] * float("nan")},
        lambda grads: grads | {"norm.weight": grads["norm.weight"] * (1 + 1e-4)},
    ],
    ids=["missing", "misshapen", "not a number", "slightly off"],
)
def test_a_wrong_gradient_fails(change: Callable[[Grads], Grads]) -> None:
    found = metrics(changed(change))
    assert found["gradient"] is Status.FAIL
    assert found["loss"] is Status.PASS


def test_a_bare_loss_and_grads_is_judged_by_loss_and_gradient_alone() -> None:
    class Bare:
        def __init__(self, nano: Nano) -> None:
            self.nano, self.loss_and_grads = nano, nano.loss_and_grads

        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.nano(tokens)

    found = metrics(lambda checkpoint, dtype, device: Bare(Nano(checkpoint, dtype, device, "exact")))
    assert {name for name, status in found.items() if status is Status.PASS} == {"loss", "gradient"}
    assert set(found.values()) == {Status.PASS, Status.SKIP}


@pytest.mark.parametrize(
    ("method", "metric"),
    [
        ("packed", "document mask"),
        ("accumulated", "accumulation"),
        ("labels", "target mask"),
        ("adamw", "optimizer step"),
        ("losses", "ten losses"),
        ("merged", "adapter merge"),
        ("distillation", "distillation"),
        ("adapters", "adapters"),
    ],
)
def test_what_a_trainer_says_it_cannot_do_is_not_covered(method: str, metric: str) -> None:
    """The other metrics are judged as before, and the reason is the candidate's own."""
    _, results = judge("train", refusing(method, in_trainer=True))
    found = {r.metric: r for r in results if r.check == "training"}
    assert found.pop(metric).reason == "not covered: not today"
    assert {r.status for r in found.values()} == {Status.PASS}


def test_a_candidate_that_says_it_cannot_train_is_not_covered() -> None:
    _, results = judge("train", refusing("loss_and_grads", in_trainer=False))
    (result,) = [r for r in results if r.check == "training"]
    assert (result.status, result.reason) == (Status.SKIP, "not covered: not today")


def test_an_accumulation_that_fits_some_micro_batches_alone_is_judged_in_those_and_said_to_lack_others() -> None:
    def first_alone(documents: list[Any]) -> Any:
        if len(documents) > 1:
            raise NotImplementedError("not today")
        return True

    _, results = judge("train", refusing("accumulated", in_trainer=True, unless=first_alone))
    found = [r for r in results if r.metric == "accumulation"]
    assert {r.status for r in found} == {Status.SKIP, Status.PASS}


def test_losses_of_ten_steps_agree_to_five_digits() -> None:
    ev, _ = judge("train", changed(lambda grads: grads))
    parties = [ev.oracle, *ev.references.values(), *ev.candidates.values()]
    losses = torch.tensor([trace.meta["training"]["losses"] for trace in parties], dtype=torch.float64)
    assert losses.shape[1] == 10
    assert float(((losses - losses[0]).abs() / losses[0]).max()) < 1e-5
    assert bool((losses[0, 1:] != losses[0, :-1]).all())


def test_the_references_pass_against_each_other() -> None:
    """The noise floor: each of the references as a candidate, with the other's error as noise."""
    from mutant_evidence import folder
    from parity.mutants import family

    ev = family.build("train", folder() / "both", dtypes=("fp32",))
    for of, against in (("meta", "hf"), ("hf", "meta")):
        found = gradient_noise(ev, of, against)
        assert found is not None and 0.2 < found[0] <= 3.0


def test_noise_of_training_is_the_larger_error_of_two_references_that_agree() -> None:
    exact, near, far, lost = torch.zeros(4), torch.full((4,), 1.0), torch.full((4,), 4.0), torch.full((4,), 40.0)
    assert gradient_floor([[near, near / 2]], exact) == 1.0
    assert gradient_floor([[near], [far]], exact) == gradient_floor([[far], [near]], exact) == 4.0
    assert gradient_floor([[near], [lost]], exact) == 1.0
    assert gradient_floor([[lost], [near]], exact) == 40.0


def test_documents_ignore_prompts_and_their_own_end() -> None:
    case = training_case(512)
    tokens, targets = padded(case["batches"][0])
    assert tokens.shape == targets.shape == (4, 23)
    lengths = [len(ids) for ids, _ in case["batches"][0]]
    assert int((targets != -100).sum()) == sum(lengths) - len(lengths) - 4
    parts = splits(case["batches"][0])
    assert all(sum(len(part) for part in split) == 4 for split in parts.values())
    assert case == training_case(512) != training_case(512, seed=1)


def test_the_oracles_forward_is_the_same_with_and_without_training(tmp_path: Path) -> None:
    from reference.oracle.run import run_case
    from reference.protocol import Case

    case = base("train").case
    plain = Case(case.checkpoint, dtypes=("fp32",), prompts=case.prompts)
    run_case(plain, tmp_path / "plain")
    run_case(replace(plain, training=training_case(512)), tmp_path / "trained")
    for part in (tmp_path / "plain").rglob("*.safetensors"):
        assert part.read_bytes() == (tmp_path / "trained" / part.relative_to(tmp_path / "plain")).read_bytes()
    assert (tmp_path / "trained" / "training.safetensors").is_file()
