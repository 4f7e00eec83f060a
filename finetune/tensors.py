"""Named tensors of a run in a .safetensors file: whole in the file, each rank reads its part.

with staged(folder) as stage:
    write_tensors(stage, "model.safetensors", trained(model), whole)
read_into_(trained(model), folder / "model.safetensors")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.errors import UserError
from finetune.gather import Whole, local
from nanollama.checkpoint.staging import Stage
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import Lazy
from nanollama.tensor_parallel import part_of


def write_tensors(stage: Stage, name: str, tensors: Mapping[str, Tensor], whole: Whole) -> None:
    entries = {key: _when_asked(tensor, whole) for key, tensor in tensors.items()}
    with stage.open(name) as file:
        write_safetensors(file, entries)


def _when_asked(tensor: Tensor, whole: Whole) -> Lazy:
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda start, stop: whole(tensor)[start:stop])


def read_tensors(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This rank's part of each tensor in the file, on its parameter's device; states lie as their parameters do."""
    device = str(next(iter(parameters.values())).device)
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            return {name: _read_part(file, name, parameters.get(name.partition(":")[0])) for name in file.keys()}  # noqa: SIM118 (a handle, no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove its folder to continue from an older one") from None


def _read_part(file: Any, name: str, parameter: Tensor | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return file.get_tensor(name)
    part = part_of(parameter)
    if any(rows.start == rows.stop for rows in part):  # fewer rows than ranks
        return torch.empty_like(local(parameter))
    return file.get_slice(name)[part].contiguous()


def read_into_(parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """The parameters become those of the file. Raises UserError where it holds others."""
    weights = read_tensors(path, parameters)
    if weights.keys() != parameters.keys():
        raise UserError(f"{path.parent}: {path.name} does not hold the parameters that this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(weights[name])
