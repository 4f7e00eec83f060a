"""A state in shards, by torch.distributed.checkpoint: read onto any mesh, and what the disk refuses said as ever.

weights, states = read_shards(folder, parameters)
"""

import pickle
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from finetune.errors import UserError
from finetune.gather import local
from nanollama.checkpoint import CheckpointError

RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
PLAIN = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("torch", "dtype")}
PLAIN |= {("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int8", "uint8", "int64")}
PLAIN |= {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}
PLAIN |= {("collections", "OrderedDict"), ("torch._C", "_get_layout")}
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


class Reader(dcp.FileSystemReader):
    """The library's, whose list of tensors is a pickle: only what such a list is made of is let in."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = Listed(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("its .metadata lists no tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Listed(pickle.Unpickler):
    """Of the library's own records of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module in RECORDS and name.strip("_")[:1].isupper()) or (module, name) in PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata asks for {module[:40]}.{name[:40]}: it is not as a run wrote it")


def described(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor. Raises UserError."""
    try:
        listed = Reader(folder).read_metadata().state_dict_metadata
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{folder}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return {
        name: (tuple(e.size), e.properties.dtype) for name, e in listed.items() if isinstance(e, TensorStorageMetadata)
    }


def read_shards(folder: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, optimizer states) of a checkpoint's shards, laid out as the parameters of this run are.

    The tensors are this rank's parts, whoever wrote them; states are named "parameter name:state name".
    """
    reader = Reader(folder)
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
