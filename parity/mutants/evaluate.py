"""The harness proves itself: it must catch every mutant, for the right reason, and cry wolf at no benign variant.

    python -m parity.mutants                                    # the kill matrix, under 5 minutes on 2 cores
    python -m parity.mutants --json matrix.json --markdown docs/kill-matrix.md
    python -m parity.mutants --only 14,15,D3                    # some mutants alone; D: training over two ranks
    python -m parity.mutants --only 1,10 --ckpt DIR             # the same edits on a checkpoint of yours, and its twin

Exit codes: 0 all killed and no false alarm; 1 a survivor, a false alarm, or a fault in the harness that went unnoticed.
"""

import json as jsonlib
import os
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanollama.cli import execute
from parity.candidates.interface import load_candidate
from parity.candidates.nano.checkpoint import describe as describe_checkpoint
from parity.candidates.nano.twin import is_seeded
from parity.candidates.nano.twin import write as write_twin
from parity.checks import CHECKS
from parity.checks.verdict import run_checks_fairly
from parity.contract import Result, Status, UsageError
from parity.explain.localise import first_divergence
from parity.machine import Clock, cores, environment, workspace
from parity.measure.evidence import Evidence
from parity.mutants import baselines, distributed, family
from parity.mutants.edits import MUTANTS, VARIANTS, Mutant
from parity.mutants.selftest import FAULTS, noticed, problems
from parity.run.prompts import warn
from parity.run.run_candidate import record, record_identity
from parity.trace import Trace, TraceWriter

# The order of diagnosis: what a forward pass is made of before the pass, and the greedy text, which follows from
# everything else, last. The first check of this order that fails is the one that kills.
ORDER = (*(name for name in CHECKS if name != "greedy"), "greedy")
# Not a bug of any model, so no candidate: the prompts' lint has to remark it.
LINT = {"number": "35", "what": "a prompt that ends in a space", "noticed": bool(warn(1, "Simply put, "))}
BARE = ("logits", "kl", "argmax", "greedy")  # what is asked of a candidate without taps and operations
GATES = ("G0", "G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8")


@dataclass(frozen=True)
class Row:
    """One candidate's verdict. `gates`: by dtype, the gates that failed; those of no dtype count in each."""

    gates: dict[str, list[str]]
    killed_by: str | None
    found: str | None
    cause: str | None
    usual: dict[str, dict[str, bool]]  # by dtype: criterion -> passed
    worst: dict[str, float]  # by dtype: largest value in % of its bound
    by_logits: dict[str, bool]  # by dtype: whether it is killed as a bare callable would be, by logits alone


def evaluate(base: Evidence, load: Any, folder: Path) -> tuple[Evidence, list[Result]]:
    """Run one candidate in this process against traces that were made once, and judge it by every check."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = TraceWriter(folder)
    if base.case.record == "logits":  # a tokenizer's member: no forward pass
        meta = record_identity(load_candidate(load, base.case.checkpoint, "fp32", "cpu"), base.case, writer)
        writer.finish(meta | {"sequences": base.case.prompts, "dtypes": {}})
    else:
        record(load, base.case, writer, lambda stage, done: None, base.forced)
    return run_checks_fairly(base.of_candidates({None: Trace(folder)}), list(CHECKS))


def measure_references(base: Evidence) -> None:
    for trace in (*base.references.values(), *([base.coarse] if base.coarse else ())):
        for dtype in base.case.dtypes if base.case.record == "taps" else ():
            base.measured(trace, dtype)


def failed(results: list[Result]) -> list[Result]:
    return [r for r in results if r.status in (Status.FAIL, Status.ERROR)]


def wrong(results: list[Result]) -> list[Result]:
    """Those that were judged and failed: a mutant that crashes is broken itself, and not killed."""
    return [r for r in results if r.status is Status.FAIL]


def killer(results: list[Result], order: tuple[str, ...] = ORDER) -> str | None:
    """The first check, in the order of diagnosis, that failed."""
    names = {r.check for r in wrong(results)}
    return next((name for name in order if name in names), None)


def row_of(ev: Evidence, results: list[Result]) -> Row:
    bad = wrong(results)
    gates = {d: [g for g in GATES if any(r.gate == g and r.dtype in (d, None) for r in bad)] for d in ev.case.dtypes}
    killed_by, found, cause = killer(results), None, None
    if killed_by in ("tokens", "chat"):
        found = str(next(r.where for r in bad if r.check == killed_by)).split()[0]
    elif killed_by == "training":
        found = next(r.metric for r in bad if r.check == killed_by)
    elif bad:
        place = first_divergence(ev)
        found, cause = (place.tap, place.probable_cause) if place else (None, None)
    worst: dict[str, float] = {}
    for r in results:
        if r.value is not None and r.bound and r.dtype and r.gate != "style":
            worst[r.dtype] = max(worst.get(r.dtype, 0.0), 100 * r.value / r.bound)
    by_logits = {d: any(r.check in BARE and r.dtype == d for r in bad) for d in ev.case.dtypes}
    return Row(gates, killed_by, found, cause, baselines.apply_criteria(ev), worst, by_logits)


# --- Workers: a process a core, since candidates patch the modules that they run in ----------------------------------

_BASES: dict[str, Evidence] = {}
_FOLDER: Path


def _start(folder: Path) -> None:
    global _FOLDER
    torch.set_num_threads(1)
    _FOLDER = folder / f"worker-{os.getpid()}"


def _base(name: str) -> Evidence:
    if name not in _BASES:
        _BASES[name] = pickle.loads((_FOLDER.parent / f"{name}.pickle").read_bytes())
        measure_references(_BASES[name])
    return _BASES[name]


def _mutant(index: int, base: str) -> Row:
    return row_of(*evaluate(_base(base), MUTANTS[index].load, _FOLDER))


def _variant(index: int) -> tuple[Row, list[str]]:
    ev, results = evaluate(_base("gqa"), VARIANTS[index].load, _FOLDER)
    alarms = [
        f"{r.check} {r.dtype} against {r.reference}: {r.value} beyond {r.bound}, {r.where}" for r in failed(results)
    ]
    return row_of(ev, results), alarms


# --- The whole run ---------------------------------------------------------------------------------------------------


def run_all(
    folder: Path,
    chosen: list[int],
    variants: list[int],
    progress: bool,
    ckpt: Path | None = None,
    over_ranks: tuple[list[distributed.RankMutant], list[distributed.RankVariant]] = ([], []),
) -> dict[str, Any]:
    """The kill matrix as one JSON-ready dict. ckpt: run the chosen mutants on it and its twin, not on the family."""
    clock = Clock()
    yours = build_yours(ckpt, folder, progress) if ckpt else []
    bases = {i: "yours" if ckpt else MUTANTS[i].member for i in chosen}
    for name in family.FAMILY:
        if name in bases.values() or (variants and name == "gqa"):
            (folder / f"{name}.pickle").write_bytes(pickle.dumps(family.build(name, folder, progress)))
    with ProcessPoolExecutor(cores(), get_context("spawn"), _start, (folder,)) as pool:
        rows = [pool.submit(_mutant, i, bases[i]) for i in chosen]
        twins = [pool.submit(_mutant, i, "twin") for i in chosen if "twin" in yours]
        benign = [pool.submit(_variant, i) for i in variants]
        for future in tqdm([*rows, *twins, *benign], disable=not progress, leave=False, desc="mutants and variants"):
            future.result()
    found = [describe(MUTANTS[i], bases[i], future.result()) for i, future in zip(chosen, rows, strict=True)]
    if twins:
        on_twin = [describe(MUTANTS[i], "twin", future.result()) for i, future in zip(chosen, twins, strict=True)]
        found = [with_twin(own, twin) for own, twin in zip(found, on_twin, strict=True)]
    good = [describe_variant(i, *future.result()) for i, future in zip(variants, benign, strict=True)]
    spread = distributed.evaluate(*over_ranks, progress)
    faults = [LINT, *({"number": f.number, "what": f.what, "noticed": noticed(f)} for f in FAULTS)] if variants else []
    own = problems()
    return {
        "schema": "nanollama.mutants/1",
        "mutants": found,
        "benign": good,
        "distributed": spread,
        "harness": faults,
        "self_test": own,
        "seconds": round(clock(), 1),
        "environment": environment(1, "cpu"),
        **totals(found, good, faults, own, spread),
    }


def build_yours(ckpt: Path, folder: Path, progress: bool) -> list[str]:
    """The checkpoint's evidence, and that of its seeded twin unless it is seeded itself; their names."""
    described = describe_checkpoint(str(ckpt), None)
    paths = {"yours": ckpt} | ({} if is_seeded(described) else {"twin": write_twin(described, folder / "written")})
    for name, path in paths.items():
        made = family.of_checkpoint(path, folder / name, progress, seeded_prompts=name == "twin")
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(made))
    return list(paths)


def changes_forward(mutant: Mutant) -> bool:
    member = family.FAMILY.get(mutant.member)
    return member is not None and member.tokenizer is None and not member.trained


def describe(mutant: Mutant, base: str, row: Row) -> dict[str, Any]:
    survived = [d for d in mutant.dtypes if d in row.gates and not row.gates[d]]
    return {
        "number": mutant.number,
        "what": mutant.what,
        "member": base,
        "killed": not survived,
        "survived_in": survived,
        "killed_by": row.killed_by,
        "expected_check": mutant.killed_by,
        "found": row.found,
        "expected_tap": mutant.tap,
        "visible_in": list(mutant.dtypes),
        "gates": row.gates,
        "by_logits": row.by_logits,
        "cause": row.cause,
        "usual": {} if mutant.killed_by == "training" else row.usual,  # which look at forward passes alone
    }


def with_twin(own: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    """A mutant on a checkpoint of yours, together with its fate on the twin: where both let it through, it survives."""
    survived = [dtype for dtype in own["survived_in"] if dtype in twin["survived_in"]]
    first = {key: (own if own["killed_by"] else twin)[key] for key in ("killed_by", "found", "cause")}
    return own | first | {"killed": not survived, "survived_in": survived, "alone": own, "twin": twin}


def describe_variant(index: int, row: Row, alarms: list[str]) -> dict[str, Any]:
    return {"what": VARIANTS[index].what, "alarms": alarms, "worst_percent_of_bound": row.worst, "usual": row.usual}


def totals(
    found: list[dict], good: list[dict], faults: list[dict], own: list[str], spread: dict[str, Any]
) -> dict[str, Any]:
    numbers = {
        "killed": sum(m["killed"] for m in found),
        "right_check": sum(m["killed_by"] == m["expected_check"] for m in found),
        "localised": sum(m["found"] == m["expected_tap"] for m in found),
        "false_alarms": sum(bool(v["alarms"]) for v in good),
        "faults_noticed": sum(f["noticed"] for f in faults),
    }
    clean = numbers["killed"] == len(found) and not numbers["false_alarms"] and distributed.is_clean(spread)
    return numbers | {"passed": clean and numbers["faults_noticed"] == len(faults) and not own}


def choose(only: str | None) -> tuple[list[int], list[int], list[distributed.RankMutant]]:
    """Indices of mutants and of variants, and mutants over ranks. Raises UsageError for a number that no mutant has."""
    if only is None:
        return list(range(len(MUTANTS))), list(range(len(VARIANTS))), list(distributed.MUTANTS)
    wanted = [n.strip() for n in only.split(",") if n.strip()]
    known = {m.number: i for i, m in enumerate(MUTANTS)}
    spread = {m.number: m for m in distributed.MUTANTS}
    for number in wanted:
        if number not in known.keys() | spread.keys():
            raise UsageError(f"--only {number}: no mutant has this number; known are {', '.join([*known, *spread])}")
    return [known[n] for n in wanted if n in known], [], [spread[n] for n in wanted if n in spread]


def main(argv: list[str] | None = None) -> int:
    return execute(run, argv, prog="python -m parity.mutants", doc=__doc__, errors=())


def run(
    *,
    only: str | None = None,  # comma list of mutant numbers, and no variants then; default: everything
    ckpt: Path | None = None,  # with --only: a checkpoint to run on, with its twin
    list: bool = False,  # print the registry and stop
    json: Path | None = None,  # write the matrix as JSON
    markdown: Path | None = None,  # write the matrix as Markdown
) -> int:
    """Judge every mutant and variant, print the matrix, and say by the exit code whether all is as it should be."""
    from parity.mutants import matrix

    chosen, variants, spread = choose(only)
    if ckpt and not (only and not spread and all(changes_forward(MUTANTS[i]) for i in chosen)):
        raise UsageError("--ckpt goes with --only and mutants of the forward pass: --list says which there are")
    if list:
        print("\n".join(f"{m.number:4} {m.what} ({m.killed_by}, {m.tap})" for m in MUTANTS))
        print("\n".join(f"{m.number:4} {m.what} ({m.killed_by}, over ranks)" for m in distributed.MUTANTS))
        return 0
    with workspace() as folder:
        over_ranks = (spread, [*distributed.VARIANTS] if only is None else [])
        report = run_all(folder, chosen, variants, sys.stderr.isatty(), ckpt, over_ranks)
    print(matrix.text(report))
    if json is not None:
        json.write_text(jsonlib.dumps(report, indent=1) + "\n")
    if markdown is not None:
        markdown.write_text(matrix.markdown(report))
    return 0 if report["passed"] else 1
