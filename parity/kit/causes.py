"""Mistakes that a kit shows and a single sequence does not, or that ports make and nanollama's mutants do not.

cause(port, "layers.0.attn_mix", rows)      # "a document sees the documents before it"
"""

from typing import Protocol

import torch
from torch import Tensor

from parity.explain.rotation import frequencies
from parity.kit.arrays import Kit

SHARE = 0.9  # of the squared error that a mistake has to explain, as in parity/explain


class Answers(Protocol):
    """A port's arrays and the kit that they answer."""

    @property
    def kit(self) -> Kit: ...

    @property
    def dtype(self) -> str: ...

    def get(self, name: str) -> Tensor: ...

    def name(self, plain: str) -> str: ...


def cause(port: Answers, tap: str, sequence: int) -> str | None:
    """What is wrong with a tap, (N, ...), at the rows of one sequence; None where nothing known explains it."""
    name, starts = port.name(tap), port.kit.starts
    rows = slice(starts[sequence], starts[sequence + 1])
    mine, exact = port.get(name)[rows].double(), port.kit.get(name)[rows]
    if tap.endswith("attn_mix") and rows.start and explains(mixed(port, tap, rows), mine, exact):
        return "attention crosses documents: tokens see the sequences before their own"
    if tap.endswith(("q_rope", "k_rope")) and explains(rotated_in_halves(port, tap, rows), mine, exact):
        return "RoPE pairs features j and j + D/2 (Hugging Face's order); these weights pair 2j and 2j+1"
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        if (
            word != port.dtype
            and torch.equal(mine.to(dtype).double(), mine)
            and not torch.equal(exact.to(dtype).double(), exact)
        ):
            return f"every number is one of {word}: it was rounded to it"
    return None


def explains(wrong: Tensor, mine: Tensor, exact: Tensor) -> bool:
    left, error = (mine - wrong).square().sum(), (mine - exact).square().sum()
    return bool(left <= (1 - SHARE) * error)


def mixed(port: Answers, tap: str, rows: slice) -> Tensor:
    """attn_mix of these rows where every earlier row is seen, (T, H D), from the kit's own q_rope, k_rope and v."""
    q, k, v = (port.kit.get(port.name(tap.replace("attn_mix", part))) for part in ("q_rope", "k_rope", "v"))
    q, group = q[rows], q.shape[1] // k.shape[1]
    k, v = (x[: rows.stop].repeat_interleave(group, 1) for x in (k, v))
    hidden = torch.arange(rows.stop) > torch.arange(rows.start, rows.stop)[:, None]
    scores = torch.einsum("thd,uhd->htu", q, k) / q.shape[2] ** 0.5
    return torch.einsum("htu,uhd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def rotated_in_halves(port: Answers, tap: str, rows: slice) -> Tensor:
    """The tap with features j and j + D/2 as a pair, (T, heads, D)."""
    x = port.kit.get(port.name(tap.removesuffix("_rope")))[rows]
    positions = torch.arange(len(x), dtype=torch.float64)
    angle = torch.outer(positions, frequencies(port.kit.table["config"]))[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
