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

from finetune.seeds import mixed_seed

BLOCK_NUMBERS = 1 << 22  # in fp32 at a time


def round_(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Put fp32 `values` into `target`; into bf16 by chance, the nearer neighbour the likelier, so the mean is exact."""
    if target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    # bf16 is the upper half of fp32: a random lower half is added, and what carries into the upper one stays.
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    target.copy_((bits + chance).bitwise_and_(-(1 << 16)).view(torch.float32))


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW whose parameters and moments may be bf16. A step's random numbers depend on `seed` and the step alone."""

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, seed: int) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed = seed

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
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                n = int(state["step"])
                generator = torch.Generator(parameter.device).manual_seed(mixed_seed(self.seed, n, place))
                self._update_(parameter, group, state, n, generator)

    @staticmethod
    def _update_(parameter: Tensor, group: dict, state: dict, n: int, generator: torch.Generator) -> None:
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None
        flat = [t.view(-1) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        for start in range(0, parameter.numel(), BLOCK_NUMBERS):
            p, g, first, second = (t[start : start + BLOCK_NUMBERS] for t in flat)
            grad = g.float()
            mean = first.float().lerp_(grad, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = (mean / (1 - beta1**n)).div_((square / (1 - beta2**n)).sqrt_().add_(group["eps"]))
            moved = p.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])
            round_(p, moved, generator)
            round_(first, mean, generator)
            round_(second, square, generator)
