"""The driver of a candidate that is run layer by layer: its forward pass alone; what needs the whole model at once is
not covered."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parity.candidates import answers
from parity.candidates.interface import WAYS, Interface, asking
from parity.contract import Case
from parity.run.recording import Progress, Recording
from parity.trace import TraceWriter


def run_streamed(candidate: Interface, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> Recording:
    out = Recording(dtype)
    out.uncovered = {way.kind: f"{dtype} of this checkpoint is run layer by layer" for way in WAYS if not way.bitwise}
    with out.count_seconds(), out.step("logits", "logits", "G3"), torch.no_grad():
        n_parts = 2 + (candidate.ask("config")["n_layers"] if "config" in candidate.has else 100)
        for n, (part, tensors) in enumerate(_parts(candidate, case)):
            keep = tensors if case.record == "taps" else {k: t for k, t in tensors.items() if k.endswith("/logits")}
            writer.part(dtype, part, keep)
            progress(f"{dtype} {part}", (n + 1) / n_parts)
        out.done = True
    return out


def _parts(candidate: Interface, case: Case) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What stream() yields; what it raises on the way is a crash of it."""
    made = candidate.ask("stream", case.prompts, case.positions)
    while True:
        with asking(candidate.row("stream").signature, candidate.file):
            found = next(made, None)  # of anything but an iterator, a TypeError
        if found is None:
            return
        yield answers.part(found)
