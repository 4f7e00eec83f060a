"""An exponential moving average of the weights (`--ema 0.999`), validated beside them, and what final/ holds.

It lies among the optimizer's states, so that it is saved and restored with them and a resumed run has the same bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

AVERAGE = "ema"  # of the state


@torch.no_grad()
def update_average_(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], decay: float) -> None:
    """After a step: average = decay * average + (1 - decay) * weight, in fp32; it begins as the first step's."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        if AVERAGE not in state:
            state[AVERAGE] = parameter.detach().float().clone()
        state[AVERAGE].lerp_(parameter.detach().float(), 1 - decay)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are their averages."""
    kept = [parameter.detach().clone() for parameter in parameters]
    use_average_(optimizer, parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def use_average_(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """The parameters become their averages, where a step has been made."""
    for parameter in parameters:
        if AVERAGE in optimizer.state[parameter]:
            parameter.copy_(optimizer.state[parameter][AVERAGE])
