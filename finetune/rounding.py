"""Pure bf16 training: weights and AdamW's moments in bf16, each rounded up or down by chance, so that steps far smaller
than the distance between two bf16 numbers still count on average.

A weight of 0.02 has neighbours 1.2e-4 away: at a learning rate of 1e-5 plain rounding gives every step back
(torchtune#2254). The sums are fp32, a block of a matrix at a time, so no fp32 copy of the model exists: 8 bytes a
parameter with gradient and both moments, where fp32 has 16.

    python -m finetune.text --data notes/ --ckpt Llama-3.2-1B --weights bf16
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.moments import new_moments, read, round_, write_
from finetune.seeds import mixed_seed

BLOCK_NUMBERS = 1 << 19  # in fp32 at a time: a few MB stay in a CPU's cache (docs/LOG.md)
BLOCK_NUMBERS_GPU = 1 << 25  # each block is some 30 launches


def block_numbers(device: torch.device) -> int:
    """Numbers of a parameter that are updated at a time."""
    return BLOCK_NUMBERS_GPU if device.type == "cuda" else BLOCK_NUMBERS


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW whose parameters may be bf16, its moments too, or bytes.

    A step's random numbers depend on `seed` and the step alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
        eight_bit: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed, self.eight_bit = seed, eight_bit

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        place = 0  # of the parameter: each draws for itself, so the order of updates changes nothing
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), **new_moments(parameter, self.eight_bit)}
                state["step"] += 1
                n = int(state["step"])
                generator = torch.Generator(parameter.device).manual_seed(mixed_seed(self.seed, n, place))
                self._update_(parameter, group, state, n, generator)

    @staticmethod
    def _update_(parameter: Tensor, group: dict, state: dict, n: int, generator: torch.Generator) -> None:
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None
        weights, grads, size = parameter.view(-1), parameter.grad.reshape(-1), parameter.numel()
        step = block_numbers(parameter.device)
        for start in range(0, size, step):
            part = slice(start, min(start + step, size))
            p, grad = weights[part], grads[part].float()
            mean = read(state, "exp_avg", part).lerp_(grad, 1 - beta1)
            square = read(state, "exp_avg_sq", part).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = (mean / (1 - beta1**n)).div_((square / (1 - beta2**n)).sqrt_().add_(group["eps"]))
            moved = p.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])
            round_(p, moved, generator)
            write_(state, "exp_avg", part, mean, generator)
            write_(state, "exp_avg_sq", part, square, generator)
