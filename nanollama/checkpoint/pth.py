"""The .pth container alone: torch's zip of one pickle and one record per tensor, read without running anything.

python -c "from nanollama.checkpoint import pth; print(list(pth.read('consolidated.00.pth'))[:3])"
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor

from nanollama import gate
from nanollama.checkpoint.names import EMBEDDING, HEAD
from nanollama.checkpoint.weights import CheckpointError
from nanollama.gate import archive


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth file, its tensors memory-mapped.

    Raises CheckpointError for a damaged archive, a pickle of anything but plain tensors, overlapping tensors.
    """
    state = load(path)
    check_plain(path, state)
    return {name: tensor.detach() for name, tensor in state.items()}


def check_plain(path: Path, state: dict) -> None:
    """Names to plain, contiguous tensors on bytes of their own: all that a checkpoint of Meta's holds."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                path, f"{gate.shown(name)} is a {type(tensor).__name__}: expected a plain dict of tensors"
            )
        if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise CheckpointError(path, f"{name} is not a plain contiguous tensor; save it again with torch.save")
    _refuse_shared_bytes(path, state)


def load(path: Path) -> dict:
    """torch.load with weights_only, memory-mapped; any failure as one CheckpointError."""
    with gate.unchanged(path):
        archive.check(path)
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises whatever its zip reader, its unpickler or a rebuilt tensor raise
            raise CheckpointError(path, f"is not a plain state dict and is not loaded ({gate.reason(error)})") from None
    if not isinstance(state, dict):
        raise CheckpointError(path, f"holds a {type(state).__name__}: expected a plain dict of tensors")
    return state


def _refuse_shared_bytes(path: Path, state: dict[str, Tensor]) -> None:
    """Two weights on the same bytes are damage, except the two ends of a tied model."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in state.items() if t.numel())
    for (_, end, before), (start, _, name) in itertools.pairwise(spans):
        if start < end and {before, name} != {EMBEDDING, HEAD}:
            raise CheckpointError(path, f"{before} and {name} lie on the same bytes: the file is damaged")
