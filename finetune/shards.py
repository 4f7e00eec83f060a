"""A state in shards, by torch.distributed.checkpoint: read onto any mesh, and what the disk refuses said as ever.

weights, states = read_shards(folder, parameters)
"""

import io
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from finetune.errors import UserError
from finetune.gather import local
from finetune.listed import read_list
from nanollama.checkpoint import CheckpointError
from nanollama.gate import archive, reason

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


@contextmanager
def read_errors(folder: Path) -> Iterator[None]:
    """What the library wraps, of whichever rank, is one line again, as UserError."""
    try:
        yield
    except CheckpointException as failed:
        errors = [error for error, _ in failed.failures.values()]
        error = next((e for e in errors if isinstance(e, UserError)), errors[0] if errors else failed)
        what = str(error) if isinstance(error, UserError) else f"{folder}: cannot be read ({reason(error)})"
        raise UserError(f"{what}: remove {folder.parent} to continue from an older one") from None


class Reader(dcp.FileSystemReader):
    """The library's, with a gate before its two doors: the list is a pickle, and so is each part of a tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_list(Path(self.path))
        self.tensors = tensors_of(metadata)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            part = self._part(item.storage_index)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            room = planner.resolve_tensor(item).detach()
            room.copy_(part)
            planner.commit_tensor(item, room)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, index: Any) -> Tensor:
        """A part of a tensor as one rank wrote it. Raises UserError unless it is what the list says."""
        place, listed = self.storage_data[index], self.tensors[index.fqn]
        path = Path(self.path) / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        try:
            archive.check_stream(path, data)
            data.seek(0)
            part = torch.load(data, map_location="cpu", weights_only=True)
        except (CheckpointError, RuntimeError) as error:
            what = str(error) if isinstance(error, CheckpointError) else f"{path}: cannot be read ({reason(error)})"
            raise UserError(what) from None
        sizes = next(chunk.sizes for chunk in listed.chunks if chunk.offsets == index.offset)
        if not isinstance(part, Tensor) or part.dtype != listed.properties.dtype or part.shape != sizes:
            raise UserError(f"{path}: {index.fqn} is stored there as another than the list says")
        return part


def described(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor. Raises UserError."""
    listed = tensors_of(read_list(folder))
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in listed.items()}


def tensors_of(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {n: entry for n, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}


def read_shards(folder: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, optimizer states) of a checkpoint's shards, laid out as the parameters of this run are.

    The tensors are this rank's parts, whoever wrote them; states are named "parameter name:state name".
    """
    reader = Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: _room_for(entry, parameters.get(name.partition(":")[0])) for name, entry in stored.items()}
    with warnings.catch_warnings(), read_errors(folder):
        warnings.filterwarnings("ignore", ONE_PROCESS)
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    states = {name: local(tensor) for name, tensor in tensors.items() if ":" in name}
    return {name: local(tensor) for name, tensor in tensors.items() if ":" not in name}, states


def _room_for(entry: Any, parameter: nn.Parameter | None) -> Tensor:
    dtype = entry.properties.dtype
    if parameter is not None and entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype, device=parameter.device if parameter is not None else "cpu")
