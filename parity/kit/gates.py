"""From evidence to a kit: what the oracle computed, and of each gate the bound in absolute numbers.

A gate of parity.check divides an error by the reference's own; here that noise is written down, so that a port needs
no reference. A candidate has to pass against every reference: the smallest noise of them counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.checks.training import STEP, gradient_floor, loss_noise, step_floors, step_ulp
from parity.kit.arrays import Gate, KitWriter
from parity.machine import environment
from parity.measure.evidence import Evidence, Pair, groups_of
from parity.measure.metrics import Measured, noise_rms, percentile
from parity.measure.rope_table import allowed
from parity.measure.tolerances import BOUNDS, KL_FLOOR_NATS, KL_POSITIONS
from parity.report.summary import count_parameters, decided_fraction, noise_floor
from parity.run.training import DTYPE, FILE, MADE_STEPS, OBJECTIVES, STEPS_FILE, made_up_gradient, padded, read
from reference.protocol import tap_names

LONG_TOKENS = 256  # below, 16 bits hide a dropped RoPE scaling
KL: dict[str, Callable[[Tensor], float]] = {
    "mean": lambda kl: float(kl.mean()),
    "p99": lambda kl: percentile(kl, 0.99),
    "max": lambda kl: float(kl.max()),
}

G8 = (DTYPE, "training", "G8")


@dataclass(frozen=True)
class Floors:
    """What counts as rounding at one run dtype, a table for each reference."""

    ev: Evidence
    dtype: str

    @property
    def pairs(self) -> list[Pair]:
        return [Pair(name, self.dtype, None) for name in self.ev.references]

    def smallest(self, of: Callable[[Measured], float]) -> float:
        return min(of(self.ev.noise_floor(pair)) for pair in self.pairs)

    def decided(self) -> Tensor:
        """(N,) int32: 1 where any reference leaves one answer."""
        return torch.stack([self.decided_by(name) for name in self.ev.references]).any(0).int()

    def decided_by(self, reference: str) -> Tensor:
        pair, sequences = Pair(reference, self.dtype, None), range(len(self.ev.oracle.sequences))
        return torch.cat([self.ev.decided(pair, i) for i in sequences]).int()


def write_forward(ev: Evidence, writer: KitWriter) -> None:
    """Tokens, taps, logits, the oracle's tokens and the RoPE table, with their gates at every run dtype."""
    tokens = torch.tensor([token for sequence in ev.oracle.sequences for token in sequence])
    writer.add("tokens", "inputs.i32", tokens, "(N,) all sequences, one after another")
    folders = list(dict.fromkeys(ev.oracle.meta["dtypes"].values()))
    for dtype in folders:
        for tap in tap_names(ev.oracle.n_layers):
            exact = torch.cat([ev.oracle.get(dtype, i, tap) for i in range(len(ev.oracle.sequences))])
            writer.add(name_of(tap, dtype, ev), "expected.f64", exact, "the tap of that name" + _rounded(dtype, ev))
        best = torch.cat([rows.argmax for rows in ev.oracle_rows(dtype)])
        writer.add(name_of("best", dtype, ev), "inputs.i32", best, "the oracle's best token" + _rounded(dtype, ev))
    for dtype in ev.case.dtypes:
        floors = Floors(ev.be_lenient(), dtype)  # a port's RoPE table may be rounded otherwise
        meaning = f"1 where rounding in {dtype} cannot overturn the best token"
        writer.add(f"decided.{dtype}", "inputs.i32", floors.decided(), meaning)
        for tap in tap_names(ev.oracle.n_layers):
            writer.gates += tap_gates(floors, tap)
        writer.gates += logit_gates(floors)
    table, positions = ev.oracle.rope(), torch.tensor(ev.case.rope_positions)
    writer.add("rope.positions", "inputs.i32", positions, "positions of the rows of rope.cos and rope.sin")
    for name in ("cos", "sin"):
        writer.add(f"rope.{name}", "expected.f64", table[name], "(positions, head_dim/2) of the float32 angles")
        writer.gates += [gate for dtype in ev.case.dtypes for gate in rope_gates(ev, f"rope.{name}", dtype)]


def rope_gates(ev: Evidence, array: str, dtype: str) -> Iterator[Gate]:
    """G1, a gate a position: what float32 explains there, of the pair where it is most."""
    ulp = allowed(ev.oracle.meta["config"], ev.case.rope_positions).amax(1) * 2.0**-23
    for row, most in enumerate(ulp.tolist()):
        what = ("rope", "G1", "max", "max |difference|", BOUNDS["G1"].unit, row, 1, most)
        yield Gate(array, dtype, *what, BOUNDS["G1"].value)


def name_of(name: str, dtype: str, ev: Evidence) -> str:
    """The plain name for the first run dtype and those that share its weights, rounded alike; else DTYPE.name."""
    folders = ev.oracle.meta["dtypes"]
    return name if folders[dtype] == folders[ev.case.dtypes[0]] else f"{folders[dtype]}.{name}"


def _rounded(dtype: str, ev: Evidence) -> str:
    return "" if name_of("", dtype, ev) == "" else f", its weights rounded to {dtype} first"


def tap_gates(floors: Floors, tap: str) -> Iterator[Gate]:
    """G3 over all sequences together and over each long one alone."""
    ev, dtype = floors.ev, floors.dtype
    logits = tap == "logits"
    lengths = [len(s) for s in ev.oracle.sequences]
    for group in groups_of(ev.measured(ev.oracle, dtype).taps[tap]):
        first, rows = (0, sum(lengths)) if group is None else (sum(lengths[:group]), lengths[group])
        yield Gate(
            name_of(tap, dtype, ev), dtype, "logits" if logits else "taps", "G3", "rms", "rho", "x noise", first, rows,
            floors.smallest(lambda m, g=group: noise_rms(m.taps[tap], dtype, g)),  # type: ignore[misc]
            BOUNDS["G3.logits" if logits else "G3.taps"].value,
        )  # fmt: skip


def logit_gates(floors: Floors) -> Iterator[Gate]:
    """G5 on KL, where there are positions enough for its statistics, and G6 on the decided tokens."""
    ev, dtype = floors.ev, floors.dtype
    name, rows = name_of("logits", dtype, ev), sum(len(s) for s in ev.oracle.sequences)
    for key, statistic in KL.items() if rows >= KL_POSITIONS else ():
        of = lambda m, s=statistic: s(torch.cat([row.kl for row in m.rows])) + KL_FLOOR_NATS
        nats = floors.smallest(of)
        factor = BOUNDS[f"G5.{key}"].value
        yield Gate(name, dtype, "kl", "G5", f"kl_{key}", f"KL {key}", "x noise", 0, rows, nats, factor)
    if bool(floors.decided().any()):
        unit = "decided positions"
        yield Gate(name, dtype, "argmax", "G6", "tokens", "tokens that differ", unit, 0, rows, 1.0, BOUNDS["G6"].value)


def write_training(ev: Evidence, writer: KitWriter, weights: dict[str, Tensor]) -> None:
    """G8: the first batch's loss and gradients, ten losses, and AdamW from given gradients."""
    training, oracle = ev.case.training, ev.oracle
    if training is None:
        return
    batches = [padded(batch) for batch in training["batches"]]
    tokens, targets = (torch.stack([batch[part] for batch in batches]) for part in (0, 1))  # (10, B, T)
    writer.add("train.tokens", "inputs.i32", tokens, "(batches, documents, tokens): each document alone, then padding")
    writer.add("train.targets", "inputs.i32", targets, "the label of each token, -100: ignored")
    _write_losses(ev, writer)
    exact = read(oracle.folder / FILE, "grad/")
    theirs = [[read(r.folder / FILE, kind) for kind in ("grad/", "padded/")] for r in ev.references.values()]
    for name, gradient in exact.items():
        writer.add(f"grad.{name}", "expected.f64", gradient, "of the mean loss of batch 0, before any step")
        ways = [[grads[name] for grads in kinds] for kinds in theirs]
        floor = min(gradient_floor([own, *(w for w in ways if w is not own)], gradient) for own in ways)
        what = (*G8, "rms", "gradient", "x noise", 0, len(gradient))
        writer.gates.append(Gate(f"grad.{name}", *what, floor, BOUNDS["G8.grad"].value))
    _write_steps(writer, read(oracle.folder / STEPS_FILE, ""), weights)


def _write_losses(ev: Evidence, writer: KitWriter) -> None:
    exact = ev.oracle.meta["training"]["losses"]
    floors = [loss_noise(ev, reference) for reference in ev.references.values()]
    steps = zip(*(step_floors(r.meta["training"]["losses"], exact, floor) for r, floor in
                  zip(ev.references.values(), floors, strict=True)), strict=True)  # fmt: skip
    grad = BOUNDS["G8.grad"].value
    meaning = "mean -log p of the labels that are not ignored, nats"
    writer.add("train.loss", "expected.f64", torch.tensor(exact[:1], dtype=torch.float64), f"{meaning}: batch 0")
    writer.gates.append(Gate("train.loss", *G8, "max", "loss", "x noise", 0, 1, min(floors), grad))
    meaning += ": each batch in turn, before its AdamW step from its own gradients"
    writer.add("train.losses", "expected.f64", torch.tensor(exact, dtype=torch.float64), meaning)
    for row, floor in enumerate(min(found) for found in steps):
        writer.gates.append(Gate("train.losses", *G8, "max", "ten losses", "x noise", row, 1, floor, grad))


def _write_steps(writer: KitWriter, steps: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """steps: {"N/NAME": weights after N AdamW steps}; the gradients are made up, so that every port has the same."""
    for key, exact in sorted(steps.items()):
        step, name = key.split("/", 1)
        gradient = made_up_gradient(weights[name], int(step) - 1)
        writer.add(f"adamw.grad.{step}.{name}", "inputs.f32", gradient, f"made-up gradient of step {step}")
        writer.add(f"adamw.{step}.{name}", "expected.f64", exact, f"the weight after step {step} of {MADE_STEPS}")
        what = (*G8, "relative", "optimizer step", BOUNDS["G8.step"].unit, 0, len(exact))
        writer.gates.append(Gate(f"adamw.{step}.{name}", *what, step_ulp(int(step)), STEP))


def table_of(ev: Evidence, notices: list[str]) -> dict[str, Any]:
    """kit.json but for its arrays and gates: what a port needs to know first, and where the numbers come from."""
    lengths = [len(tokens) for tokens in ev.oracle.sequences]
    hyper = {k: v for k, v in (ev.case.training or {}).items() if k not in ("batches", *OBJECTIVES)}
    short = f"the longest sequence has {max(lengths)} tokens: in 16 bits a wrong RoPE scaling hides below {LONG_TOKENS}"
    return {
        "config": ev.oracle.meta["config"],
        "sequences": lengths,
        "dtypes": ev.case.dtypes,
        "training": hyper or None,
        "checkpoint": {"parameters": count_parameters(ev.oracle.meta["config"])},
        "references": list(ev.references),
        "environment": environment(ev.case.threads, ev.case.device),
        "errata": [e for trace in ev.references.values() for e in trace.meta.get("errata", [])],
        "notices": notices + ([short] if max(lengths) < LONG_TOKENS else []),
        "noise_floor": [floor.as_json() for floor in noise_floor(ev)],
        "decided_fraction": decided_fraction(ev),
        "float32_share": float32_share(Floors(ev, ev.case.dtypes[0])),
    }


def float32_share(floors: Floors) -> tuple[float, str]:
    """What rounding the oracle's numbers to float32 would cost: the largest share of a tap's noise, and that tap."""
    oracle, found = floors.ev.oracle, list[tuple[float, str]]()
    for tap in tap_names(oracle.n_layers)[1:]:  # the first one, the embedding, is float32 numbers
        exact = torch.cat([oracle.get(floors.dtype, i, tap).flatten() for i in range(len(oracle.sequences))])
        error = float((exact.float().double() - exact).square().mean().sqrt())
        floor = floors.smallest(lambda m, t=tap: noise_rms(m.taps[t], floors.dtype))  # type: ignore[misc]
        found.append((error / floor, tap))
    return max(found)
