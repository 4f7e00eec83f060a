"""Training as an implementation does it: the loss and gradients of one batch, and the losses of AdamW steps.

A batch is a list of documents, [token ids, labels]; a label of -100 is ignored. Documents are run one at a time, so
that none can see another, and their losses are summed and divided by the number of labels in the batch: that is what
packing, masking and accumulating have to reproduce.

Written to OUT/training.safetensors: grad/NAME by Meta's names and layout, nats (the loss of each label of the first
batch); returned for trace.json: the loss of each batch before its step.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from reference.protocol import progress

IGNORED = -100
FILE = "training.safetensors"

Document = list[list[int]]  # token ids, labels


@dataclass(frozen=True)
class Trainable:
    """An implementation whose parameters are trained."""

    logits: Callable[[Tensor], Tensor]  # (1, T) -> (1, T, V), with gradients
    parameters: dict[str, Tensor]  # by Meta's names; a tied matrix once
    to_meta: Callable[[str, Tensor], Tensor]  # (name, gradient) -> in Meta's layout


def label_nats(trainable: Trainable, batch: list[Document]) -> Tensor:
    """-log p of every label of a batch that is not ignored, (N,)."""
    parts = []
    for tokens, labels in batch:
        logits = trainable.logits(torch.tensor([tokens]))[0]  # (T, V)
        nats = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), torch.tensor(labels),
                               ignore_index=IGNORED, reduction="none")  # fmt: skip
        parts.append(nats[torch.tensor(labels) != IGNORED])
    return torch.cat(parts)


def run_training(
    trainable: Trainable, training: dict[str, Any], out: Path, make_step: Callable[..., Callable[[int], None]]
) -> dict[str, Any]:
    """Train on every batch of the case in turn. make_step(parameters, training) -> a function that takes step n."""
    step, losses = make_step(trainable.parameters, training), []
    for n, batch in enumerate(training["batches"]):
        progress(f"training step {n + 1}/{len(training['batches'])}", n / len(training["batches"]))
        nats = label_nats(trainable, batch)
        nats.mean().backward()
        losses.append(float(nats.detach().mean()))
        if n == 0:
            grads = {f"grad/{name}": trainable.to_meta(name, gradient(p)) for name, p in trainable.parameters.items()}
            save_file({"nats": nats.detach(), **{k: g.contiguous() for k, g in grads.items()}}, out / FILE)
        step(n)
        for parameter in trainable.parameters.values():
            parameter.grad = None
    return {"losses": losses}


def longest(training: dict[str, Any]) -> int:
    """Tokens of the longest document."""
    return max(len(tokens) for batch in training["batches"] for tokens, _ in batch)


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def torch_adamw(parameters: dict[str, Tensor], training: dict[str, Any]) -> Callable[[int], None]:
    """torch's own AdamW; matrices are decayed, norms are not."""
    values = parameters.values()
    groups = [
        {"params": [p for p in values if p.ndim >= 2], "weight_decay": training["weight_decay"]},
        {"params": [p for p in values if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training["lr"], betas=tuple(training["betas"]), eps=training["eps"])
    return lambda n: optimizer.step()


def unfrozen(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: parameter.requires_grad_() for name, parameter in parameters}
