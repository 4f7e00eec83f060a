"""From a plan to evidence: every implementation in its own process, their traces in one temporary folder.

The first reference turns texts into ids, continues them greedily and runs; then the others, the oracle and the
candidate's paths see the same token ids. Small checkpoints run side by side; large ones one process and one dtype after
the other, so that memory and disk hold one model and a few traces.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from parity.candidates import labels
from parity.candidates.conditions import Conditions
from parity.checks.verdict import run_checks
from parity.contract import Case, Status, UsageError
from parity.machine import cores, own_anonymous_bytes
from parity.measure import precision
from parity.measure.evidence import Evidence, Kept
from parity.measure.rope_table import has_worse_table
from parity.measure.tolerances import TABLE_ULP
from parity.run.cache import TraceCache
from parity.run.execute import TEXTS, Executor, RunLog
from parity.run.floors import StoredFloors
from parity.run.jobs import NO_IDENTITY, Job, candidate_job, reference_job
from parity.run.process import Crash, Process
from parity.run.request import Plan
from parity.run.teacher_forcing import cut
from parity.trace import Trace


class Runner:
    """The stages of one run: each makes its jobs of what those before left, and returns the evidence with its own."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        progress: bool = False,
        cache: TraceCache | None = None,
        waiting: Mapping[str, Process] = {},
    ) -> None:
        """cache: of the references' and the oracle's traces; for large checkpoints one that the user has named alone.
        waiting: see Executor."""
        self.plan, self.folder = plan, folder
        cache = cache if cache is None or cache.named or not plan.large else None
        self.executor = Executor(folder, plan.case.threads, progress, cache, waiting)
        self.log.notices += plan.notices

    @property
    def log(self) -> RunLog:
        return self.executor.log

    def run(self) -> Evidence:
        """Raises UsageError for unusable input and process.Crash when a reference fails."""
        paths, dtypes = labels(self.plan.candidate), self.plan.case.dtypes
        first, *later = [[dtype] for dtype in dtypes] if self.plan.large else [dtypes]
        with self.executor.show((1 + len(later)) * (len(self.plan.references) + 1 + len(paths))):
            ev = self._candidates(self._references(first), first, paths, identified=False)
            for dtypes in later:
                self._references_again(ev, dtypes)
                ev = self._candidates(ev, dtypes, paths, identified=True)
        return ev

    def run_references(self) -> Evidence:
        """Without a candidate: what candidates that run in this process are judged by."""
        dtypes = self.plan.case.dtypes
        with self.executor.show(len(self.plan.references) + 1):
            ev = self._with_ops(self._references(dtypes))
            return self._with_coarse(ev, dtypes) if self.plan.case.record == "taps" else ev

    def run_aside(self, label: str, module: str, case: Case, flags: tuple[str, ...]) -> Path | None:
        """One more process on a case, after all others; its folder, None (and a notice) where it failed."""
        job = reference_job(self.folder, module, label, case).add(*flags)
        with self.executor.show(1):
            try:
                self.executor.execute([job])
                return job.out
            except (Crash, UsageError) as error:
                self.log.notices.append(f"{label}: {error}")
                return None

    # --- References and oracle ---------------------------------------------------------------------------------------

    def _references(self, dtypes: list[str]) -> Evidence:
        """The first reference makes the sequences; the others and the oracle see them."""
        plan, first = self.plan, self.plan.first
        job = self._job(first, replace(plan.case, dtypes=dtypes))
        others = [name for name in plan.references if name != first]
        # The others' imports take seconds: let them begin while the first one runs.
        ahead = [] if plan.large or self.executor.is_cached(job) else [self._job(name) for name in others]
        with self.executor.start_ahead(ahead):
            made = self.executor.execute([job])[first]
            case = self._fix_sequences(made)
            jobs = [self._job(name, replace(case, dtypes=dtypes)) for name in others]
            # The oracle shares work between dtypes: it runs at all of them.
            jobs.append(self._job("oracle", replace(case, dtypes=plan.case.dtypes, **NO_IDENTITY)))
            texts = replace(plan.case, record="text")
            asked = [reference_job(self.folder, name, name + TEXTS, texts) for name in plan.witnesses]
            traces = {first: made} | self.executor.execute([*jobs, *asked])
        references = {name: traces[name] for name in plan.references}
        return Evidence(
            case,
            traces["oracle"],
            references,
            candidates={},
            witnesses=tuple(traces[job.label] for job in asked if job.label in traces),
            forced=self._cut_short(case, references),
            untrained=plan.untrained,
            floors=self._floors(),
        )

    def _floors(self) -> Kept:
        """What is measured on the references is kept as their traces are."""
        ran = self.executor
        return Kept() if ran.cache is None else StoredFloors(ran.cache, ran.keys, self.folder)

    def _fix_sequences(self, made: Trace) -> Case:
        """The case that everybody after the first reference gets: its token ids, prompts and greedy text together."""
        fixed = {"prompts": made.meta["sequences"], "prompt_lengths": made.meta["prompt_lengths"]}
        positions = made.meta["positions"]
        return replace(self.plan.case, positions=positions, n_positions=None, max_new_tokens=0, **fixed)

    def _cut_short(self, case: Case, references: dict[str, Trace]) -> dict[str, Trace]:
        """Inputs of the operations, of small checkpoints."""
        if not self.plan.ops or case.positions is not None or case.record != "taps":
            return {}
        return {name: cut(trace, case.dtypes, self.folder / "forced" / name) for name, trace in references.items()}

    def _references_again(self, ev: Evidence, dtypes: list[str]) -> None:
        """At more dtypes, on the first round's token ids; the traces in `ev` grow."""
        case, known = replace(ev.case, **NO_IDENTITY), ev.oracle.meta["dtypes"]
        jobs = [self._job(name, replace(case, dtypes=dtypes)) for name in self.plan.references]
        if left := [dtype for dtype in dtypes if dtype not in known]:
            jobs.append(self._job("oracle", replace(case, dtypes=left)))
        self.executor.execute(jobs)

    # --- Candidates --------------------------------------------------------------------------------------------------

    def _candidates(self, ev: Evidence, dtypes: list[str], paths: list[str | None], identified: bool) -> Evidence:
        """Run the candidate's paths, measure them; of large checkpoints, drop each trace before the next is made.

        Who the candidate is (config, weights, token ids) is asked of one path, once.
        """
        for group in [[path] for path in paths] if self.plan.large else [paths]:
            jobs = {p: self._candidate_job(p, ev, dtypes, not identified and p == paths[0]) for p in group}
            with nullcontext() if self.plan.large else references_measured(ev, dtypes):
                traces = self.executor.execute(list(jobs.values()))
            found = {path: traces[job.label] for path, job in jobs.items() if job.label in traces}
            ev = self._with_rounded(replace(ev, candidates=ev.candidates | found), traces.values())
            ev = self._measure(ev, dtypes)
            if self.plan.large:
                for path in group:
                    drop(jobs[path].out, dtypes)
        if self.plan.large:
            for trace in ev.references.values():
                drop(trace.folder, dtypes)
        elif any(trace.meta.get("ops") for trace in ev.candidates.values()):
            ev = self._with_ops(ev)
        return ev

    def _measure(self, ev: Evidence, dtypes: list[str]) -> Evidence:
        """Measure what is there, and run what its errors raise a question of."""
        ev.measure_all(cores(), dtypes)
        if in_doubt(ev, dtypes):
            ev = self._with_coarse(ev, dtypes)
        lenient = ev.be_lenient() if ev.coarse is not None else ev
        self.log.notices += precision.remarks(lenient, dtypes, self._in_other_precisions)
        self.log.note_memory(own_anonymous_bytes())
        return ev

    def _candidate_job(self, path: str | None, ev: Evidence, dtypes: list[str], identify: bool) -> Job:
        case = replace(ev.case, dtypes=dtypes, **({} if identify else NO_IDENTITY))
        if self.plan.own_files is not None:
            case = replace(case, checkpoint=self.plan.own_files[0], tokenizer=self.plan.own_files[1])
        forced = [trace.folder for trace in ev.forced.values()]
        return candidate_job(self.folder, self.plan.candidate, path, case, forced)

    # --- More of the oracle ------------------------------------------------------------------------------------------

    def _with_rounded(self, ev: Evidence, traces: Iterable[Trace]) -> Evidence:
        """The oracle that rounds as the candidate declares, at every dtype."""
        for said in dict.fromkeys(Conditions.of(trace.meta) for trace in traces):
            if said and str(said) not in ev.rounded:
                label = "oracle-" + re.sub(r"[^\w]+", "-", str(said))
                trace = self._oracle(label, replace(ev.case, training=None, **NO_IDENTITY), *said.flags)
                ev = replace(ev, rounded=ev.rounded | {str(said): trace})
        return ev

    def _with_coarse(self, ev: Evidence, dtypes: list[str]) -> Evidence:
        """The oracle with a coarse RoPE table: how much of its error reaches each tap."""
        case = replace(ev.case, dtypes=dtypes, training=None, **NO_IDENTITY)
        return replace(ev, coarse=self._oracle("oracle-coarse", case, "--off_ulp", str(TABLE_ULP)))

    def _with_ops(self, ev: Evidence) -> Evidence:
        """The float64 value of each operation on the inputs that each reference recorded."""
        case = replace(ev.case, texts=None, corpus=[], dialogs=[], weights=False, training=None)
        jobs = {
            name: self._job("oracle", replace(case, prompts=trace.sequences), f"oracle-ops-{name}").add(
                "--ops", str(trace.folder)
            )
            for name, trace in ev.forced.items()
        }
        traces = self.executor.execute(list(jobs.values()))
        return replace(ev, ops={name: traces[job.label] for name, job in jobs.items()})

    def _in_other_precisions(self, sequences: list[list[int]], dtype: str) -> dict[str, tuple[Trace, str]]:
        """These sequences in each precision that a server may have: a trace, and the dtype to read in it."""
        nothing: dict[str, Any] = {"texts": None, "corpus": [], "dialogs": [], "tokenizer": None, "training": None}
        nothing |= {"max_new_tokens": 0, "rope_positions": [], "weights": False, "spare_prompts": None}
        case = replace(self.plan.case, prompts=sequences, record="logits", **nothing)
        others = [d for d in ("bf16", "fp16") if d != dtype]
        jobs = {d: self._job(self.plan.first, replace(case, dtypes=[d]), f"in-{d}") for d in others}
        for scheme in precision.WEIGHTS:
            job = self._job("oracle", replace(case, dtypes=[dtype]), f"in-{scheme.replace('/', '-')}")
            jobs[scheme] = job.add("--integers", scheme)
        traces = self.executor.execute(list(jobs.values()))
        return {name: (traces[job.label], name if name in others else dtype) for name, job in jobs.items()}

    def _oracle(self, label: str, case: Case, *flags: str) -> Trace:
        job = self._job("oracle", case, label).add(*flags)
        return self.executor.execute([job])[label]

    def _job(self, module: str, case: Case | None = None, label: str | None = None) -> Job:
        """Without a case, the process waits for it."""
        return reference_job(self.folder, module, label or module, case)


@contextmanager
def references_measured(ev: Evidence, dtypes: list[str]) -> Iterator[None]:
    """Measure the references while the block waits for the candidate, which has a process of its own."""
    with ThreadPoolExecutor(1) as pool:
        measured = pool.submit(ev.measure_references, dtypes)
        yield
        measured.result()


def in_doubt(ev: Evidence, dtypes: list[str]) -> bool:
    """Whether to ask what a coarse RoPE table does: one is, or a gate fails by no more than such a table explains."""
    if has_worse_table(ev):
        return True
    results = run_checks(ev, ("taps", "logits", "kl", "cache", "metamorphic"))
    bad = [r for r in results if r.status is Status.FAIL and r.dtype in dtypes]
    # Other errors are half an ulp; a table's grow by at most TABLE_ULP a position, or twice that by the gates.
    most = 4 * TABLE_ULP * max(len(tokens) for tokens in ev.oracle.sequences)
    return bool(bad) and all(r.value is not None and (r.check == "kl" or r.value <= most) for r in bad)


def drop(folder: Path, dtypes: list[str]) -> None:
    """Delete the tensors of these dtypes; what was measured stays."""
    for dtype in dtypes:
        shutil.rmtree(folder / dtype, ignore_errors=True)
