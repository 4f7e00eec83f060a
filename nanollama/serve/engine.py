"""One generation at a time: a thread that owns the model, and the jobs that wait for it.

A job is an iterator that is run in that thread; what it yields arrives in the event loop of whoever submitted it. One
that nobody waits for any more is left between two tokens, or amid a long prompt between two layers.

    job = engine.submit(lambda: llama.generate([ids], sampling))      # raises Busy
    async for event in job.results(): ...                             # and job.leave() at the end, whatever happens
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Busy(Exception):
    """As many jobs wait as may."""


class Left(Exception):
    """Nobody waits for this job any more."""


class Ended(Exception):
    """The server ends."""


class Job(Generic[T]):
    """One run of an iterator in the engine's thread. Made in the event loop that reads its results."""

    def __init__(self, start: Callable[[], Iterator[T]], closed: Callable[["Job[T]"], None]) -> None:
        self.start, self.gone, self._closed = start, False, closed
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Queue[Any]()

    async def results(self) -> AsyncIterator[T]:
        """What it yields, as it comes. Raises what it raises."""
        while True:
            kind, value = await self._told.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def leave(self) -> None:
        self.gone = True
        self._closed(self)

    def tell(self, kind: str, value: Any = None) -> None:
        """From any thread; to a loop that has ended, nothing."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hear, kind, value)

    def _hear(self, kind: str, value: Any) -> None:
        if kind != "value":
            self._closed(self)  # and not only when its client has read all of it, which it may never do
        self._told.put_nowait((kind, value))


class Engine:
    """waiting: jobs that may wait beside the one that runs."""

    def __init__(self, layers: nn.ModuleList, waiting: int) -> None:
        self.layers, self.waiting = layers, waiting
        self.open: list[Job[Any]] = []  # submitted and not left; in event loops alone
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, start: Callable[[], Iterator[T]]) -> Job[T]:
        """Raises Busy. Whoever submits a job leaves it in the end."""
        if len(self.open) > self.waiting:
            raise Busy
        job = Job(start, self._close)
        self.open.append(job)
        self._queue.put(job)
        return job

    def _close(self, job: Job[Any]) -> None:
        if job in self.open:
            self.open.remove(job)

    def end(self) -> None:
        """All jobs end with Ended; may be called from a signal handler."""
        for job in list(self.open):
            job.gone = True
            job.tell("error", Ended())
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the thread to end."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._run(job)

    def _run(self, job: Job[Any]) -> None:
        try:
            with left_between_layers(self.layers, job):
                for value in () if job.gone else job.start():
                    job.tell("value", value)
                    if job.gone:
                        raise Left
            job.tell("end")
        except Left:
            pass
        except Exception as error:  # the asker's server tells it; the next job is not concerned
            job.tell("error", error)


@contextmanager
def left_between_layers(layers: nn.ModuleList, job: Job[Any]) -> Iterator[None]:
    """Inside, a pass through the layers ends with Left once the job is gone: a long prompt is not read to its end."""

    def check(*_: Any) -> None:
        if job.gone and not torch.cuda.is_current_stream_capturing():  # a graph is recorded to its end
            raise Left

    handles = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
