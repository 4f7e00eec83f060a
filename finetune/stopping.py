"""How a run is asked to stop: by SIGINT or SIGTERM, behind the step, or between two layers of a step that takes long.

with StopSignals() as signals, stopping_between_layers(model, config, world, signals):
    ...                    # a forward or backward pass raises StoppedAmid, two seconds after the signal
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor

from finetune.config import TrainConfig
from finetune.launcher import started_by_torchrun
from finetune.parallelize import World
from nanollama.model import Transformer

BEHIND_THE_STEP_S = 2.0  # so long a step may go on after the signal; a scheduler's own patience ends in 10 to 30 s


class StoppedAmid(Exception):
    """A signal came, and the pass that it met takes long: what it has is worth nothing, the parameters are whole."""


class StopSignals:
    """SIGINT and SIGTERM set `caught`, and the loop stops behind the step; a second one acts as usual.

    Under torchrun it does not: what is typed there comes from the terminal and once more from torchrun, which itself
    ends what does not stop in 30 s.
    """

    def __init__(self) -> None:
        self.caught, self.caught_at = 0, 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught, self.caught_at = number, time.monotonic()
        if not started_by_torchrun():
            self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def stop_where_late(self) -> None:
        """Raises StoppedAmid where a signal came and was not obeyed for `BEHIND_THE_STEP_S`."""
        if self.caught and time.monotonic() - self.caught_at > BEHIND_THE_STEP_S:
            raise StoppedAmid


@contextmanager
def stopping_between_layers(
    model: Transformer, config: TrainConfig, world: World, signals: StopSignals
) -> Iterator[None]:
    """In here each layer asks before its pass back and after its pass forward whether the run is to stop.

    Not where others wait for this process, where the backward pass has updated parameters already, or where the layers
    are compiled into one: those stop behind the step.
    """
    if world.size > 1 or config.optimizer_in_backward or config.compile:
        yield
        return

    def see(layer: Any, inputs: Any, output: Tensor) -> None:
        signals.stop_where_late()
        if output.requires_grad:
            output.register_hook(lambda _: signals.stop_where_late())

    hooks = [layer.register_forward_hook(see) for layer in model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
