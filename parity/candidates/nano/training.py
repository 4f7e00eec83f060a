"""nanollama's training as a candidate: finetune's own packing, loss, accumulation and optimizer on a fresh model."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.config import TrainConfig
from finetune.data.documents import Ints
from finetune.data.packing import Batch, Packer
from finetune.lora import add_lora_, lora_parameters, merge_
from finetune.loss import LossModel
from finetune.optim import make_optimizer, select_trained_, trained
from finetune.parallelize import World
from finetune.train import accumulate_
from nanollama.model import Transformer
from parity.run.training import Document, Grads

if TYPE_CHECKING:
    from parity.candidates.nano.model import Nano

ADAPTER_RANK, ADAPTER_ALPHA = 4, 12.0
ADAPTER_TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class Listed:
    """Token lists as finetune's documents."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents, self.bos_id = [np.array(ids, dtype=np.int64) for ids in documents], documents[0][0]

    @property
    def lengths(self) -> Ints:
        return np.array([len(ids) for ids in self.documents], dtype=np.int64)

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return self.documents[document][start:stop]


def trainable(nano: "Nano") -> Transformer:
    """A model of the candidate's config and attention, on its device, in memory of its own, fp32."""
    weights, device = nano.opened.weights, nano.device
    owned = {name: weights[name].to(device, torch.float32, copy=True) for name in weights}
    model = Transformer.from_weights(nano.cfg, owned, dtype=torch.float32, device=device, attention=nano.attention)
    select_trained_(model, "full")
    return model


def loss_and_grads(nano: "Nano", tokens: Tensor, targets: Tensor) -> tuple[Tensor, Grads]:
    """Mean loss of a batch (B, T) and its gradients, by the loop's own accumulation."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, targets, positions, None, int((targets != -100).sum()))
    return run(trainable(nano), [batch])


def run(model: Transformer, batches: list[Batch]) -> tuple[Tensor, Grads]:
    count, device = sum(batch.valid for batch in batches), model.tok_embeddings.weight.device
    fp32 = torch.autocast(device.type, enabled=False)
    nats = accumulate_(LossModel(model).train(), batches, count, fp32, World(device))
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained(model).items()}
    return nats / count, grads


class NanoTrainer:
    """All that interface.TRAINER lists; mutants replace one method."""

    def __init__(self, nano: "Nano") -> None:
        self.nano = nano

    def batch(self, documents: list[Document]) -> Batch:
        """All documents in one row, by finetune's Packer; their own labels where some are ignored."""
        packer = Packer(Listed([tokens for tokens, _ in documents]), sum(len(tokens) for tokens, _ in documents))
        made = packer.batch([list(range(len(documents)))])
        labels = torch.tensor([[label for _, labels in documents for label in labels]])
        labels = torch.where(labels == -100, labels, made.labels)
        return replace(made, labels=labels, valid=int((labels != -100).sum()))

    def packed(self, documents: list[Document]) -> tuple[Tensor, Grads]:
        return run(trainable(self.nano), [self.batch(documents)])

    def accumulated(self, parts: list[list[Document]]) -> tuple[Tensor, Grads]:
        return run(trainable(self.nano), [self.batch(part) for part in parts])

    def labels(self, documents: list[list[int]]) -> list[list[int]]:
        packer = Packer(Listed(documents), sum(map(len, documents)))
        row = packer.batch([list(range(len(documents)))]).labels[0]
        return [part.tolist() for part in row.split([len(ids) for ids in documents])]

    def optimizer(self, model: Transformer, hyper: dict) -> torch.optim.Optimizer:
        beta1, beta2 = hyper["betas"]
        config = TrainConfig(lr=hyper["lr"], weight_decay=hyper["weight_decay"], beta1=beta1, beta2=beta2)
        return make_optimizer(model, replace(config, eps=hyper["eps"]))

    def adamw(self, steps: list[Callable[[Tensor], Tensor]], hyper: dict) -> list[Grads]:
        model = trainable(self.nano)
        first = {name: p.detach().clone() for name, p in trained(model).items()}
        optimizer, found = self.optimizer(model, hyper), []
        for make in steps:
            for name, parameter in trained(model).items():
                parameter.grad = make(first[name])
            optimizer.step()
            found.append({name: p.detach().clone() for name, p in trained(model).items()})
        return found

    def adapter(self, model: Transformer) -> None:
        """A LoRA on every layer whose B is not zero any more."""
        generator = torch.Generator().manual_seed(0)
        add_lora_(model, ADAPTER_RANK, ADAPTER_ALPHA, ADAPTER_TARGETS, 0.0, generator)
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_B"):
                drawn = torch.empty(parameter.shape).normal_(std=0.01, generator=generator)
                parameter.data.copy_(drawn)

    def merge(self, model: Transformer) -> Transformer:
        return merge_(model)

    @torch.no_grad()
    def merged(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        model = trainable(self.nano).eval()
        self.adapter(model)
        tokens = tokens.to(self.nano.device)
        beside = model(tokens)
        return beside, self.merge(model)(tokens)

    def losses(self, batches: list[list[Document]], hyper: dict) -> list[float]:
        model = trainable(self.nano)
        optimizer, found = self.optimizer(model, hyper), []
        for documents in batches:
            loss, _ = run(model, [self.batch(documents)])
            found.append(float(loss))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return found
