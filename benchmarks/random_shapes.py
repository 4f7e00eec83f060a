"""Do the gates cry wolf? Random Llama shapes: nanollama's exact path and SDPA against both references, every gate.

    python -m benchmarks.random_shapes --draws 500 --json benchmarks/results/random_shapes.json --markdown margins.md

A third path has RoPE frequencies in float64, rounded once: right as well, and judged where tables count as rounding.

hypothesis draws the shapes: 1-6 layers, head_dim 8-128, 1-8 query heads a kv head, vocabulary 17-5000, theta 1e3-1e6,
scaling on or off, lengths 1-300. The references run in this process, through their own file protocol: 2000 process
starts would take longer than the sums. Prints the alarms and each gate's margin, the largest value by its bound; exit
code 1 if there is an alarm.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from parity.candidates.nano.model import PATHS, Nano
from parity.checks import CHECKS
from parity.contract import Case, Status
from parity.measure.evidence import Evidence
from parity.measure.tolerances import TABLE_ULP
from parity.mutants.edits import benign
from parity.mutants.edits.edit import edited, with_table
from parity.report.summary import environment, judge_fairly
from parity.run.run_candidate import record
from parity.run.runner import CANDIDATE_KEYS
from parity.run.teacher_forcing import cut
from parity.synth.checkpoint import write_hf, write_meta
from parity.synth.shapes import Shape
from parity.trace import Trace, TraceWriter
from reference import hf, meta
from reference.oracle import __main__ as oracle

DTYPES = ("fp32", "bf16")
FLOAT64 = "float64 RoPE"  # a path of its own
MAX_WIDTH = 512  # of all heads together
THOROUGH = 5  # one draw in so many is judged by every check, the others by those on the forward pass


@dataclass(frozen=True)
class Draw:
    """One random checkpoint and what is run on it."""

    shape: Shape
    format: str
    lengths: tuple[int, ...]
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    head_dim = 2 * draw(st.integers(4, 64))
    n_rep = draw(st.integers(1, 8))
    n_kv_heads = draw(st.integers(1, max(1, min(4, MAX_WIDTH // (head_dim * n_rep)))))
    dim = head_dim * n_rep * n_kv_heads
    multiple_of = draw(st.sampled_from((8, 32, 96)))
    theta = 10 ** draw(st.floats(3, 6))
    shape = Shape(
        dim,
        n_layers=draw(st.integers(1, 6)),
        n_heads=n_rep * n_kv_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=-(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of,  # Meta's rule
        vocab_size=draw(st.integers(17, 5000)),
        norm_eps=draw(st.sampled_from((1e-6, 1e-5, 2e-5))),
        rope_theta=round(theta, 1) if round(theta, 1) != 10_000.0 else 10_001.0,  # 10,000 has a file form of its own
        rope_factor=draw(st.sampled_from((None, 8.0, 32.0))),
        tied=draw(st.booleans()),
        multiple_of=multiple_of,
        context=4096,
    )
    lengths = tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=3)))
    return Draw(shape, draw(st.sampled_from(("meta", "hf"))), lengths, draw(st.integers(0, 2**20)))


float64_frequencies = edited(with_table(benign.table_from(benign.float64_frequencies)))


def limited(load: Any, thorough: bool) -> Any:
    """Every draw is judged by its forward pass, a thorough one by operations, cache, batches and packed rows as well.

    None is compiled: that would take hours.
    """

    def wrapped(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
        nano = load(checkpoint, dtype, device)
        for method in ("compiled",) if thorough else ("compiled", "prefill", "decode", "packed", "ops"):
            setattr(nano, method, None)
        return nano

    return wrapped


def reference_trace(module: Any, case: Case, folder: Path, *more: str) -> Trace:
    """What `python -m reference.NAME --case ... --out ...` writes, without a process."""
    file = case.write(folder.with_suffix(".json"), *CANDIDATE_KEYS)
    with contextlib.redirect_stdout(io.StringIO()):
        module.main(["--case", str(file), "--out", str(folder), *more])
    return Trace(folder)


def evidence(drawn: Draw, folder: Path) -> Evidence:
    """Checkpoint, references, oracle and both paths of nanollama."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    if drawn.format == "hf":
        write_hf(checkpoint, drawn.shape, drawn.seed, "bf16")
    else:
        write_meta(checkpoint, drawn.shape, drawn.seed, "bf16", 1)
    rng = random.Random(drawn.seed)
    prompts = [[rng.randrange(drawn.shape.vocab_size) for _ in range(n)] for n in drawn.lengths]
    case = Case(str(checkpoint), list(DTYPES), prompts=prompts, rope_positions=[0, 1, 63, 8191, 131071], weights=True)
    case = replace(case, prompt_lengths=list(drawn.lengths))
    references = {name: reference_trace(m, case, folder / name) for name, m in (("meta", meta), ("hf", hf))}
    ev = Evidence(case, reference_trace(oracle, case, folder / "oracle"), references, {})
    thorough = drawn.seed % THOROUGH == 0
    for name, trace in references.items() if thorough else ():
        ev.forced[name] = cut(trace, case.dtypes, folder / "forced" / name)
        ops = replace(case, prompts=ev.forced[name].sequences, weights=False)
        given_inputs = ("--ops", str(ev.forced[name].folder))
        ev.ops[name] = reference_trace(oracle, ops, folder / f"ops-{name}", *given_inputs)
    coarse = ("--off_ulp", str(TABLE_ULP))
    ev.coarse = reference_trace(oracle, replace(case, weights=False), folder / "coarse", *coarse)
    for path, load in (*PATHS.items(), (FLOAT64, float64_frequencies)):
        writer = TraceWriter(folder / path)
        record(limited(load, thorough and path != FLOAT64), case, writer, lambda stage, done: None, ev.forced)
        ev.candidates[path] = Trace(folder / path)
    return ev


def judge(drawn: Draw) -> list[dict[str, Any]]:
    """Every result of every check on one draw."""
    with tempfile.TemporaryDirectory(prefix="random-shapes-") as folder:
        ev = evidence(drawn, Path(folder))
        parts = [{p: t for p, t in ev.candidates.items() if (p == FLOAT64) == alone} for alone in (False, True)]
        results = [r for part in parts for r in judge_fairly(replace(ev, candidates=part), list(CHECKS))[1]]
        return [r.as_json() for r in results if r.status is not Status.SKIP]


@dataclass
class Tally:
    """What all draws came to."""

    draws: int = 0
    results: int = 0
    alarms: list[dict[str, Any]] = field(default_factory=list)
    largest: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, drawn: Draw, results: list[dict[str, Any]]) -> None:
        self.draws += 1
        self.results += len(results)
        for r in results:
            if r["status"] in ("fail", "error"):
                self.alarms.append({**r, "draw": asdict(drawn)})
            kind = FLOAT64 if r["path"] == FLOAT64 else ""
            key = " ".join(x for x in (r["check"], r["gate"], r["metric"], r["dtype"], kind) if x)
            if r["value"] is not None and r["value"] > self.largest.get(key, {"value": -1.0})["value"]:
                self.largest[key] = {"value": r["value"], "bound": r["bound"], "where": r["where"], "path": r["path"]}


def run(n: int, start: int, after: Any = lambda tally: None) -> Tally:
    """Draw n shapes, the same ones for the same start, and judge each."""
    tally = Tally()

    @settings(
        max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @seed(start)
    @given(draws())
    def one(drawn: Draw) -> None:
        if tally.draws < n:
            tally.add(drawn, judge(drawn))
            after(tally)

    meta.start_model_parallel()
    torch.set_num_threads(1)
    one()
    return tally


def margins(largest: dict[str, dict[str, Any]], draws: int) -> str:
    """A table of each gate's largest value by its bound."""
    rows = [
        f"| {name} | {found['value']:.3g} | {found['bound']:g} | {found['value'] / found['bound']:.2f} |"
        for name, found in sorted(largest.items())
        if found["bound"] and " style " not in name
    ]
    return "\n".join((f"| gate, {draws} shapes | worst | bound | share |", "| --- | --- | --- | --- |", *rows)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the table of margins")
    args = parser.parse_args()
    started = time.perf_counter()

    def write(tally: Tally) -> None:
        if tally.draws % 10 == 0 or tally.draws == args.draws:
            print(f"{tally.draws} draws, {len(tally.alarms)} alarms, {time.perf_counter() - started:.0f} s", flush=True)
        if args.json is not None:
            about: dict[str, Any] = {
                "command": f"python -m benchmarks.random_shapes --draws {args.draws} --seed {args.seed}"
            }
            about |= {"environment": environment(1, "cpu"), "seconds": round(time.perf_counter() - started)}
            args.json.write_text(json.dumps(about | asdict(tally), indent=1) + "\n")

    tally = run(args.draws, args.seed, write)
    table = margins(tally.largest, tally.draws)
    print(table)
    if args.markdown is not None:
        args.markdown.write_text(table)
    for alarm in tally.alarms:
        what = " ".join(str(alarm[key]) for key in ("check", "dtype", "path", "value", "where"))
        print(f"ALARM {what}, {alarm['draw']}")
    return 1 if tally.alarms else 0


if __name__ == "__main__":
    sys.exit(main())
