"""Learning from pairs of answers as the papers have it: DPO (arXiv 2305.18290, equation 7) and ORPO (arXiv 2403.07691,
equations 6 and 7), on sequences that are run one at a time, so that none can see another.

The reference of a run is the checkpoint; the model that learns is the checkpoint with every weight `pushed` a little,
so that the two differ. The loss is the mean over the pairs.

Written to OUT/preferences.safetensors: KIND/grad/NAME by Meta's names and layout, KIND/padded/NAME of all sequences in
one batch; returned for trace.json: the loss of each kind.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from reference.training import (
    IGNORED,
    Document,
    Trainable,
    changed,
    label_nats,
    loss_gradients,
    padded_nats,
    pushed,
)

FILE = "preferences.safetensors"


def run_preferences(trainable: Trainable, asked: dict[str, Any], out: Path) -> dict[str, float]:
    """The loss of each kind that is asked for; its gradients go into a file. The parameters are as before, after it."""
    documents = [document for pair in asked["pairs"] for document in pair]
    with torch.no_grad():
        reference = log_probs(label_nats(trainable, documents), documents)
    tensors, losses = dict[str, Tensor](), dict[str, float]()
    with changed(trainable.parameters, pushed(trainable.parameters)):
        for way, nats in (("padded", padded_nats), ("grad", label_nats)):
            if way == "padded" and not trainable.batched:
                continue
            found = log_probs(nats(trainable, documents), documents)
            for kind in asked["kinds"]:
                loss = pair_losses(kind, asked["beta"], found, reference, documents).mean()
                losses[kind] = float(loss.detach())
                tensors |= loss_gradients(trainable, loss, f"{kind}/{way}")
    save_file(tensors, out / FILE)
    return losses


def log_probs(nats: Tensor, documents: list[Document]) -> Tensor:
    """(P, 2): log-probability of each pair's answers, of the nats of all labels."""
    return -torch.stack([part.sum() for part in nats.split(lengths(documents))]).view(-1, 2)


def lengths(documents: list[Document]) -> list[int]:
    """Labels of each that are not ignored."""
    return [sum(label != IGNORED for label in labels) for _, labels in documents]


def pair_losses(kind: str, beta: float, found: Tensor, reference: Tensor, documents: list[Document]) -> Tensor:
    """(P,): -log sigmoid(x) is softplus(-x)."""
    if kind == "dpo":
        chosen, rejected = (found - reference).unbind(1)
        return F.softplus(-beta * (chosen - rejected))
    assert kind == "orpo", kind
    each = found / torch.tensor(lengths(documents), device=found.device).view(-1, 2)
    chosen, rejected = (each - torch.log1p(-each.exp())).unbind(1)
    return -each[:, 0] + beta * F.softplus(-(chosen - rejected))
