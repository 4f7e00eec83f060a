"""A state in shards, by torch.distributed.checkpoint: read onto any mesh, and what the disk refuses said as ever.

weights, states = read_shards(folder, parameters)
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from finetune.gather import local
from nanollama.checkpoint import CheckpointError

ONE_PROCESS = "torch.distributed is disabled"  # how the library's warning begins that one process saves or loads alone


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """What the library wraps is the disk's own refusal again, as CheckpointError. The first rank's, of several."""
    try:
        yield
    except CheckpointException as failed:
        errors = [error for error, _ in failed.failures.values()]
        refused = next((error for error in errors if isinstance(error, OSError)), None)
        if refused is None:
            raise
        try:
            raise refused
        except OSError:
            reason = refused.strerror or str(refused)
            raise CheckpointError(place, f"cannot be written ({reason}): choose another place or free some") from None


def read_shards(folder: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, optimizer states) of a checkpoint's shards, laid out as the parameters of this run are.

    The tensors are this rank's parts, whoever wrote them; states are named "parameter name:state name".
    """
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: _room_for(entry, parameters.get(name.partition(":")[0])) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ONE_PROCESS)
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    states = {name: local(tensor) for name, tensor in tensors.items() if ":" in name}
    return {name: local(tensor) for name, tensor in tensors.items() if ":" not in name}, states


def _room_for(entry: Any, parameter: nn.Parameter | None) -> Tensor:
    dtype = entry.properties.dtype
    if parameter is not None and entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype, device=parameter.device if parameter is not None else "cpu")
