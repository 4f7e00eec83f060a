"""G8: training. Loss, gradients, masks, accumulation and optimizer steps against the float64 oracle's own training.

Each is one metric of the check `training`; a candidate is judged in as many as its interface makes possible.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.candidates.interface import lacking
from parity.contract import UNIT, Result, Status, judge
from parity.measure.evidence import Evidence, Pair
from parity.measure.metrics import ratio
from parity.measure.tolerances import AGREE, BOUNDS, STEP_DIGITS
from parity.run.training import (
    DTYPE,
    FILE,
    IGNORED,
    MADE_STEPS,
    OBJECTIVE_FILE,
    OBJECTIVES,
    STEPS_FILE,
    read,
    splits,
)
from parity.trace import Trace

U = UNIT[DTYPE]
WAYS = ("grad", "padded", "beside")  # in which a reference takes the same gradients, each with a rounding of its own
GRAD, STEP = BOUNDS["G8.grad"].value, BOUNDS["G8.step"].value


def training(ev: Evidence) -> Iterator[Result]:
    """G8: loss, gradients, masks, accumulation and AdamW steps against the oracle's training in float64."""
    if ev.case.training is None:
        yield Result("training", "G8", Status.SKIP, required=False, reason=f"not covered: {ev.untrained}")
        return
    for path, trace in ev.candidates.items():
        mine = trace.meta.get("training")
        if "loss" not in (mine or {}):
            known = (mine or {}).get("uncovered", {})
            reason = f"not covered: {known.get('loss_and_grads', lacking(trace.meta, 'loss_and_grads'))}"
            yield Result("training", "G8", Status.SKIP, required=False, path=path, reason=reason)
            continue
        yield from _alone(ev, trace, {"path": path, "dtype": DTYPE})
        for name, reference in ev.references.items():
            yield from _against(ev, trace, reference, {"reference": name, "path": path, "dtype": DTYPE})


def _fields(metric: str, unit: str = "x noise") -> dict[str, Any]:
    return {"check": "training", "gate": "G8", "metric": metric, "unit": unit}


def _uncovered(metric: str, method: str, mine: dict[str, Any], labels: dict[str, Any]) -> Result:
    """What the candidate's trainer lacks, or said that it cannot do."""
    cannot = mine["uncovered"].get(method, f"the candidate's trainer() has no {method}()")
    reason = f"not covered: {cannot}"
    return Result(**_fields(metric), status=Status.SKIP, required=False, reason=reason, **labels)


def _against(ev: Evidence, trace: Trace, reference: Trace, labels: dict[str, Any]) -> Iterator[Result]:
    """Everything whose noise is the reference's own error."""
    mine, oracle, theirs = trace.meta["training"], ev.oracle.meta["training"], reference.meta["training"]
    floor = loss_noise(ev, reference)
    yield _loss("loss", mine["loss"], oracle["losses"][0], floor, labels)
    yield _gradients("gradient", "grad/", ev, trace, reference, labels)
    for metric, kinds in (("document mask", ["packed"]), ("accumulation", list(splits([])))):
        present = [kind for kind in kinds if kind in mine["by"]]
        if len(present) < len(kinds):
            yield _uncovered(metric, "packed" if metric == "document mask" else "accumulated", mine, labels)
        results = [_loss(metric, mine["by"][kind], oracle["losses"][0], floor, labels) for kind in present]
        results += [_gradients(metric, f"{kind}/", ev, trace, reference, labels, kind) for kind in present]
        yield from sorted(results, key=lambda r: r.value if r.value == r.value and r.value is not None else torch.inf)[
            -1:
        ]
    yield _merged(ev, trace, labels)
    for objective in OBJECTIVES:
        yield _objective(objective, ev, trace, reference, floor, labels)
    if "losses" in mine:
        yield _ten_losses(mine["losses"], oracle["losses"], theirs["losses"], floor, labels)
    else:
        yield _uncovered("ten losses", "losses", mine, labels)


def _objective(name: str, ev: Evidence, trace: Trace, reference: Trace, floor: float, labels: dict[str, Any]) -> Result:
    """The worst of loss and gradients over the kinds of losses on pairs, of following a teacher, of adapters."""
    assert ev.case.training is not None
    mine, asked, file = trace.meta["training"], ev.case.training[name], OBJECTIVE_FILE.format(name)
    if len(mine[name]) < len(asked["kinds"]):
        return _uncovered(name, name, mine, labels)
    results = []
    for kind in asked["kinds"]:
        exact = ev.oracle.meta["training"][name][kind]
        results.append(_loss(name, mine[name][kind], exact, floor * _noise_share(name, asked), labels))
        own = read(trace.folder / FILE, f"{name}/{kind}/")
        true = read(ev.oracle.folder / file, f"{kind}/grad/")
        theirs = [
            [found for way in WAYS if (found := read(one.folder / file, f"{kind}/{way}/"))]
            for one in own_first(ev, reference)
        ]
        results.append(_worst_gradient(name, own, true, theirs, kind, labels))
    return max(results, key=lambda r: r.value if r.value is not None and r.value == r.value else torch.inf)


def _noise_share(name: str, asked: dict[str, Any]) -> float:
    """How far a loss may be off, in errors of a label's nats."""
    if name == "preferences":
        # dpo adds up beta times the error of every label of a pair, by the model and by the reference.
        count = sum(label >= 0 for pair in asked["pairs"] for _, ids in pair for label in ids) / len(asked["pairs"])
        return max(1.0, asked["beta"] * (2 * count) ** 0.5)
    if name == "distillation":
        # T^2 times the difference of two logs, each of logits over T: by the teacher and by the student.
        return max(1.0, asked["mix"] * asked["temperature"] * 2**0.5)
    return 1.0


def own_first(ev: Evidence, reference: Trace) -> list[Trace]:
    """The references that did train, this one first."""
    return [reference, *(t for t in ev.references.values() if t is not reference and t.meta.get("training"))]


def loss_noise(ev: Evidence, reference: Trace) -> float:
    """What a mean of labels may be off by: the RMS error of a reference's labels, at least half a rounding."""
    exact = _nats(ev.oracle)
    errors = [_rms(_nats(trace) - exact) for trace in own_first(ev, reference)]
    return max(largest_that_agrees(errors), U * _rms(exact) / 2)


def _nats(trace: Trace) -> Tensor:
    return read(trace.folder / FILE, "nats")[""].double()


def largest_that_agrees(errors: Sequence[float]) -> float:
    """Of a reference's error, which comes first, and the others': as everywhere, those within AGREE of it count, since
    one error is one throw."""
    own, *others = errors
    return max([own, *(e for e in others if e <= AGREE * own and own <= AGREE * e)])


def _loss(metric: str, mine: float, exact: float, floor: float, labels: dict[str, Any]) -> Result:
    where = f"loss {mine:.8f} for {exact:.8f}"
    return judge(ratio(abs(mine - exact), floor), GRAD, where=where, **_fields(metric), **labels)


def _gradients(
    metric: str, prefix: str, ev: Evidence, trace: Trace, reference: Trace, labels: dict[str, Any], kind: str = ""
) -> Result:
    """The worst parameter's error ratio."""
    mine, exact = read(trace.folder / FILE, prefix), read(ev.oracle.folder / FILE, "grad/")
    theirs = [[read(trace.folder / FILE, k) for k in ("grad/", "padded/")] for trace in own_first(ev, reference)]
    return _worst_gradient(metric, mine, exact, theirs, kind, labels)


def _worst_gradient(
    metric: str,
    mine: dict[str, Tensor],
    exact: dict[str, Tensor],
    theirs: list[list[dict[str, Tensor]]],
    kind: str,
    labels: dict[str, Any],
) -> Result:
    """theirs: by reference, the pair's own first, its gradients in two ways."""
    if absent := sorted(exact.keys() - mine.keys()):
        reason = f"the gradient of {absent[0]} is missing ({len(absent)} in all)"
        return Result(**_fields(metric), status=Status.FAIL, reason=reason, **labels)
    if wrong := [n for n in exact if mine[n].shape != exact[n].shape]:
        reason = f"{wrong[0]} has a gradient of shape {tuple(mine[wrong[0]].shape)} for {tuple(exact[wrong[0]].shape)}"
        return Result(**_fields(metric), status=Status.FAIL, reason=reason, **labels)
    ratios = {n: _rho(mine[n], [[grads[n] for grads in ways] for ways in theirs], exact[n]) for n in exact}
    worst = max(ratios, key=lambda n: torch.inf if ratios[n] != ratios[n] else ratios[n])
    where = f"{worst} {kind}".strip()
    return judge(ratios[worst], GRAD, where=where, **_fields(metric), **labels)


def gradient_noise(ev: Evidence, of: str, against: str) -> tuple[float, str] | None:
    """One reference's gradients judged by the other's error: the worst ratio and its parameter."""
    if ev.case.training is None:
        return None
    mine, theirs, exact = (
        read(t.folder / FILE, "grad/") for t in (ev.references[of], ev.references[against], ev.oracle)
    )
    return max((_rho(mine[n], [[theirs[n]]], exact[n]), n) for n in exact)


def _rho(mine: Tensor, theirs: list[list[Tensor]], exact: Tensor) -> float:
    return ratio(_rms(mine.double() - exact.double()), gradient_floor(theirs, exact))


def gradient_floor(theirs: list[list[Tensor]], exact: Tensor) -> float:
    """theirs: each reference's gradient, document by document and in one batch: the larger error is its noise."""
    errors = [max(_rms(way.double() - exact.double()) for way in ways) for ways in theirs]
    return max(largest_that_agrees(errors), U * _rms(exact.double()) / 2)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _merged(ev: Evidence, trace: Trace, labels: dict[str, Any]) -> Result:
    """Logits with an adapter merged into the weights against those with it beside them: two roundings of one sum."""
    found = read(trace.folder / FILE, "merged/")
    if not found:
        return _uncovered("adapter merge", "merged", trace.meta["training"], labels)
    difference = float((found["in"].double() - found["beside"].double()).square().mean().sqrt())
    pair = Pair(labels["reference"], DTYPE, labels["path"])
    floor = ev.noise_at(pair, {0: list(range(len(ev.oracle.sequences[0])))})
    return judge(ratio(difference, floor), BOUNDS["G4"].value, **_fields("adapter merge"), **labels)


def _ten_losses(
    mine: list[float], exact: list[float], theirs: list[float], floor: float, labels: dict[str, Any]
) -> Result:
    if len(mine) != len(exact):
        reason = f"{len(mine)} losses for {len(exact)} batches"
        return Result(**_fields("ten losses"), status=Status.FAIL, reason=reason, **labels)
    off = [abs(a - b) for a, b in zip(mine, exact, strict=True)]
    ratios = [ratio(d, f) for d, f in zip(off, step_floors(theirs, exact, floor), strict=True)]
    worst = max(range(len(ratios)), key=lambda n: torch.inf if ratios[n] != ratios[n] else ratios[n])
    where = f"step {worst + 1}: {mine[worst]:.6f} for {exact[worst]:.6f}"
    return judge(ratios[worst], GRAD, where=where, **_fields("ten losses"), **labels)


def step_floors(theirs: list[float], exact: list[float], floor: float) -> list[float]:
    """Steps repeat every rounding of those before: noise is the reference's largest departure, or the last digit."""
    allowed = max([floor, *(abs(a - b) for a, b in zip(theirs, exact, strict=True))])
    return [max(allowed, 10.0**-STEP_DIGITS * o / GRAD) for o in exact]


def _alone(ev: Evidence, trace: Trace, labels: dict[str, Any]) -> Iterator[Result]:
    """What needs no reference: labels are ids, and optimizer steps start from identical gradients."""
    assert ev.case.training is not None
    mine = trace.meta["training"]
    if "labels" in mine:
        yield _target_mask(mine["labels"], [tokens for tokens, _ in ev.case.training["batches"][0]], labels)
    else:
        yield _uncovered("target mask", "labels", mine, labels)
    steps = read(trace.folder / FILE, "adamw/")
    if steps:
        yield _optimizer_step(steps, read(ev.oracle.folder / STEPS_FILE, ""), ev.case.training["lr"], labels)
    else:
        yield _uncovered("optimizer step", "adamw", mine, labels)


def _target_mask(made: list[list[int]], documents: list[list[int]], labels: dict[str, Any]) -> Result:
    """Every token but the first is a label of its own document, the end included; the last one has none."""
    wanted = [[*ids[1:], IGNORED] for ids in documents]
    flat = [(d, i, a, b) for d, (x, y) in enumerate(zip(made, wanted, strict=False)) for i, (a, b) in
            enumerate(zip(x, y, strict=False)) if a != b]  # fmt: skip
    wrong = len(flat) + sum(abs(len(x) - len(y)) for x, y in zip(made, wanted, strict=False))
    wrong += abs(len(made) - len(wanted))
    where = "document {}, token {}: label {} for {}".format(*flat[0]) if flat else None
    return judge(wrong, 0, where=where, **_fields("target mask", "labels"), **labels)


def _optimizer_step(mine: dict[str, Tensor], exact: dict[str, Tensor], lr: float, labels: dict[str, Any]) -> Result:
    """The largest error in ulp of max(|p|, lr), a step."""
    if absent := sorted(exact.keys() - mine.keys()):
        reason = f"{absent[0]} is missing (step/weight)"
        return Result(**_fields("optimizer step"), status=Status.FAIL, reason=reason, **labels)
    if wrong := [n for n in exact if mine[n].shape != exact[n].shape]:
        reason = f"{wrong[0]} has shape {tuple(mine[wrong[0]].shape)} for {tuple(exact[wrong[0]].shape)} (step/weight)"
        return Result(**_fields("optimizer step"), status=Status.FAIL, reason=reason, **labels)
    ulp = {n: step_ulp(int(n.split("/")[0])) * exact[n].abs().clamp_min(lr) for n in exact}
    errors = {n: float(((mine[n].double() - exact[n]).abs() / ulp[n]).max()) for n in exact}
    worst = max(errors, key=lambda n: torch.inf if errors[n] != errors[n] else errors[n])
    where = f"{worst.split('/', 1)[1]}, step {worst.split('/')[0]} of {MADE_STEPS}"
    return judge(errors[worst], STEP, where=where, **_fields("optimizer step", "ulp of max(|p|, lr)"), **labels)


def step_ulp(step: int) -> float:
    """An ulp of 1.0 for every step so far: the second one starts from the first one's rounding."""
    return 2 * U * step
