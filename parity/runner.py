"""From a request to evidence: every implementation in its own process, their traces in one temporary folder.

The first reference turns texts into ids, continues them greedily and runs; then the others, the oracle and the
candidate's paths see the same token ids. Small checkpoints run side by side, large ones one after the other.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from parity.candidates import resolve
from parity.contract import Case, UsageError
from parity.evidence import Evidence
from parity.forced import cut
from parity.process import Crash, Process, started, wait_any
from parity.trace import Trace

SMALL_BYTES = 2 * 10**9  # of a checkpoint on disk: below, several implementations fit in memory side by side
REFERENCES = ("meta", "hf")
FAR_POSITIONS = (8191, 8192, 131071)
ROPE_POSITIONS = (*range(64), 511, 1023, 4095, *FAR_POSITIONS)


@dataclass(frozen=True)
class Job:
    """One process of a run."""

    label: str  # what the progress bar shows
    module: str
    arguments: tuple[str, ...]
    out: Path


class Bar:
    """One progress bar over all jobs; each job counts as one unit."""

    def __init__(self, jobs: int, enabled: bool) -> None:
        style = "{desc:44.44} {percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left"
        self.tqdm = tqdm(total=jobs, disable=not enabled, bar_format=style, leave=False)
        self.done: dict[str, float] = {}

    def __call__(self, label: str, stage: str, done: float) -> None:
        self.done[label] = max(self.done.get(label, 0.0), min(done, 1.0))
        self.tqdm.set_description_str(f"{label}: {stage}", refresh=False)
        self.tqdm.n = sum(self.done.values())
        self.tqdm.refresh()

    def close(self) -> None:
        self.tqdm.close()


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
    # Checkpoint and tokenizer as the candidate opens them, where the references need them in another form.
    own_files: tuple[str, str | None] | None = None

    def run(self) -> Evidence:
        """Raises UsageError for unusable input and process.Crash when an implementation fails."""
        paths = resolve(self.candidate)
        self.bar = Bar(len(self.references) + 1 + len(paths), self.progress)
        try:
            ev = self._references()
            traces = self._run([self._candidate_job(path, ev) for path in paths])
            labels = {path: f"candidate {path or ''}".strip() for path in paths}
            ev.candidates |= {path: traces[label] for path, label in labels.items() if label in traces}
            if any(trace.meta.get("ops") for trace in ev.candidates.values()):
                self._oracle_ops(ev)
        finally:
            self.bar.close()
        return ev

    def run_references(self) -> Evidence:
        """Without a candidate: what candidates that run in this process are judged by."""
        self.bar = Bar(len(self.references) + 1, self.progress)
        try:
            ev = self._references()
            self._oracle_ops(ev)
        finally:
            self.bar.close()
        return ev

    def _references(self) -> Evidence:
        first = self._run([self._job(f"reference.{name}", name, self.case) for name in self.references[:1]])
        trace = first[self.references[0]]
        case = replace(
            self.case,
            prompts=trace.sequences,
            positions=trace.meta["positions"],
            prompt_lengths=trace.meta["prompt_lengths"],
            max_new_tokens=0,
        )
        jobs = [self._job(f"reference.{name}", name, case) for name in self.references[1:]]
        jobs.append(self._job("reference.oracle", "oracle", replace(case, texts=None, corpus=[], dialogs=[])))
        traces = first | self._run(jobs)
        ev = Evidence(case, traces["oracle"], {name: traces[name] for name in self.references}, {})
        if self.ops and case.positions is None and case.record == "taps":
            forced = self.folder / "forced"
            ev.forced = {name: cut(ev.references[name], case.dtypes, forced / name) for name in self.references}
        return ev

    def _oracle_ops(self, ev: Evidence) -> None:
        """The float64 value of each operation on the inputs that each reference recorded."""
        case = replace(ev.case, texts=None, corpus=[], dialogs=[], weights=False)
        jobs = []
        for name, trace in ev.forced.items():
            job = self._job("reference.oracle", f"oracle-ops-{name}", replace(case, prompts=trace.sequences))
            jobs.append(replace(job, arguments=(*job.arguments, "--ops", str(trace.folder))))
        traces = self._run(jobs)
        ev.ops = {name: traces[f"oracle-ops-{name}"] for name in ev.forced}

    def _job(self, module: str, label: str, case: Case) -> Job:
        file = case.write(self.folder / f"{label}.json", "prompt_lengths")
        out = self.folder / label
        return Job(label, module, ("--case", str(file), "--out", str(out)), out)

    def _candidate_job(self, path: str | None, ev: Evidence) -> Job:
        label = f"candidate {path or ''}".strip()
        case = ev.case
        if self.own_files is not None:
            case = replace(case, checkpoint=self.own_files[0], tokenizer=self.own_files[1])
        file, out = case.write(self.folder / "candidate.json"), self.folder / label.replace(" ", "-")
        forced = [str(trace.folder) for trace in ev.forced.values()]
        return Job(label, "parity.candidates", (self.candidate, path or "-", str(file), str(out), *forced), out)

    def _run(self, jobs: list[Job]) -> dict[str, Trace]:
        """Single-threaded processes side by side, one a core; many-threaded ones after each other."""
        at_once = cores() if self.case.threads == 1 else 1
        with ExitStack() as stack:
            waiting = list(reversed(jobs))
            running: list[Process] = []
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(self._start(stack, waiting.pop()))
                ended = wait_any(running)
                running.remove(ended)
                self.peak_bytes = max(self.peak_bytes, ended.peak_bytes)
                try:
                    ended.finish()
                except Crash as crash:
                    if not ended.label.startswith("candidate"):
                        raise
                    self.crashes.append(str(crash))
        traces = {job.label: Trace(job.out) for job in jobs if (job.out / "trace.json").is_file()}
        for trace in traces.values():
            self.seconds_in_forward += trace.meta["seconds_forward"]
            self.notices += [n for n in trace.meta.get("notices", []) if n not in self.notices]
        return traces

    def _start(self, stack: ExitStack, job: Job) -> Process:
        log = self.folder / f"{job.label.replace(' ', '-')}.log"
        return stack.enter_context(started(job.label, job.module, list(job.arguments), log, self.bar))


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder that is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def threads_for(stored_bytes: int) -> int:
    """CPU threads of every implementation alike, since bits depend on how a sum is split.

    Small checkpoints get one: their processes run side by side, and threads that wait for each other on a busy core
    are slower than no threads.
    """
    return 1 if stored_bytes <= SMALL_BYTES else cores()


def cache_folder() -> Path:
    """Where made checkpoints are kept: $NANOLLAMA_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("NANOLLAMA_CACHE") or Path(base) / "nanollama")


def embedded_default() -> Path:
    """The tiny seeded checkpoint with the real Llama 3 tokenizer, made on first use. Raises UsageError."""
    from parity.shapes import SHAPES
    from parity.synth import synthesise

    folder = cache_folder() / "tiny-v2"
    if not (folder / "SHA256SUMS").is_file():
        try:
            synthesise(SHAPES["tiny"], folder)
        except OSError as error:
            raise UsageError(
                f"{cache_folder()}: the default checkpoint (70 MB) cannot be written there ({error.strerror}); "
                "set NANOLLAMA_CACHE to a folder with space"
            ) from None
    return folder


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.start
