"""Right numbers in the wrong layout: what a port wrote, if its bytes are read otherwise than docs/kit.md says.

A port in another language has other habits: doubles, 16 bits, big-endian, text, columns first, heads before tokens,
rows padded to one length, a header. A file of another size, or whose numbers are wrong, is read in each of these ways;
one that gives the expected numbers says what to change.

    layout(path, exact, sequences)      # "the numbers are right as float64: write float32"
"""

import io
from collections.abc import Iterator, Sequence
from itertools import permutations
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLOSE = 2.0**-6  # of the RMS of what is expected: 16 bits are near enough, another array is not
LARGEST_BYTES = 1 << 28
KINDS = {8: (("<f8", "float64"), (">f8", "big-endian float64")), 4: ((">f4", "big-endian float32"),),
         2: (("<f2", "float16"), (">f2", "big-endian float16"))}  # fmt: skip
Reading = tuple[str, Tensor, int]  # what it was read as, the numbers, and of how many rows


def layout(path: Path, exact: Tensor, sequences: Sequence[int] = ()) -> str | None:
    """How the file holds the expected numbers, with the change to make; None where no way of reading gives them.

    exact: (N, ...) as expected; sequences: tokens of each, whose rows follow one another.
    """
    if path.stat().st_size > LARGEST_BYTES or not exact.numel():
        return None
    data = path.read_bytes()
    for words, numbers, rows in readings(data, exact, sequences):
        off, size = numbers.double() - exact[:rows].double(), exact[:rows].double().square().mean().sqrt()
        if float(off.square().mean().sqrt()) <= CLOSE * float(size):
            return f"the numbers are right {words}"
    return None


def readings(data: bytes, exact: Tensor, sequences: Sequence[int]) -> Iterator[Reading]:
    """Every way that fits the file's size."""
    shape, count = tuple(exact.shape), exact.numel()
    rows, width = shape[0], count // shape[0]
    if data.startswith(b"\x93NUMPY"):
        yield from npy(data, shape)
    for kind, name in KINDS.get(len(data) // count if len(data) % count == 0 else 0, ()):
        yield f"as {name}: write little-endian float32", as_numbers(data, kind, shape), rows
    if len(data) == 2 * count:
        words = torch.from_numpy(np.frombuffer(data, "<i2").copy()).view(torch.bfloat16)
        yield "as bf16: write float32", words.reshape(shape), rows
    if len(data) == 4 * count:
        yield from rearranged(as_numbers(data, "<f4", shape), shape)
    longest = max(sequences, default=0)
    if len(data) == 4 * len(sequences) * longest * width and sum(sequences) == rows and len(data) > 4 * count:
        padded = as_numbers(data, "<f4", (len(sequences), longest, width))
        packed = torch.cat([row[:n] for row, n in zip(padded, sequences, strict=True)]).reshape(shape)
        yield f"with rows padded to {longest} tokens: write sequences one after another, without padding", packed, rows
    if 4 * count < len(data) <= 4 * count + 4096:
        extra = len(data) - 4 * count
        yield f"behind a header of {extra} bytes: leave it out", as_numbers(data[extra:], "<f4", shape), rows
        yield f"with {extra} bytes too many at the end", as_numbers(data[:-extra], "<f4", shape), rows
    if len(data) < 4 * count and len(data) % (4 * width) == 0 and data:
        first = len(data) // (4 * width)
        part = as_numbers(data, "<f4", (first, *shape[1:]))
        yield f"in the first {first} of {rows} rows: the others are missing", part, first
    yield from text(data, shape)


def as_numbers(data: bytes, kind: str, shape: tuple[int, ...]) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.frombuffer(data, kind, prod(shape)).astype(np.float64)).reshape(shape)


def npy(data: bytes, shape: tuple[int, ...]) -> Iterator[Reading]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError:
        return
    if array.size == prod(shape) and array.dtype.kind == "f":
        numbers = torch.from_numpy(array.astype(np.float64)).reshape(shape)
        yield "in a .npy file: write the numbers alone (float32, tofile)", numbers, shape[0]


def rearranged(numbers: Tensor, shape: tuple[int, ...]) -> Iterator[Reading]:
    """Float32 of the right size with its axes in another order, or features paired as in Hugging Face's files."""
    for order in permutations(range(len(shape))):
        if order != tuple(range(len(shape))):
            stored = numbers.reshape([shape[axis] for axis in order])
            back = stored.permute([order.index(axis) for axis in range(len(shape))])
            held = " x ".join(str(shape[axis]) for axis in order)
            yield f"in the order {held}: write {' x '.join(map(str, shape))}, rows first", back, shape[0]
    if len(shape) == 3 and shape[2] % 2 == 0:
        halves = numbers.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        yield "with features j and j + D/2 as a pair: write pairs beside each other, 2j and 2j+1", halves, shape[0]


def text(data: bytes, shape: tuple[int, ...]) -> Iterator[Reading]:
    try:
        words = data.decode("ascii").replace(",", " ").split() if len(data) >= prod(shape) else []
        numbers = [float(word) for word in words] if len(words) == prod(shape) else []
    except ValueError:
        return
    if numbers:
        yield "as text: write raw little-endian float32", torch.tensor(numbers).double().reshape(shape), shape[0]
