"""Named tensors of a run in a .safetensors file, written as part of a folder that appears whole or not at all.

with staged(folder) as stage:
    write_tensors(stage, "model.safetensors", trained(model))
read_tensors(folder / "model.safetensors", torch.device("cpu"))
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from finetune.errors import UserError
from nanollama.checkpoint.staging import Stage
from nanollama.checkpoint.streams import write_safetensors
from nanollama.checkpoint.weights import lazy


def write_tensors(stage: Stage, name: str, tensors: Mapping[str, Tensor]) -> None:
    with stage.open(name) as file:
        write_safetensors(file, {key: lazy(t.detach().cpu()) for key, t in tensors.items()})


def read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Raises UserError."""
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove its folder to continue from an older one") from None
