"""Training as an implementation does it: the loss and gradients of one batch, and the losses of AdamW steps.

A batch is a list of documents, [token ids, labels]; a label of -100 is ignored. Documents are run one at a time, so
that none can see another, and their losses are summed and divided by the number of labels in the batch: that is what
packing, masking and accumulating have to reproduce.

Written to OUT/training.safetensors: grad/NAME by Meta's names and layout, padded/NAME of all documents in one batch,
nats (the loss of each label of the first batch); returned for trace.json: the loss of each batch before its step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    logits: Callable[[Tensor], Tensor]  # (B, T) -> (B, T, V), with gradients; B is 1 where `batched` is not said
    parameters: dict[str, Tensor]  # by Meta's names; a tied matrix once
    to_meta: Callable[[str, Tensor], Tensor]  # (name, gradient) -> in Meta's layout
    batched: bool = True

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


def label_nats(trainable: Trainable, batch: list[Document]) -> Tensor:
    """-log p of every label of a batch that is not ignored, (N,)."""
    parts, device = [], trainable.device
    for tokens, next_tokens in batch:
        labels = torch.tensor(next_tokens, device=device)
        logits = trainable.logits(torch.tensor([tokens], device=device))[0]  # (T, V)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
        parts.append(nats[labels != IGNORED])
    return torch.cat(parts)


def padded(batch: list[Document]) -> list[Document]:
    """All documents as long as the longest: what is added is ignored, and causal attention never sees it."""
    width = max(len(tokens) for tokens, _ in batch)
    return [[t + [0] * (width - len(t)), y + [IGNORED] * (width - len(y))] for t, y in batch]


def padded_nats(trainable: Trainable, batch: list[Document]) -> Tensor:
    """`label_nats` in one pass over a padded batch: other sums, so another throw of the rounding."""
    tokens, labels = (torch.tensor(part, device=trainable.device) for part in zip(*padded(batch), strict=True))
    logits = trainable.logits(tokens).flatten(0, 1)  # (B*T, V)
    nats = F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nats[labels.flatten() != IGNORED]


def gradients(trainable: Trainable, nats: Tensor, prefix: str) -> dict[str, Tensor]:
    """{prefix/NAME: gradient of the mean loss}; they stay in the parameters, too."""
    nats.mean().backward()
    found = ((name, trainable.to_meta(name, gradient(p))) for name, p in trainable.parameters.items())
    return {f"{prefix}/{name}": g.clone() for name, g in found}


@contextmanager
def changed(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> Iterator[None]:
    """The parameters hold these values; afterwards their own."""
    with torch.no_grad():
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def pushed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moved by float32 numbers in +-0.008 that any process makes alike from a weight: a product and its fraction."""
    narrow = {name: weight.detach().float() for name, weight in parameters.items()}
    moved = {name: x + (torch.frac(x * 8191.0) - 0.5) * 2.0**-6 for name, x in narrow.items()}
    return {name: x.to(parameters[name].dtype) for name, x in moved.items()}


def loss_gradients(trainable: Trainable, loss: Tensor, prefix: str) -> dict[str, Tensor]:
    """{prefix/NAME: gradient} in Meta's layout; the graph is kept for another loss."""
    found = torch.autograd.grad(loss, list(trainable.parameters.values()), retain_graph=True)
    named = zip(trainable.parameters, found, strict=True)
    return {f"{prefix}/{name}": trainable.to_meta(name, g).contiguous().clone() for name, g in named}


def run_training(
    trainable: Trainable, training: dict[str, Any], out: Path, make_step: Callable[..., Callable[[int], None]]
) -> dict[str, Any]:
    """Train on every batch of the case in turn. make_step(parameters, training) -> a function that takes step n."""
    step, losses = make_step(trainable.parameters, training), []
    for n, batch in enumerate(training["batches"]):
        progress(f"training step {n + 1}/{len(training['batches'])}", n / len(training["batches"]))
        tensors = {}
        if n == 0 and trainable.batched:
            tensors = gradients(trainable, padded_nats(trainable, batch), "padded")
            forget(trainable)
        nats = label_nats(trainable, batch)
        tensors |= gradients(trainable, nats, "grad")
        losses.append(float(nats.detach().mean()))
        if n == 0:
            save_file({"nats": nats.detach(), **{k: g.contiguous() for k, g in tensors.items()}}, out / FILE)
        step(n)
        forget(trainable)
    return {"losses": losses}


def forget(trainable: Trainable) -> None:
    for parameter in trainable.parameters.values():
        parameter.grad = None


def longest(training: dict[str, Any]) -> int:
    """Tokens of the longest document."""
    batches = training["batches"] + training["preferences"]["pairs"]
    return max(len(tokens) for batch in batches for tokens, _ in batch)


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
