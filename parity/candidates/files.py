"""Arrays that a program wrote, read as a stranger's files: what is no regular file of the right size is not read.

    read_float32(Path("OUT/logits.f32"), (1, 3, -1), 512, "./my_port")      # a tensor (1, 3, V)

A link could lead to the references' own numbers, a device has no end, a pipe is waited for.
"""

import math
import os
import stat
from pathlib import Path

import torch
from torch import Tensor

SUFFIX = ".f32"
MOST_FILES = 100_000  # of one answer: 126 layers have some thousand taps


def list_arrays(folder: Path, program: str) -> dict[str, Path]:
    """The arrays in a folder by name. Raises RuntimeError where it is none any more, or holds too many."""
    if folder.is_symlink() or not folder.is_dir():
        raise RuntimeError(f"{program} put something else in the place of the folder {folder.name}")
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MOST_FILES:
                raise RuntimeError(f"{program} wrote more than {MOST_FILES:,} files")
            if entry.name.endswith(SUFFIX):
                found[entry.name.removesuffix(SUFFIX)] = folder / entry.name
    return found


def read_float32(file: Path, shape: tuple[int, ...] | list[int], most: int, program: str) -> Tensor:
    """float32 of this shape, in which one size may be -1, up to `most`. Raises RuntimeError, one line."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise RuntimeError(f"{program} answered ok and wrote no {file.name}") from None
    except OSError as error:
        what = "a link" if file.is_symlink() else f"not to be read ({error.strerror})"
        raise RuntimeError(f"{file.name} is {what}: expected a file of float32") from None
    state = os.fstat(opened)
    if not stat.S_ISREG(state.st_mode):
        os.close(opened)
        raise RuntimeError(f"{file.name} is no regular file: expected one of float32")
    with open(opened, "rb") as content:
        size, known = state.st_size, math.prod(n for n in shape if n != -1)
        fits = 4 * known == size if -1 not in shape else known > 0 and size in range(0, 4 * known * most + 1, 4 * known)
        if not (size and fits):
            raise RuntimeError(f"{file.name} holds {size} bytes: expected {describe_shape(shape)} of float32")
        data = bytearray(size)
        if content.readinto(data) != size:
            raise RuntimeError(f"{file.name} became shorter while it was read")
    return torch.frombuffer(data, dtype=torch.float32).view(*shape)


def describe_shape(shape: tuple[int, ...] | list[int]) -> str:
    if tuple(shape)[-1:] == (-1,):
        return f"{math.prod(shape[:-1])} rows"
    return f"({', '.join('n' if n == -1 else str(n) for n in shape)})"
