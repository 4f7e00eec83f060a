"""The oracle's training: float64 autograd through its own operations, and AdamW written from the paper
(Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the decay scaled by the learning rate alone).

Small checkpoints only: the whole model, its gradients and its moments are held in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference.files import Checkpoint
from reference.objectives import run_objectives
from reference.oracle.forward import Oracle, forward
from reference.training import Trainable, run_training

STEPS_FILE = "adamw.safetensors"
MADE_STEPS = 2


class Leaves:
    """The weights as float64 leaves of one graph, read as `Weights` are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        weights = checkpoint.weights
        self.leaves = {name: weights.load(name, torch.float32).double().requires_grad_() for name in weights}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in self.leaves.items()}

    def load(self, name: str, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.leaves[name][start:stop]

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.leaves["tok_embeddings.weight"][tokens]


def train(checkpoint: Checkpoint, training: dict[str, Any], out: Path) -> dict[str, Any]:
    """Losses for trace.json; gradients and the made-up optimizer steps as files in `out`."""
    leaves = Leaves(checkpoint)
    in_memory = replace(checkpoint, weights=leaves)  # type: ignore[arg-type]  # what the oracle reads of them

    def logits(tokens: Tensor) -> Tensor:
        oracle = Oracle(in_memory, tokens.tolist(), None)
        normed = forward(oracle, lambda name, value: None)
        return torch.cat([block for _, _, block in oracle.logit_blocks(normed)], dim=-1).unsqueeze(0)

    made = made_up_steps(leaves.leaves, training)
    save_file(made, out / STEPS_FILE)
    trainable = Trainable(logits, leaves.leaves, lambda name, gradient: gradient, batched=False)
    objectives = run_objectives(trainable, training, out)
    return run_training(trainable, training, out, adamw) | objectives


def adamw(parameters: dict[str, Tensor], training: dict[str, Any]) -> Callable[[int], None]:
    """Step n of AdamW in the parameters' own precision."""
    beta1, beta2 = training["betas"]
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step(n: int) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                assert p.grad is not None
                first[name] = beta1 * first[name] + (1 - beta1) * p.grad
                second[name] = beta2 * second[name] + (1 - beta2) * p.grad.square()
                mean, square = first[name] / (1 - beta1 ** (n + 1)), second[name] / (1 - beta2 ** (n + 1))
                decay = training["weight_decay"] if p.ndim >= 2 else 0.0
                p -= training["lr"] * (mean / (square.sqrt() + training["eps"]) + decay * p)

    return step


def made_up_gradient(weight: Tensor, step: int) -> Tensor:
    """float32 numbers in +-0.0005 that any process makes alike from a weight: a product and its fraction."""
    return (torch.frac(weight.detach().float() * (8191.0 * (step + 1))) - 0.5) * 1e-3


def made_up_steps(leaves: dict[str, Tensor], training: dict[str, Any]) -> dict[str, Tensor]:
    """{"N/NAME": weights after N steps from made-up gradients}, for the norms and the first layer's matrices."""
    chosen = {n: w for n, w in leaves.items() if w.ndim == 1 or n.startswith("layers.0.")}
    moved = {name: weight.detach().clone() for name, weight in chosen.items()}
    step, found = adamw(moved, training), dict[str, Tensor]()
    for n in range(MADE_STEPS):
        for name, weight in moved.items():
            weight.grad = made_up_gradient(chosen[name], n).double()
        step(n)
        found |= {f"{n + 1}/{name}": weight.clone() for name, weight in moved.items()}
    return found
