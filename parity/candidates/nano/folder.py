"""A kit's weights as checkpoint folders that a candidate's own loader opens, whichever of the two formats it reads."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollama.checkpoint import CheckpointError, write_bin, write_hf, write_meta
from nanollama.model import ModelConfig, RopeScaling


def config_of(echo: dict[str, Any]) -> ModelConfig:
    scaling = RopeScaling(**echo["rope_scaling"]) if echo["rope_scaling"] else None
    return ModelConfig(**(echo | {"rope_scaling": scaling}))


def write_each(folder: Path, echo: dict[str, Any], weights: Mapping[str, Tensor], tokens: int) -> dict[str, str]:
    """float32 in every format that can say the config, below `folder`: name -> why it was not written, or "".

    tokens: positions that llama2.c's file holds a RoPE table for.
    """
    config, held, lacking = config_of(echo), dict(weights), dict[str, str]()
    with_head = {**held, "output.weight": held.get("output.weight", held["tok_embeddings.weight"])}
    for name, write in (
        ("hf", lambda path: write_hf(path, config, held)),
        ("meta", lambda path: write_meta(path, config, with_head)),
        ("model.bin", lambda path: write_bin(path, replace(config, max_seq_len=tokens), held)),
    ):
        try:
            write(folder / name)
            lacking[name] = ""
        except CheckpointError as error:
            lacking[name] = str(error).removeprefix(f"{folder / name}: ")
    return lacking


def write_folders(folder: Path, echo: dict[str, Any], weights: Mapping[str, Tensor]) -> list[Path]:
    """float32, `echo` being the config's: a folder of both formats' files, and Hugging Face's alone, for a reader that
    refuses a folder of two formats, as ours does."""
    config = config_of(echo)
    both, hf, held = folder / "both", folder / "hf", dict(weights)
    write_hf(hf, config, held)
    if config.head_dim * config.n_heads != config.dim:
        return [hf]  # Meta's format cannot say it
    held.setdefault("output.weight", held["tok_embeddings.weight"])
    write_meta(both, config, held)
    for file in hf.iterdir():
        shutil.copyfile(file, both / file.name)
    return [both, hf]
