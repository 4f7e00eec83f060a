"""Jobs are run, each in a process of its own: their traces, and what they cost.

Single-threaded processes go side by side, one a core; many-threaded ones one after the other.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from parity.contract import UsageError
from parity.machine import cores
from parity.run.cache import TraceCache
from parity.run.jobs import Job, awaited, case_file
from parity.run.process import Crash, Process, start_process, wait_any
from parity.run.progress import Bar
from parity.run.run_candidate import last_asked
from parity.trace import Trace

TEXTS = " texts"  # ends the labels of witnesses
# What a later round's trace.json adds to that of an earlier one, by dtype.
BY_DTYPE = ("dtypes", "streamed", "generated", "self", "extra", "uncovered", "answers", "log_probs", "undone")


@dataclass
class RunLog:
    """What the processes of a run cost, and what they remarked."""

    seconds_in_forward: float = 0.0
    peak_bytes: int = 0
    notices: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # of the candidate: a result, not the end of the run
    cached: list[str] = field(default_factory=list)  # labels of jobs whose traces came from the cache

    def note(self, notices: Sequence[str]) -> None:
        """What was not remarked yet."""
        self.notices += [text for text in notices if text not in self.notices]

    def note_memory(self, peak_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_bytes)


class Executor:
    """Runs the jobs of one run; `log` says what they cost. cache: of the references' and the oracle's traces.

    waiting: by job label, processes that were started before their job was known.
    """

    def __init__(
        self, folder: Path, threads: int, progress: bool, cache: TraceCache | None, waiting: Mapping[str, Process] = {}
    ) -> None:
        self.folder, self.progress, self.cache = folder, progress, cache
        self.at_once = cores() if threads == 1 else 1
        self.log = RunLog()
        self.traces: dict[str, Trace] = {}  # by job label
        self.keys: dict[str, str | None] = {}  # by job label: the cache's entry that its trace is, for sure
        self.waiting = dict(waiting)

    @contextmanager
    def show(self, jobs: int) -> Iterator[None]:
        """A progress bar over so many jobs."""
        self.bar = Bar(jobs, self.progress)
        try:
            yield
        finally:
            self.bar.close()

    @contextmanager
    def start_ahead(self, jobs: list[Job]) -> Iterator[None]:
        """Imports take seconds: let these begin with them. Each gets its case when a job of its label is executed."""
        with ExitStack() as stack:
            self.waiting |= {job.label: self._start(stack, job) for job in jobs}
            yield

    def execute(self, jobs: list[Job]) -> dict[str, Trace]:
        """Traces by label; a candidate's that crashed before its first has none.

        Raises UsageError for unusable input and process.Crash when a reference fails.
        """
        keys = {job.label: self._key(job) for job in jobs}
        with ExitStack() as stack:
            left = [job for job in reversed(jobs) if not self._restore(job, keys[job.label])]
            running: list[tuple[Job, Process]] = []
            while left or running:
                while left and len(running) < self.at_once:
                    job = left.pop()
                    running.append((job, self._begin(stack, job)))
                ended = wait_any([process for _, process in running])
                job = next(job for job, process in running if process is ended)
                running.remove((job, ended))
                self.log.note_memory(ended.peak_bytes)
                self._finish(job, ended, keys[job.label])
        return {job.label: self._trace(job) for job in jobs if (job.out / "trace.json").is_file()}

    def is_cached(self, job: Job) -> bool:
        return self.cache is not None and self.cache.has(self._key(job))

    def _finish(self, job: Job, process: Process, key: str | None) -> None:
        try:
            process.finish()
            self._keep(job, key)
        except (Crash, UsageError) as error:
            if job.label.endswith(TEXTS):
                self.log.notices.append(f"{job.label} were not read: {error}")
            elif isinstance(error, Crash) and job.label.startswith("candidate"):
                self.log.crashes.append(f"{error}{while_asked(job.out)}")
            else:
                raise

    def _key(self, job: Job) -> str | None:
        """The name of a job's trace in the cache; None of one that is not kept."""
        if self.cache is None or not job.module.startswith("reference."):
            return None
        if job.module == "reference.mistakes.explain":  # how much of its table it asks depends on the time that it has
            return None
        case = json.loads(case_file(self.folder, job.label).read_text())
        return self.cache.key(job.module, list(job.arguments[4:]), case, self.folder)

    def _restore(self, job: Job, key: str | None) -> bool:
        if self.cache is None or not self.cache.restore(key, job.out):
            return False
        self.log.cached.append(job.label)
        self.keys[job.label] = key
        self.bar(job.label, "from the cache", 1.0)
        return True

    def _keep(self, job: Job, key: str | None) -> None:
        """For the next run, unless a file changed while this one read it."""
        if self.cache is None or key is None or key != self._key(job):
            return
        self.keys[job.label] = key
        try:
            self.cache.keep(key, job.out)
        except OSError as error:
            self.log.note([f"traces are not kept in {self.cache.folder}: {error.strerror or error}"])

    def _trace(self, job: Job) -> Trace:
        """The job's trace, together with what earlier rounds left in the same folder."""
        trace = Trace(job.out)
        self.log.seconds_in_forward += 0.0 if job.label in self.log.cached else trace.meta["seconds_forward"]
        self.log.note(trace.meta.get("notices", []))
        known = self.traces.setdefault(job.label, trace)
        if known is not trace:
            for key in BY_DTYPE:
                known.meta[key] = known.meta.get(key, {}) | trace.meta.get(key, {})
            old = known.meta.get("failures", [])
            known.meta["failures"] = old + [f for f in trace.meta.get("failures", []) if f not in old]
        return known

    def _begin(self, stack: ExitStack, job: Job) -> Process:
        if (process := self.waiting.pop(job.label, None)) is None:
            return self._start(stack, job)
        process.on_progress = self.bar
        process.feed(awaited(job, self.folder))
        return process

    def _start(self, stack: ExitStack, job: Job) -> Process:
        log = self.folder / f"{job.label.replace(' ', '-')}.log"
        return stack.enter_context(start_process(job.label, job.module, list(job.arguments), log, self.bar, job.waits))


def while_asked(out: Path) -> str:
    """What a candidate's process was doing when it died, where that is known."""
    asked = last_asked(out)
    return f", while it was asked {asked}" if asked else ""
