"""A seeded checkpoint whose bytes are the same on every machine, for kits that are to be made again elsewhere.

`torch.randn` is not: its vector code (AVX2 and up) and its plain code round logarithms and cosines otherwise, and 24 of
164,160 weights of parity.synth's checkpoint differ in bf16. Here are integers of `torch.randint`, their exact sums, and
one rounding each of a product, a quotient and a root, which IEEE 754 leaves no choice in. What the numbers are to show
is said in parity/synth/checkpoint.py: peaked q and k, small rows of the embedding, a head that decides.
"""

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from parity.synth.checkpoint import GAINS, SMALL_ROWS, meta_params, write_manifest
from parity.synth.shapes import Shape, weight_shapes

TERMS, STEPS = 8, 1 << 12  # a number is a sum of 8 whole numbers below 4096: nearly a normal distribution
DEVIATION = (TERMS * (STEPS * STEPS - 1) / 12) ** 0.5
# exp of the normal distribution's quantiles at 1/32, 3/32, ..: how long a row of the head is. Powers differ by machine.
SPREAD = (0.155, 0.268, 0.364, 0.46, 0.56, 0.669, 0.789, 0.925, 1.08, 1.27, 1.5, 1.78, 2.17, 2.75, 3.74, 6.44)
SMALL_RMS = 0.003  # of the smallest row; ten times that of the largest


def draw(name: str, part: str, size: tuple[int, ...], below: int) -> Tensor:
    """Whole numbers in 0 .. below-1, float64, from a generator seeded by the weight's name and the part of it."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{part}".encode()))
    return torch.randint(below, size, generator=generator).double()


def values(name: str, rows: int, columns: int) -> Tensor:
    """A weight, (rows, columns) float64."""
    terms = draw(name, "terms", (TERMS, rows, columns), STEPS)
    x = (sum(terms) - TERMS * (STEPS - 1) / 2) / DEVIATION  # whole numbers and halves below 2^15: exact sums
    if name.endswith("norm.weight"):
        return 1 + 0.25 * x
    spread = torch.tensor(SPREAD, dtype=torch.float64)[draw(name, "rows", (rows, 1), len(SPREAD)).long()]
    if name.startswith("tok_embeddings"):
        small = torch.arange(rows).unsqueeze(1) % SMALL_ROWS == 1
        tiny = SMALL_RMS * (1 + 9 * draw(name, "small", (rows, 1), 16) / 15)
        return x * torch.where(small, tiny, spread.sqrt())
    if name.startswith("output"):
        return x * spread / columns**0.5
    return x * GAINS.get(name.split(".", 3)[-1], 1.0) / columns**0.5


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """A folder in Meta's format: params.json, consolidated.00.pth in bf16, SHA256SUMS."""
    folder.mkdir()
    weights = dict[str, Tensor]()
    for name, size in weight_shapes(shape).items():
        source = "tok_embeddings.weight" if shape.tied and name == "output.weight" else name
        rows, columns = size if len(size) > 1 else (1, size[0])
        weights[name] = values(source, rows, columns).bfloat16().reshape(size)
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(shape), indent=1))
    write_manifest(folder)


def seeded_tokens(shape: Shape, lengths: tuple[int, ...]) -> list[list[int]]:
    return [draw("tokens", str(i), (n,), shape.vocab_size).long().tolist() for i, n in enumerate(lengths)]
