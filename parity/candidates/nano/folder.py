"""A kit's weights as checkpoint folders that a candidate's own loader opens, whichever of the two formats it reads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollama.checkpoint import write_hf, write_meta
from nanollama.model import ModelConfig, RopeScaling


def write_folders(folder: Path, echo: dict[str, Any], weights: Mapping[str, Tensor]) -> list[Path]:
    """float32, `echo` being the config's: a folder of both formats' files, and Hugging Face's alone, for a reader that
    refuses a folder of two formats, as ours does."""
    scaling = RopeScaling(**echo["rope_scaling"]) if echo["rope_scaling"] else None
    config = ModelConfig(**(echo | {"rope_scaling": scaling}))
    both, hf, held = folder / "both", folder / "hf", dict(weights)
    write_hf(hf, config, held)
    if config.head_dim * config.n_heads != config.dim:
        return [hf]  # Meta's format cannot say it
    held.setdefault("output.weight", held["tok_embeddings.weight"])
    write_meta(both, config, held)
    for file in hf.iterdir():
        shutil.copyfile(file, both / file.name)
    return [both, hf]
