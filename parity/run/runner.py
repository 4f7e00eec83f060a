"""From a request to evidence: every implementation in its own process, their traces in one temporary folder.

The first reference turns texts into ids, continues them greedily and runs; then the others, the oracle and the
candidate's paths see the same token ids. Small checkpoints run side by side; large ones one process and one dtype after
the other, so that memory and disk hold one model and a few traces.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parity.candidates import resolve
from parity.candidates.conditions import Conditions
from parity.candidates.nano.checkpoint import Description
from parity.candidates.probe import Probed, probe_in_process
from parity.contract import Case, Status, UsageError
from parity.machine import cache_folder, cores, threads_for, too_large
from parity.measure import precision
from parity.measure.evidence import Evidence
from parity.measure.rope_table import has_worse_table
from parity.measure.tolerances import TABLE_ULP
from parity.run.cache import TraceCache
from parity.run.process import Crash, Process, anonymous_bytes, started, wait_any
from parity.run.progress import Bar
from parity.run.run_candidate import last_asked
from parity.run.teacher_forcing import cut
from parity.trace import Trace

FAR_POSITIONS = (8191, 8192, 131071)
ROPE_POSITIONS = (*range(64), 511, 1023, 4095, *FAR_POSITIONS)


CANDIDATE_KEYS = ("prompt_lengths", "too_large", "vocab_size", "context")  # of a case, which references need not know
TEXTS = " texts"  # ends the labels of witnesses
# A case's questions that do not depend on the dtype, left out: asked once.
NO_IDENTITY: dict[str, Any] = {"texts": None, "corpus": [], "dialogs": [], "weights": False, "spare_prompts": None}


@dataclass(frozen=True)
class Job:
    """One process of a run."""

    label: str  # what the progress bar shows
    module: str
    arguments: tuple[str, ...]
    out: Path


@dataclass
class Runner:
    """Runs the processes of one request and keeps what they cost."""

    case: Case
    references: list[str]
    candidate: str
    folder: Path
    progress: bool = True
    ops: bool = True  # give a candidate that has ops() the references' inputs, operation by operation
    seconds_in_forward: float = 0.0
    peak_bytes: int = 0
    notices: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # of the candidate: a result, not the end of the run
    traces: dict[str, Trace] = field(default_factory=dict)  # by job label
    ahead: dict[str, Process] = field(default_factory=dict)  # started, waiting for their case; by job label
    # Checkpoint and tokenizer as the candidate opens them, where the references need them in another form.
    own_files: tuple[str, str | None] | None = None

    first: str | None = None  # the reference that turns texts into ids and continues them; else the first of them
    witnesses: tuple[str, ...] = ()  # references that are asked for the ids of the case's texts alone
    large: bool = False  # one dtype and one process at a time; a candidate's trace goes when it is measured
    cache: TraceCache | None = None  # of the references' and the oracle's traces; not used for large checkpoints
    cached: list[str] = field(default_factory=list)  # labels of jobs whose traces came from there

    def run(self) -> Evidence:
        """Raises UsageError for unusable input and process.Crash when a reference fails."""
        paths = list(resolve(self.candidate))
        rounds = [[dtype] for dtype in self.case.dtypes] if self.large else [self.case.dtypes]
        self.bar = Bar(len(rounds) * (len(self.references) + 1 + len(paths)), self.progress)
        try:
            ev: Evidence | None = None
            for dtypes in rounds:
                ev = self._references(dtypes, ev)
                self._candidates(dtypes, ev, paths, dtypes is rounds[0])
        finally:
            self.bar.close()
        assert ev is not None
        return ev

    def run_references(self) -> Evidence:
        """Without a candidate: what candidates that run in this process are judged by."""
        self.bar = Bar(len(self.references) + 1, self.progress)
        try:
            ev = self._references(self.case.dtypes, None)
            self._oracle_ops(ev)
            if self.case.record == "taps":
                self._coarse_oracle(ev, self.case.dtypes)
        finally:
            self.bar.close()
        return ev

    def run_aside(self, label: str, module: str, case: Case, flags: tuple[str, ...]) -> Path | None:
        """One more process on a case, after all others; its folder, None (and a notice) where it failed."""
        job = self._job(module, label, case)
        self.bar = Bar(1, self.progress)
        try:
            self._run([replace(job, arguments=(*job.arguments, *flags))])
            return job.out
        except (Crash, UsageError) as error:
            self.notices.append(f"{label}: {error}")
            return None
        finally:
            self.bar.close()

    def _references(self, dtypes: list[str], ev: Evidence | None) -> Evidence:
        """Run both references and the oracle at these dtypes; in later rounds, on the first round's token ids."""
        with ExitStack() as stack:
            first = self._job(f"reference.{self._first}", self._first, replace(self.case, dtypes=dtypes))
            if not self.large and not (self.cache and self.cache.has(self._key(first))):
                # The others' imports take seconds: let them begin while the first one runs.
                jobs = [self._job(f"reference.{name}", name) for name in self.references if name != self._first]
                self.ahead = {job.label: self._start(stack, job) for job in jobs}
            return self._run_references(dtypes, ev)

    def _run_references(self, dtypes: list[str], ev: Evidence | None) -> Evidence:
        if ev is None:
            name = self._first
            first = self._run([self._job(f"reference.{name}", name, replace(self.case, dtypes=dtypes))])
            meta = first[name].meta
            fixed = {"prompts": meta["sequences"], "prompt_lengths": meta["prompt_lengths"]}
            case = replace(self.case, positions=meta["positions"], n_positions=None, max_new_tokens=0, **fixed)
            rest = [other for other in self.references if other != name]
            oracle_dtypes = self.case.dtypes  # the oracle shares work between dtypes
        else:
            case, first, rest = replace(ev.case, **NO_IDENTITY), {}, self.references
            known = ev.oracle.meta["dtypes"]
            oracle_dtypes = [dtype for dtype in dtypes if dtype not in known]
        jobs = [self._job(f"reference.{name}", name, replace(case, dtypes=dtypes)) for name in rest]
        if oracle_dtypes:
            jobs.append(self._job("reference.oracle", "oracle", replace(case, dtypes=oracle_dtypes, **NO_IDENTITY)))
        texts = replace(self.case, record="text")
        asked = [self._job(f"reference.{n}", n + TEXTS, texts) for n in self.witnesses if ev is None]
        traces = first | self._run([*jobs, *asked])
        if ev is None:
            ev = Evidence(case, traces["oracle"], {name: traces[name] for name in self.references}, {})
            ev.witnesses = [traces[job.label] for job in asked if job.label in traces]
            if self.ops and case.positions is None and case.record == "taps":
                forced = self.folder / "forced"
                ev.forced = {name: cut(ev.references[name], case.dtypes, forced / name) for name in self.references}
        return ev

    def _candidates(self, dtypes: list[str], ev: Evidence, paths: list[str | None], first_round: bool) -> None:
        """Run the candidate's paths, measure them; of large checkpoints, drop each trace before the next is made."""
        for group in [[path] for path in paths] if self.large else [paths]:
            jobs = {path: self._candidate_job(path, ev, dtypes, first_round and path == paths[0]) for path in group}
            traces = self._run(list(jobs.values()))
            ev.candidates |= {path: traces[job.label] for path, job in jobs.items() if job.label in traces}
            for said in {Conditions.of(trace.meta) for trace in traces.values()}:
                if said and str(said) not in ev.rounded:
                    self._round_oracle(ev, said)
            ev.prepare(cores(), dtypes)
            if in_doubt(ev, dtypes):
                self._coarse_oracle(ev, dtypes)
            judged = ev.be_lenient() if ev.coarse is not None else ev
            self.notices += precision.remarks(judged, dtypes, self._in_other_precisions)
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes(os.getpid()))
            if self.large:
                for path in group:
                    drop(jobs[path].out, dtypes)
        if self.large:
            for trace in ev.references.values():
                drop(trace.folder, dtypes)
        elif any(trace.meta.get("ops") for trace in ev.candidates.values()):
            self._oracle_ops(ev)

    def _round_oracle(self, ev: Evidence, said: Conditions) -> None:
        """The oracle that rounds as the candidate declares, at every dtype."""
        label = "oracle-" + re.sub(r"[^\w]+", "-", str(said))
        job = self._job("reference.oracle", label, replace(ev.case, training=None, **NO_IDENTITY))
        ev.rounded[str(said)] = self._run([replace(job, arguments=(*job.arguments, *said.flags))])[job.label]

    def _in_other_precisions(self, sequences: list[list[int]], dtype: str) -> dict[str, tuple[Trace, str]]:
        """These sequences in each precision that a server may have: a trace, and the dtype to read in it."""
        shared = replace(self.case, prompts=sequences, texts=None, corpus=[], dialogs=[], tokenizer=None, training=None)
        case = replace(shared, max_new_tokens=0, record="logits", rope_positions=[], weights=False, spare_prompts=None)
        others = [d for d in ("bf16", "fp16") if d != dtype]
        jobs = {d: self._job(f"reference.{self._first}", f"in-{d}", replace(case, dtypes=[d])) for d in others}
        for scheme in precision.WEIGHTS:
            job = self._job("reference.oracle", f"in-{scheme.replace('/', '-')}", replace(case, dtypes=[dtype]))
            jobs[scheme] = replace(job, arguments=(*job.arguments, "--integers", scheme))
        traces = self._run(list(jobs.values()))
        return {name: (traces[job.label], name if name in others else dtype) for name, job in jobs.items()}

    def _coarse_oracle(self, ev: Evidence, dtypes: list[str]) -> None:
        """The oracle with a coarse RoPE table: how much of its error reaches each tap."""
        case = replace(ev.case, dtypes=dtypes, training=None, **NO_IDENTITY)
        job = self._job("reference.oracle", "oracle-coarse", case)
        more = ("--off_ulp", str(TABLE_ULP))
        ev.coarse = self._run([replace(job, arguments=(*job.arguments, *more))])[job.label]

    def _oracle_ops(self, ev: Evidence) -> None:
        """The float64 value of each operation on the inputs that each reference recorded."""
        case = replace(ev.case, texts=None, corpus=[], dialogs=[], weights=False, training=None)
        jobs = []
        for name, trace in ev.forced.items():
            job = self._job("reference.oracle", f"oracle-ops-{name}", replace(case, prompts=trace.sequences))
            jobs.append(replace(job, arguments=(*job.arguments, "--ops", str(trace.folder))))
        traces = self._run(jobs)
        ev.ops = {name: traces[f"oracle-ops-{name}"] for name in ev.forced}

    @property
    def _first(self) -> str:
        return self.first or self.references[0]

    def _job(self, module: str, label: str, case: Case | None = None) -> Job:
        """Without a case, the process waits for it on standard input."""
        file = "-" if case is None else str(case.write(self.folder / f"{label}.json", *CANDIDATE_KEYS))
        out = self.folder / label
        return Job(label, module, ("--case", file, "--out", str(out)), out)

    def _candidate_job(self, path: str | None, ev: Evidence, dtypes: list[str], first: bool) -> Job:
        """`first`: who the candidate is (config, weights, token ids) is asked of one path, once."""
        label = f"candidate {path or ''}".strip()
        case = replace(ev.case, dtypes=dtypes)
        if not first:
            case = replace(case, **NO_IDENTITY)
        if self.own_files is not None:
            case = replace(case, checkpoint=self.own_files[0], tokenizer=self.own_files[1])
        out = self.folder / label.replace(" ", "-")
        file = case.write(self.folder / f"{out.name}.json")
        forced = [str(trace.folder) for trace in ev.forced.values()]
        return Job(label, "parity.candidates", (self.candidate, path or "-", str(file), str(out), *forced), out)

    def _run(self, jobs: list[Job]) -> dict[str, Trace]:
        """Single-threaded processes side by side, one a core; many-threaded ones after each other."""
        at_once = cores() if self.case.threads == 1 else 1
        keys = {job.label: self._key(job) for job in jobs}
        with ExitStack() as stack:
            waiting = [job for job in reversed(jobs) if not self._restored(job, keys[job.label])]
            running: list[Process] = []
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(self._begin(stack, waiting.pop()))
                ended = wait_any(running)
                running.remove(ended)
                self.peak_bytes = max(self.peak_bytes, ended.peak_bytes)
                try:
                    ended.finish()
                    self._keep(next(job for job in jobs if job.label == ended.label), keys[ended.label])
                except (Crash, UsageError) as error:
                    if ended.label.endswith(TEXTS):
                        self.notices.append(f"{ended.label} were not read: {error}")
                    elif isinstance(error, Crash) and ended.label.startswith("candidate"):
                        out = next(job.out for job in jobs if job.label == ended.label)
                        self.crashes.append(f"{error}{while_asked(out)}")
                    else:
                        raise
        return {job.label: self._trace(job) for job in jobs if (job.out / "trace.json").is_file()}

    def _key(self, job: Job) -> str | None:
        """The name of a job's trace in the cache; None of one that is not kept."""
        if self.cache is None or self.large or not job.module.startswith("reference."):
            return None
        if job.module == "reference.mistakes.explain":  # how much of its table it asks depends on the time that it has
            return None
        case = json.loads((self.folder / f"{job.label}.json").read_text())
        return self.cache.key(job.module, list(job.arguments[4:]), case, self.folder)

    def _restored(self, job: Job, key: str | None) -> bool:
        if self.cache is None or not self.cache.restore(key, job.out):
            return False
        self.cached.append(job.label)
        self.bar(job.label, "from the cache", 1.0)
        return True

    def _keep(self, job: Job, key: str | None) -> None:
        """For the next run, unless a file changed while this one read it."""
        if self.cache is None or key is None or key != self._key(job):
            return
        try:
            self.cache.keep(key, job.out)
        except OSError as error:
            note = f"traces are not kept in {self.cache.folder}: {error.strerror or error}"
            self.notices += [note] if note not in self.notices else []

    def _trace(self, job: Job) -> Trace:
        """The job's trace, together with what earlier rounds left in the same folder."""
        trace = Trace(job.out)
        self.seconds_in_forward += 0.0 if job.label in self.cached else trace.meta["seconds_forward"]
        self.notices += [n for n in trace.meta.get("notices", []) if n not in self.notices]
        known = self.traces.setdefault(job.label, trace)
        if known is not trace:
            for key in (
                "dtypes",
                "streamed",
                "generated",
                "self",
                "extra",
                "uncovered",
                "answers",
                "log_probs",
                "undone",
            ):
                known.meta[key] = known.meta.get(key, {}) | trace.meta.get(key, {})
            old = known.meta.get("failures", [])
            known.meta["failures"] = old + [f for f in trace.meta.get("failures", []) if f not in old]
        return known

    def _begin(self, stack: ExitStack, job: Job) -> Process:
        if (process := self.ahead.pop(job.label, None)) is None:
            return self._start(stack, job)
        process.feed((self.folder / f"{job.label}.json").read_text())
        return process

    def _start(self, stack: ExitStack, job: Job) -> Process:
        log, fed = self.folder / f"{job.label.replace(' ', '-')}.log", job.arguments[:2] == ("--case", "-")
        return stack.enter_context(started(job.label, job.module, list(job.arguments), log, self.bar, fed))


def while_asked(out: Path) -> str:
    """What a candidate's process was doing when it died, where that is known."""
    asked = last_asked(out)
    return f", while it was asked {asked}" if asked else ""


def in_doubt(ev: Evidence, dtypes: list[str]) -> bool:
    """Whether to ask what a coarse RoPE table does: one is, or a gate fails by no more than such a table explains."""
    from parity.report.summary import judge_all  # which is built on this module

    if has_worse_table(ev):
        return True
    results = judge_all(ev, ("taps", "logits", "kl", "cache", "metamorphic"))
    bad = [r for r in results if r.status is Status.FAIL and r.dtype in dtypes]
    # Other errors are half an ulp; a table's grow by at most TABLE_ULP a position, or twice that by the gates.
    most = 4 * TABLE_ULP * max(len(tokens) for tokens in ev.oracle.sequences)
    return bool(bad) and all(r.value is not None and (r.check == "kl" or r.value <= most) for r in bad)


def drop(folder: Path, dtypes: list[str]) -> None:
    """Delete the tensors of these dtypes; what was measured stays."""
    for dtype in dtypes:
        shutil.rmtree(folder / dtype, ignore_errors=True)


def probed(name: str, checkpoint: Description, dtypes: list[str], device: str, folder: Path) -> Probed | None:
    """The candidate loaded and asked, before the references run; None of nanollama, which is ours."""
    if name == "nanollama":
        return None
    case = Case(
        str(checkpoint.path.resolve()),
        dtypes,
        device=device,
        threads=threads_for(checkpoint.stored_bytes),
        too_large=too_large(checkpoint.parameters, dtypes),
        vocab_size=checkpoint.config["vocab_size"],
    )
    return probe_in_process(name, case, folder, lambda label, stage, done: None)


def embedded_default() -> Path:
    """The tiny seeded checkpoint with the real Llama 3 tokenizer, made on first use. Raises UsageError."""
    from parity.synth.checkpoint import synthesise
    from parity.synth.shapes import SHAPES

    folder = cache_folder() / "tiny-v3"
    if not (folder / "SHA256SUMS").is_file():
        try:
            synthesise(SHAPES["tiny"], folder)
        except OSError as error:
            raise UsageError(
                f"{cache_folder()}: the default checkpoint (70 MB) cannot be written there ({error.strerror}); "
                "set NANOLLAMA_CACHE to a folder with space"
            ) from None
    return folder
