"""The checker checked: made-up traces whose verdict is known, and faults planted in the harness that these must notice.

    python -c "from parity.mutants.selftest import problems; print(problems())"      # []

`problems` compares a right candidate (which lacks one tensor that the others have) and candidates wrong in one place,
in either direction, with the verdict that each check owes them.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor

from parity.candidates.interface import Interface
from parity.checks import decoding, forward, identity, ops, verdict
from parity.contract import Case, Result, Status
from parity.measure.evidence import Evidence
from parity.measure.metrics import TapError
from parity.run import whole
from parity.trace import Trace, TraceWriter, by_part
from reference.protocol import tap_names, tap_part

T, WIDTH, VOCAB = 131, 8, 11
CONFIG = {"n_layers": 1, "norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "head_dim": 8}


# --- Made-up evidence ------------------------------------------------------------------------------------------------


def truth() -> dict[str, Tensor]:
    """The oracle's tensors of one sequence; the logits have clear winners."""
    generator = torch.Generator().manual_seed(0)
    width = {"logits": VOCAB}
    made = {t: torch.randn(T, width.get(t, WIDTH), generator=generator).double() for t in tap_names(1)}
    made["logits"][torch.arange(T), torch.arange(T) % VOCAB] += 9
    return made


def rounded(values: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What a correct implementation would have: errors of a rounding's size."""
    generator = torch.Generator().manual_seed(seed)
    noisy = {t: x * (1 + 1e-7 * torch.randn(x.shape, generator=generator).double()) for t, x in values.items()}
    return {t: x.float() for t, x in noisy.items()}


def write(folder: Path, values: dict[str, Tensor], **meta: Any) -> Trace:
    writer = TraceWriter(folder)
    for part, tensors in by_part({f"0/{t}": x for t, x in values.items()}):
        writer.part("fp32", part, tensors)
    table = torch.linspace(-1, 1, 8).view(2, 4)
    writer.rope(meta.pop("rope", table), table.clone())
    known = {"sequences": [list(range(T))], "prompt_lengths": [T - 2], "dtypes": {"fp32": "fp32"}, "config": CONFIG}
    known |= {"token_ids": [[1, 2, 3]], "dialog_ids": [[4, 5]], "weights": {"w": {"shape": [2], "crc32": 7}}}
    writer.finish(known | {"generated": {"fp32": [[T - 2, T - 1]]}, "self": {"fp32": {"rerun": 0.0}}} | meta)
    return Trace(folder)


def evidence(folder: Path, values: dict[str, Tensor], **meta: Any) -> Evidence:
    """A candidate of these values beside an oracle and a reference that are right."""
    right = truth()
    case = Case("-", ["fp32"], prompts=[list(range(T))], prompt_lengths=[T - 2], texts=["a"], dialogs=[[]])
    case = replace(case, rope_positions=[0, 1])
    oracle, reference = write(folder / "oracle", right), write(folder / "reference", rounded(right, 1))
    candidate = write(folder / "candidate", values, **meta)
    write(folder / "candidate" / "ops" / "meta", values)
    references = {"meta": reference}
    return Evidence(case, oracle, references, {None: candidate}, forced=references, ops={"meta": oracle})


def altered(tap: str, by: float) -> dict[str, Tensor]:
    """Right but for one element of one tap."""
    values = rounded(truth(), 2)
    values[tap][3, 2] += by
    return values


def without(values: dict[str, Tensor], tap: str) -> dict[str, Tensor]:
    return {t: x for t, x in values.items() if t != tap}


class Flickers:
    """A candidate whose second call differs from its first by `step`."""

    def __init__(self, step: float) -> None:
        self.step, self.calls = step, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return torch.full((*tokens.shape, VOCAB), self.step * (self.calls > 1))


# --- What each check owes --------------------------------------------------------------------------------------------


def wrong_candidates() -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    """(check that has to fail, values, trace.json entries)."""
    right = rounded(truth(), 2)
    for sign in (1.0, -1.0):
        yield "taps", altered("layers.0.gate", sign), {}
        yield "ops", altered("layers.0.gate", sign), {}
        yield "logits", altered("logits", sign), {}
        yield "kl", altered("logits", sign), {}
        yield "rope", right, {"rope": torch.linspace(-1, 1, 8).view(2, 4) + sign * torch.eye(2, 4)}
    swapped = right | {"layers.0.gate": right["layers.0.up"], "layers.0.up": right["layers.0.gate"]}
    yield "taps", swapped, {}
    yield "argmax", right | {"logits": -right["logits"]}, {}
    yield "taps", right | {"layers.0.q": torch.full((T, WIDTH), torch.nan)}, {}
    yield "tokens", right, {"token_ids": [[1, 2]]}
    yield "chat", right, {"dialog_ids": [[5, 4]]}
    yield "config", right, {"config": CONFIG | {"norm_eps": 1e-6}}
    yield "weights", right, {"weights": {"w": {"shape": [2], "crc32": 8}}}
    yield "greedy", right, {"generated": {"fp32": [[T - 2, 0]]}}
    yield "metamorphic", right, {"self": {"fp32": {"rerun": 1e-9}}}


CHECKED = (
    "tokens",
    "chat",
    "config",
    "weights",
    "rope",
    "ops",
    "taps",
    "logits",
    "kl",
    "argmax",
    "greedy",
    "metamorphic",
)


def problems() -> list[str]:
    """What the harness gets wrong on made-up evidence, one line each; empty when it is sound."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ev = evidence(folder / "right", without(rounded(truth(), 2), "layers.0.k"))
        found += [
            f"a right candidate fails {r.check}: {r.reason or r.where}"
            for r in verdict.run_checks(ev, CHECKED)
            if r.status in (Status.FAIL, Status.ERROR)
        ]
        for n, (check, values, meta) in enumerate(wrong_candidates()):
            results = verdict.run_checks(evidence(folder / str(n), values, **meta), [check])
            if not any(r.status is Status.FAIL for r in results):
                found.append(f"{check} passes a candidate that is wrong (number {n})")
        found += [f"a rerun that differs by {step} is not seen" for step in (1.0, -1.0) if not rerun(folder, step) > 0]
    return found + verdict_problems() + maximum_problems()


def rerun(folder: Path, step: float) -> float:
    case = Case("-", ["fp32"], prompts=[[1, 2, 3]], prompt_lengths=[3])
    writer, flickers = TraceWriter(folder / "rerun"), Interface(Flickers(step))
    run = whole.WholeRun(flickers, case, "fp32", writer, lambda stage, done: None)
    run._rerun([0])
    return run.out.same["rerun"]


def maximum_problems() -> list[str]:
    """The largest error is the largest in size, whatever its sign."""
    found = []
    for sign in (1.0, -1.0):
        error = TapError()
        error.add(0, torch.tensor([[0.0, sign * 2]]), torch.zeros(1, 2))
        if float(error.worst[0]) != 2 or error.largest != 2:
            found.append(f"an error of {sign * 2} counts as {error.largest}")
    return found


def verdict_problems() -> list[str]:
    """A check that could not run, and a run that compared nothing, are never a pass."""
    passed, skipped = Result("a", "G0", Status.PASS), Result("b", "G0", Status.SKIP, reason="no input")
    cases = {
        "a required check was skipped": ([passed, skipped], 1, "limited"),
        "nothing was compared": ([passed], 0, "limited"),
        "no check judged anything": ([Result("b", "G0", Status.SKIP, required=False, reason="no input")], 1, "limited"),
        "a check ended in an error": ([passed, Result("c", "G0", Status.ERROR)], 1, "fail"),
        "everything passed": ([passed], 1, "pass"),
    }
    return [
        f"{what}: the verdict is {verdict.decide(results, ['fp32'], n)[0]} and not {word}"
        for what, (results, n, word) in cases.items()
        if verdict.decide(results, ["fp32"], n)[0] != word
    ]


# --- Planted faults --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    number: str
    what: str
    plant: Callable[[], AbstractContextManager[Any]]


def noticed(fault: Fault) -> bool:
    with fault.plant():
        return bool(problems())


def by_order_in_file(self: Trace, dtype: str, sequence: int, tap: str) -> Tensor:
    """Tensors paired by their place among the names, which shifts where one side lacks a name."""
    part = "extra" if "@" in tap else tap_part(tap)
    wanted = sorted(t for t in tap_names(self.n_layers) if tap_part(t) == part).index(tap)
    with safe_open(self._file(dtype, part), "pt") as file:
        names = sorted(file.keys())
        return file.get_tensor(names[min(wanted, len(names) - 1)])


def always_true(value: float, bound: float, **fields: Any) -> Result:
    return Result(status=Status.PASS, value=value, bound=bound, **fields)


@contextmanager
def in_every_check(name: str, function: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (identity, forward, decoding, ops):
            stack.enter_context(patch.object(module, name, function))
        yield


def signed(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).max())


def skips_pass(results: Any, dtypes: Any, compared: int) -> tuple[str, str]:
    bad = any(r.status in (Status.FAIL, Status.ERROR) for r in results)
    return ("fail" if bad else "pass" if compared else "limited"), ""


FAULTS: tuple[Fault, ...] = (
    Fault("C1", "tensors compared by their order, not by name", lambda: patch.object(Trace, "get", by_order_in_file)),
    Fault("C2", "a comparison that is always true", lambda: in_every_check("judge", always_true)),
    Fault("C3", "a signed maximum", lambda: patch.object(whole, "largest", signed)),
    Fault("C4", "a skipped check counted as passed", lambda: patch.object(verdict, "decide", skips_pass)),
)
