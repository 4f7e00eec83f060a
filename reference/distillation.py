"""Learning from a teacher's distributions (Hinton et al., arXiv 1503.02531), on documents that are run one at a time.

The teacher is the checkpoint; the student is the checkpoint with every weight `pushed` a little. With p the teacher's
distribution at temperature T, q the student's and m the mix, the loss is the sum over the taught tokens of
m T^2 KL(p || q), plus the sum over the labels of (1 - m) (-log q_1(label)), over the number of taught tokens. They are
the labels, or of kind "all" every token but a document's last.

Written to OUT/distillation.safetensors: KIND/grad/NAME by Meta's names and layout, KIND/padded/NAME of all documents in
one batch; returned for trace.json: the loss of each kind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from reference.training import IGNORED, Document, Trainable, changed, loss_gradients, padded, pushed

FILE = "distillation.safetensors"


def run_distillation(
    trainable: Trainable, asked: dict[str, Any], documents: list[Document], out: Path
) -> dict[str, float]:
    """The loss of each kind; its gradients go into a file. The parameters are as before, after it."""
    ways: dict[str, Callable[[Trainable, list[Document]], list[Tensor]]] = {"grad": each_logits}
    ways |= {"padded": padded_logits} if trainable.batched else {}
    with torch.no_grad():
        teachers = {way: run(trainable, documents) for way, run in ways.items()}
    tensors, losses = dict[str, Tensor](), dict[str, float]()
    with changed(trainable.parameters, pushed(trainable.parameters)):
        for way, run in reversed(ways.items()):
            found = run(trainable, documents)
            for kind in asked["kinds"]:
                loss = distilled(found, teachers[way], documents, asked, kind)
                losses[kind] = float(loss.detach())
                tensors |= loss_gradients(trainable, loss, f"{kind}/{way}")
    save_file(tensors, out / FILE)
    return losses


def each_logits(trainable: Trainable, documents: list[Document]) -> list[Tensor]:
    """(T, V) of each document, in fp32 or wider."""
    found = [trainable.logits(torch.tensor([tokens], device=trainable.device))[0] for tokens, _ in documents]
    return [logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in found]


def padded_logits(trainable: Trainable, documents: list[Document]) -> list[Tensor]:
    """The same in one pass over a padded batch: other sums, so another throw of the rounding."""
    tokens = torch.tensor([tokens for tokens, _ in padded(documents)], device=trainable.device)
    rows = trainable.logits(tokens).float()
    return [row[: len(tokens)] for row, (tokens, _) in zip(rows, documents, strict=True)]


def distilled(
    student: list[Tensor], teacher: list[Tensor], documents: list[Document], asked: dict[str, Any], kind: str
) -> Tensor:
    """The loss of all documents; logits (T, V) of each."""
    heat, mix, total, count = asked["temperature"], asked["mix"], torch.tensor(0.0), 0
    for mine, theirs, (tokens, next_tokens) in zip(student, teacher, documents, strict=True):
        labels = torch.tensor(next_tokens, device=mine.device)
        last = torch.arange(len(tokens), device=mine.device) == len(tokens) - 1
        taught = ~last if kind == "all" else labels != IGNORED
        log_p, log_q = (F.log_softmax(logits[taught] / heat, dim=-1) for logits in (theirs, mine))
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        nats = F.cross_entropy(mine, labels, ignore_index=IGNORED, reduction="sum")
        total = total.to(mine.device) + mix * heat**2 * divergence + (1 - mix) * nats
        count += int(taught.sum())
    return total / count
