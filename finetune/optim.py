"""AdamW with norms undecayed, which parameters a method trains, and the learning rate of each step.

>>> config = resolve(TrainConfig(init="260K", lr=1.0, max_steps=100, warmup_steps=10), "cpu", 1)
>>> [round(learning_rate(config, step), 3) for step in (0, 4, 9, 55, 99)]
[0.1, 0.5, 1.0, 0.548, 0.1]
"""

import math

import torch
from torch import nn

from finetune.config import LORA_METHODS, TrainConfig
from finetune.lora import LORA_SUFFIXES
from finetune.rounding import RoundingAdamW

EMBEDDINGS = ("tok_embeddings.weight", "output.weight")
FUSED = ("cpu", "cuda", "mps")  # device types whose AdamW updates all parameters in one kernel


def is_trained(name: str, method: str) -> bool:
    """Whether `method` trains the weight with this name: the nano Llama 3.1's full, norms, no_embeddings; or LoRA's."""
    if method in LORA_METHODS:
        return name.endswith(LORA_SUFFIXES)
    if method == "norms":
        return name.endswith("norm.weight")
    return method == "full" or name not in EMBEDDINGS


def select_trained_(model: nn.Module, method: str) -> None:
    """Freeze the parameters that `method` leaves alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, method))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; one-dimensional ones (norms) without weight decay."""
    parameters = list(trained(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups, betas = [g for g in groups if g["params"]], (config.beta1, config.beta2)
    eight_bit = config.optimizer == "adamw8bit"
    if eight_bit or config.weights == "bf16":
        return RoundingAdamW(groups, lr=config.lr, betas=betas, eps=config.eps, seed=config.seed, eight_bit=eight_bit)
    fused = parameters[0].device.type in FUSED
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


class StepInBackward:
    """Updates each parameter as soon as its gradient is there, and frees the gradient: one exists at a time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.squares = optimizer, 0.0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update_)

    def _update_(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.squares += float(parameter.grad.float().square().sum())
        self.optimizer.step()  # parameters without a gradient, all the others, are left alone
        parameter.grad = None

    def norm(self) -> float:
        """Of all gradients since the last call."""
        norm, self.squares = math.sqrt(self.squares), 0.0
        return norm


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 0, 1, ..., max_steps - 1: linear warmup that ends at lr, then down to min_lr * lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps + 1) / max(1, config.max_steps - config.warmup_steps))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.lr * (config.min_lr + (1 - config.min_lr) * fall)


def set_learning_rate_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
