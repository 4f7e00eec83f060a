"""Numbers as fewer bits hold them: integers with scales, short floats; what a candidate declares, the oracle rounds so.

rounding("int8/32")(x)     # (..., K) -> the nearest integers times a scale for each 32 numbers of a row
rounding("fp8")(x)         # 4 exponent bits and 3 of the mantissa, saturating
rounding("fp8/row")(x)     # these, with a scale for each row
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.files.weights import DTYPES, Unusable

Round = Callable[[Tensor], Tensor]

FLOATS = {
    **{name: DTYPES[name] for name in ("fp16", "bf16")},
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def exact(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Integers:
    """Integers of so many bits, symmetric about 0: one scale for a row, or for each group of it."""

    bits: int
    group: int | None = None

    @classmethod
    def parse(cls, scheme: str) -> "Integers":
        """From "int8" (a scale for each row) or "int4/32" (one for each 32 inputs). Raises Unusable."""
        match = re.fullmatch(r"int([2-8])(?:/([1-9]\d*))?", scheme)
        if match is None:
            raise Unusable(f"{scheme!r} names no integers: expected int8, or int4/32 with one scale for 32 inputs")
        return cls(int(match[1]), int(match[2]) if match[2] else None)

    def round(self, x: Tensor) -> Tensor:
        """(..., K) float64 -> the nearest representable, one scale at a time."""
        largest = 2 ** (self.bits - 1) - 1
        parts = []
        for part in x.split(self.group or x.shape[-1], dim=-1):
            scales = part.abs().amax(-1, keepdim=True) / largest
            parts.append((part / scales.clamp(min=1e-300)).round() * scales)
        return torch.cat(parts, dim=-1)


def to_float(kind: torch.dtype) -> Round:
    """To the nearest number of that type; beyond its largest one, that one."""
    largest = torch.finfo(kind).max
    return lambda x: x.clamp(-largest, largest).to(kind).double()


def scaled_fp8(x: Tensor) -> Tensor:
    """(..., K) -> the largest number of each row is fp8's largest times the row's scale."""
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-300) / torch.finfo(FLOATS["fp8"]).max
    return (x / scales).to(FLOATS["fp8"]).double() * scales


def rounding(scheme: str) -> Round:
    """Raises Unusable for a scheme that is none."""
    if scheme == "fp8/row":
        return scaled_fp8
    if scheme in FLOATS:
        return to_float(FLOATS[scheme])
    if scheme.startswith("int"):
        return Integers.parse(scheme).round
    raise Unusable(f"{scheme!r} names no rounding: expected {', '.join(FLOATS)}, int8, int8/32, ...")


BF16, FP16 = rounding("bf16"), rounding("fp16")


@dataclass(frozen=True)
class Rounded:
    """What a forward pass rounds, beyond floating point."""

    weights: Round = exact  # of the linear layers and the head, rows of them (n, K)
    inputs: Round = exact  # of these layers, (N, K)
    cache: Round = exact  # rotated keys, and values, (N, heads, D)
    attention: Round = exact  # rotated queries (N, heads, D), and the attention weights (T, T)

    @classmethod
    def declared(
        cls, integers: str | None, activations: str | None, kv: str | None, attention_dtype: str | None
    ) -> "Rounded":
        """As a candidate declares it. Raises Unusable for a scheme that is none."""
        return cls(
            rounding(integers) if integers else exact,
            rounding(activations) if activations else exact,
            rounding(kv) if kv else exact,
            rounding(attention_dtype) if attention_dtype else exact,
        )


NOTHING = Rounded()
