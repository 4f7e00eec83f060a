"""RoPE's angles made otherwise: bands that do not blend, another exponent, positions that start again or stop."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference.files import Config

Angles = Callable[[Tensor, Tensor], Tensor]  # positions (N, 1), right frequencies (D/2,) -> (N, D/2), float64
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def angles(config: Config, tokens: int, first: int) -> Iterator[tuple[str, Angles]]:
    if config["rope_scaling"] is not None:
        for name, kept in _bands(config["rope_scaling"]).items():
            yield name, _by(_scaled(config, kept))
    yield "RoPE's exponents are i / head_dim, not 2i / head_dim", _by(_unscaled(config, 0.5))
    yield "RoPE's exponents are 2i / dim, not 2i / head_dim", _by(_unscaled(config, config["head_dim"] / config["dim"]))
    for length in sorted({n for n in LENGTHS if n < tokens} | {first} - {0}):
        yield f"positions start again after {length} tokens", partial(_starting_again, length)
    for last in sorted({n for n in LENGTHS if n < tokens} | {first - 1} - {-1}):
        yield f"positions stop at {last}", partial(_stopping, last)


def _starting_again(length: int, at: Tensor, right: Tensor) -> Tensor:
    return (at % length) * right


def _stopping(length: int, at: Tensor, right: Tensor) -> Tensor:
    return at.clamp(max=length) * right


def _by(frequencies: Tensor) -> Angles:
    return lambda at, right: at * frequencies


def _unscaled(config: Config, times: float) -> Tensor:
    """Other exponents; the scaling, if any, is applied as it should be to none: it goes by the right wavelengths."""
    exponents = times * torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
    plain = config["rope_theta"] ** -exponents
    scaling = config["rope_scaling"]
    return plain if scaling is None else _mixed(plain, scaling, _share(plain, scaling).clamp(0, 1))


def _scaled(config: Config, kept: Callable[[Tensor], Tensor]) -> Tensor:
    plain = config["rope_theta"] ** -(torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"])
    scaling = config["rope_scaling"]
    return _mixed(plain, scaling, kept(_share(plain, scaling)))


def _share(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    """How much of a frequency is kept, before it is cut to 0..1."""
    turns = scaling["original_context"] * plain / (2 * math.pi)
    return (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])


def _mixed(plain: Tensor, scaling: dict[str, Any], kept: Tensor) -> Tensor:
    return kept * plain + (1 - kept) * plain / scaling["factor"]


def _bands(scaling: dict[str, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Share before it is cut -> share."""
    return {
        "RoPE's bands do not blend: all between them is kept": lambda share: (share > 0).double(),
        "RoPE's bands do not blend: all between them is scaled": lambda share: (share >= 1).double(),
        "RoPE's bands do not blend: they meet in the middle": lambda share: (share > 0.5).double(),
        "RoPE's low_freq_factor and high_freq_factor are exchanged": lambda share: (1 - share).clamp(0, 1),
        "RoPE's blend goes the wrong way": lambda share: torch.where(
            (share > 0) & (share < 1), 1 - share, share.clamp(0, 1)
        ),
        "RoPE's scaling is applied to high frequencies, not to low ones": lambda share: (share <= 0).double(),
    }
