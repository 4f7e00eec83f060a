"""Candidates with integer weights: wrong ones, each in one way, and one that claims finer integers than it has."""

from collections.abc import Callable

import torch
from torch import nn

from nanollama.speed.quantize import QuantLinear
from parity.candidates.quantized import Quantized

Load = Callable[[str, torch.dtype, str], Quantized]


def wrong(change: Callable[[Quantized], None], scheme: str = "int8") -> Load:
    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Quantized:
        candidate = Quantized(checkpoint, dtype, device, scheme)
        change(candidate)
        return candidate

    return load


def linear(candidate: Quantized, name: str) -> QuantLinear:
    module: nn.Module = candidate.model.get_submodule(name)
    assert isinstance(module, QuantLinear)
    return module


def _scale_of_the_next_row(candidate: Quantized) -> None:
    layer = linear(candidate, "layers.1.feed_forward.w1")
    layer.scales = layer.scales.roll(1, 0)


def _scale_of_the_next_group(candidate: Quantized) -> None:
    layer = linear(candidate, "layers.1.feed_forward.w1")
    layer.scales = layer.scales.roll(1, 1)


def _claims_int8(candidate: Quantized) -> None:
    candidate.integers = "int8"


def _unheard_of(candidate: Quantized) -> None:
    candidate.integers = "nf4"


wrong_rows = wrong(_scale_of_the_next_row)
wrong_groups = wrong(_scale_of_the_next_group, "int4")
claims_int8 = wrong(_claims_int8, "int4")
unheard_of = wrong(_unheard_of)
