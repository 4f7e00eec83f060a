"""A port judged by a kit: its NAME.f32 files against the kit's gates, as a report of schema nanollama.parity/1."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from parity.checks.verdict import decide
from parity.contract import Result, Status, UsageError, judge
from parity.explain.causes import View, probable_cause
from parity.explain.localise import ABOUT
from parity.kit.arrays import Gate, Kit, read
from parity.kit.causes import cause
from parity.kit.gates import KL
from parity.kit.misread import layout
from parity.machine import Clock, own_anonymous_bytes
from parity.measure.metrics import TapError, logit_rows, oracle_rows, ratio
from parity.measure.tolerances import KL_POSITIONS
from parity.report.model import CheckpointEntry, Divergence, NoiseFloor, Report, Tokens
from reference.protocol import tap_names

THE_KIT = "the kit"
OTHER_ENDINGS = (".npy", ".txt", ".csv", ".bin", ".f64", ".f16", ".bf16", ".json")  # of arrays that would not be read
GATES = {"taps": "G3", "logits": "G3", "rope": "G1", "training": "G8"}  # of results that are about a whole array


@dataclass(frozen=True)
class Side:
    """The kit's values or the port's, read sequence by sequence as a trace is."""

    meta: dict[str, Any]
    starts: list[int]
    arrays: Callable[[str], Tensor | None]

    @property
    def sequences(self) -> list[list[int]]:
        tokens = self.arrays("tokens")
        assert tokens is not None
        return [tokens[a:b].tolist() for a, b in zip(self.starts, self.starts[1:], strict=False)]

    def has(self, dtype: str, sequence: int, tap: str) -> bool:
        return self.arrays(tap) is not None

    def get(self, dtype: str, sequence: int, tap: str) -> Tensor:
        found = self.arrays(tap)
        assert found is not None
        return found[self.starts[sequence] : self.starts[sequence + 1]]


@dataclass(frozen=True)
class Port:
    """One folder of NAME.f32 files, computed in one run dtype. Raises UsageError for a file that is no array's."""

    kit: Kit
    folder: Path
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in self.kit.table["dtypes"]:
            known = ", ".join(self.kit.table["dtypes"])
            raise UsageError(f"--dtype {self.dtype}: the kit has bounds for {known}; make one with --dtype")
        for path in sorted(self.folder.iterdir()):
            if path.suffix in OTHER_ENDINGS and path.stem in self.gates:
                raise UsageError(f"{path}: write it as raw little-endian float32, {path.stem}.f32")
            if path.suffix != ".f32":
                continue
            name = path.name.removesuffix(".f32")
            if name not in self.gates:
                near = difflib.get_close_matches(name, self.gates, n=1)
                hint = f"; did you mean {near[0]}.f32?" if near else ""
                raise UsageError(f"{path}: the kit expects no array of that name in {self.dtype}{hint}")

    @cached_property
    def gates(self) -> dict[str, list[Gate]]:
        """By array, in order of computation; training is judged in fp32 alone."""
        found: dict[str, list[Gate]] = {}
        for gate in self.kit.gates:
            if gate.dtype == self.dtype:
                found.setdefault(gate.array, []).append(gate)
        return found

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.f32"

    def broken(self, name: str) -> str | None:
        """Why a file that is there cannot be compared."""
        shape = self.kit.arrays[name].shape
        size, wanted = self.path(name).stat().st_size, 4 * prod(shape)
        if size == wanted:
            return None
        why = self.layout(name)
        return f"{size} bytes for {wanted}: float32, shape {shape}" + (f"; {why}" if why else "")

    def layout(self, name: str) -> str | None:
        """How the file holds the expected numbers otherwise than it should, if it does."""
        exact, lengths = self.kit.get(name), self.kit.table["sequences"]
        return layout(self.path(name), exact, lengths if len(exact) == sum(lengths) else [])

    def get(self, name: str) -> Tensor:
        return read(self.path(name), "f32", self.kit.arrays[name].shape)

    def name(self, plain: str) -> str:
        """The array that holds a tap, or `best`, at this run dtype."""
        own = f"{self.dtype}.{plain}"
        return own if own in self.kit.arrays else plain


def report(
    kit: Kit,
    folder: Path,
    dtype: str,
    candidate: str | None = None,
    said: Sequence[Result] = (),
    notices: Sequence[str] = (),
) -> Report:
    """The whole judgement. `said`, `notices`: of a candidate that wrote the files, what went wrong while it did and
    what it remarks."""
    clock, port, table = Clock(), Port(kit, folder, dtype), kit.table
    results, compared = apply_gates(port)
    results = [*said, *results]
    word, why = decide(results, [dtype], compared)
    lengths = table["sequences"]
    return Report(
        verdict=word,
        why=why,
        candidate=candidate or str(folder),
        references=table["references"],
        checkpoint=CheckpointEntry(**table["checkpoint"], config=table["config"]),
        environment=table["environment"],
        results=results,
        tokens=Tokens(len(lengths), sum(lengths), max(lengths), {dtype: table["decided_fraction"][dtype]}),
        first_divergence=first_divergence(port) if word == "fail" else None,
        errata=table["errata"],
        notices=[*table["notices"], *notices],
        noise_floor=[NoiseFloor.of_json(n) for n in table["noise_floor"] if n["dtype"] == dtype],
        seconds=round(clock(), 3),
        peak_anonymous_bytes=own_anonymous_bytes(),
    )


def apply_gates(port: Port) -> tuple[list[Result], int]:
    """Results, and how many arrays were compared."""
    results, absent, compared = list[Result](), dict[str, list[str]](), 0
    for name, gates in port.gates.items():
        check = gates[0].check
        if not port.path(name).is_file():
            absent.setdefault(check, []).append(name)
        elif why := port.broken(name):
            results.append(Result(check, GATES[check], Status.FAIL, dtype=port.dtype, where=name, reason=why))
        else:
            compared += 1
            mine, exact = port.get(name), port.kit.get(name)
            results += [worst([apply_gate(port, gate, mine, exact) for gate in gates if gate.metric == metric])
                        for metric in dict.fromkeys(gate.metric for gate in gates)]  # fmt: skip
    return [*results, *uncovered(port, absent)], compared


def uncovered(port: Port, absent: dict[str, list[str]]) -> Iterator[Result]:
    """What the port did not write, and what the kit cannot judge; without logits, or any token, there is no pass."""
    for check, names in absent.items():
        reason = f"{names[0]}.f32 is missing" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
        yield Result(check, GATES[check], Status.SKIP, dtype=port.dtype, reason=reason, required=check == "logits")
    judged_by = {gate.check for gates in port.gates.values() for gate in gates}
    if "argmax" not in judged_by:
        yield Result("argmax", "G6", Status.SKIP, dtype=port.dtype, reason="no position of the kit is decided")
    if "kl" not in judged_by:
        reason = f"KL has statistics over {KL_POSITIONS} positions or more"
        yield Result("kl", "G5", Status.SKIP, dtype=port.dtype, reason=reason, required=False)


def worst(results: list[Result]) -> Result:
    """Of one metric over several ranges of rows; not a number is worse than any."""
    return max(results, key=lambda r: inf if r.value is None or r.value != r.value else r.value)


def apply_gate(port: Port, gate: Gate, mine: Tensor, exact: Tensor) -> Result:
    rows = slice(gate.first, gate.first + gate.rows)
    value = METRICS[gate.metric](port, mine[rows], exact[rows], rows)
    where = str(place(port, gate, mine, exact)) if gate.metric == "rms" and gate.check != "training" else gate.array
    return judge(
        ratio(value, gate.noise), gate.factor, check=gate.check, gate=gate.gate, dtype=gate.dtype, metric=gate.label,
        unit=gate.unit, where=where,
    )  # fmt: skip


def rms(port: Port, mine: Tensor, exact: Tensor, rows: slice) -> float:
    return error_of(mine, exact).rms()


def error_of(mine: Tensor, exact: Tensor) -> TapError:
    error = TapError()
    error.add(0, mine.reshape(len(mine), -1), exact.reshape(len(exact), -1))
    return error


def relative(port: Port, mine: Tensor, exact: Tensor, rows: slice) -> float:
    """Of max(|p|, lr): a weight near zero moves by the learning rate, and is rounded there."""
    return float(((mine.double() - exact).abs() / exact.abs().clamp_min(port.kit.table["training"]["lr"])).max())


def tokens(port: Port, mine: Tensor, exact: Tensor, rows: slice) -> float:
    best, decided = port.kit.get(port.name("best")), port.kit.get(f"decided.{port.dtype}")
    return float(((mine.argmax(-1) != best[rows]) & (decided[rows] == 1)).sum())


def kl(statistic: Callable[[Tensor], float]) -> Callable[[Port, Tensor, Tensor, slice], float]:
    return lambda port, mine, exact, rows: statistic(logit_rows(mine, exact, oracle_rows(exact)).kl)


METRICS: dict[str, Callable[[Port, Tensor, Tensor, slice], float]] = {
    "rms": rms,
    "max": lambda port, mine, exact, rows: float((mine.double() - exact).abs().max()),
    "relative": relative,
    "tokens": tokens,
    **{f"kl_{name}": kl(statistic) for name, statistic in KL.items()},
}


def place(port: Port, gate: Gate, mine: Tensor, exact: Tensor) -> str:
    """Where an array over tokens is off most among the gate's rows."""
    rows = slice(gate.first, gate.first + gate.rows)
    found = error_of(mine[rows], exact[rows]).place
    assert found is not None
    sequence, position = locate(port.kit, gate.first + found.index[0])
    return f"{gate.array}, {replace(found, sequence=sequence, index=(position, *found.index[1:]))}"


def locate(kit: Kit, row: int) -> tuple[int, int]:
    """(sequence, position) of a row."""
    sequence = max(i for i, start in enumerate(kit.starts[:-1]) if start <= row)
    return sequence, row - kit.starts[sequence]


# --- Where it first departs ------------------------------------------------------------------------------------------


def first_divergence(port: Port) -> Divergence | None:
    """The first tap, in order of computation, beyond its bound or of another size; None where no tap is."""
    for tap in tap_names(port.kit.table["config"]["n_layers"]):
        name = port.name(tap)
        if not port.path(name).is_file():
            continue
        if why := port.broken(name):
            return Divergence(tap, THE_KIT, port.dtype, why)
        mine, exact = port.get(name), port.kit.get(name)
        for gate in (gate for gate in port.gates[name] if gate.metric == "rms"):
            if apply_gate(port, gate, mine, exact).status is Status.FAIL:
                return describe(port, tap, gate, mine, exact)
    return None


def describe(port: Port, tap: str, gate: Gate, mine: Tensor, exact: Tensor) -> Divergence:
    """Named at the first row that is beyond the bound by itself, else at the largest error."""
    rows = slice(gate.first, gate.first + gate.rows)
    error = error_of(mine[rows], exact[rows])
    assert error.place is not None
    beyond = (~((error.error[0] / error.width).sqrt() <= gate.bound)).nonzero()
    row = int(beyond[0]) if len(beyond) else error.place.index[0]
    sequence, position = locate(port.kit, gate.first + row)
    odd, about = odd_numbers(mine), ABOUT[tap.split(".")[-1]]
    why = port.layout(gate.array) or (f"{odd}; {about}" if odd else probable_cause(view(port, sequence), tap))
    why = why or cause(port, tap, sequence) or about
    rho, place = ratio(error.rms(), gate.noise), error.place
    return Divergence(tap, THE_KIT, port.dtype, why, None, sequence, position, rho, place.value, place.expected)


def odd_numbers(mine: Tensor) -> str | None:
    """Where an array holds what is no number."""
    odd = (~mine.isfinite()).flatten(1).any(1).nonzero().flatten()
    if not len(odd):
        return None
    count = int((~mine.isfinite()).sum())
    return f"{count} of {mine.numel()} are no numbers (NaN or infinite), in {len(odd)} rows, first in row {int(odd[0])}"


def view(port: Port, sequence: int) -> View:
    present = lambda name: port.path(name).is_file() and port.broken(name) is None
    meta, starts = {"config": port.kit.table["config"]}, port.kit.starts
    exact = Side(meta, starts, lambda tap: port.kit.get(port.name(tap)))
    mine = Side(meta, starts, lambda tap: port.get(port.name(tap)) if present(port.name(tap)) else None)
    return View(mine, exact, mine, port.dtype, sequence, None)
