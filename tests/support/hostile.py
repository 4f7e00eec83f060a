"""A hostile file: a valid checkpoint with one thing in it that is not as it should be.

Each maker changes a small folder, Meta's or Hugging Face's, which both sides open; `part` is in the refusing line.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reference_checkpoints import Shape, make_weights, write_hf, write_meta

Make = Callable[[Path], object]
SHAPE = Shape(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=48, vocab_size=31, head_dim=8)


@dataclass(frozen=True)
class Hostile:
    """format: meta or hf. part: of our line; other: of the reference's, where it says it otherwise."""

    format: str
    make: Make
    part: str
    other: str = ""


def write(folder: Path, format: str) -> Path:
    writer = write_meta if format == "meta" else write_hf
    return writer(folder, SHAPE, make_weights(SHAPE))


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
