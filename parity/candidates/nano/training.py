"""nanollama's training as a candidate: finetune's own packing, loss, accumulation and optimizer on a fresh model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from finetune.build import add_dropout_
from finetune.config import TrainConfig
from finetune.data.dialogs import Dialogs, joined
from finetune.data.documents import Ints
from finetune.data.packing import Batch, Packer
from finetune.data.pairs import PairBatch, PairPacker, Pairs
from finetune.distill import Distilled, DistillModel, Recipe, TaughtBatch
from finetune.lora import add_lora_, lora_parameters, merged_model, wear_
from finetune.loss import LossModel
from finetune.optim import make_optimizer, select_trained_, trained
from finetune.pairwise import PairLossModel, sequence_log_probs
from finetune.parallelize import World
from finetune.reference import make_reference
from finetune.train import accumulate_
from nanollama.checkpoint import Checkpoint
from nanollama.checkpoint.adapter import Adapter
from nanollama.model import ModelConfig, Transformer
from parity.run.training import Document, Grads

ADAPTER_RANK, ADAPTER_ALPHA = 4, 12.0
LORA_TARGETS, DORA_TARGETS = ("wq", "wv", "wo", "w1"), ("wk", "w2", "w3")


class Loaded(Protocol):
    """What training starts from: a candidate's checkpoint, and how it computes."""

    opened: Checkpoint
    cfg: ModelConfig
    attention: str
    device: str


class Listed:
    """Token lists as finetune's documents."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents, self.bos_id = [np.array(ids, dtype=np.int64) for ids in documents], documents[0][0]

    @property
    def lengths(self) -> Ints:
        return np.array([len(ids) for ids in self.documents], dtype=np.int64)

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return self.documents[document][start:stop]


def trainable(nano: Loaded) -> Transformer:
    """A model of the candidate's config and attention, on its device, in memory of its own, fp32."""
    weights, device = nano.opened.weights, nano.device
    owned = {name: weights[name].to(device, torch.float32, copy=True) for name in weights}
    model = Transformer.from_weights(nano.cfg, owned, dtype=torch.float32, device=device, attention=nano.attention)
    select_trained_(model, "full")
    return model


def loss_and_grads(nano: Loaded, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Grads]:
    """Mean loss of a batch (B, T) and its gradients, by the loop's own accumulation."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, targets, positions, None, int((targets != -100).sum()))
    return run(trainable(nano), [batch])


def run(model: Transformer, batches: list[Batch]) -> tuple[Tensor, Grads]:
    count, device = sum(batch.valid for batch in batches), model.tok_embeddings.weight.device
    fp32 = torch.autocast(device.type, enabled=False)
    nats = accumulate_(LossModel(model).train(), batches, count, fp32, World(device))
    return nats / count, {name: grad_of(p) for name, p in trained(model).items()}


def masked(documents: list[Document]) -> Dialogs:
    """As finetune.chat and finetune.preference hold them: ids, and of each whether it is learned."""
    pairs = [(np.array(ids), np.array([False, *(y != -100 for y in labels[:-1])])) for ids, labels in documents]
    return joined(pairs, int(pairs[0][0][0]))


def grad_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class NanoTrainer:
    """All that interface.TRAINER lists; mutants replace one method."""

    def __init__(self, nano: Loaded) -> None:
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

    def preferences(
        self, pairs: list[list[Document]], push: Callable[[Tensor], Tensor], kind: str, beta: float
    ) -> tuple[Tensor, Grads]:
        """By finetune's own objective, two pairs a micro-batch; the reference is made of a model that has dropout."""
        documents = self.pairs(pairs)
        documents = replace(documents, reference=self.reference(documents))
        policy = self.pushed(push)
        packer, device = PairPacker(documents, int(documents.lengths.sum())), policy.tok_embeddings.weight.device
        batches = [self.pair_batch(packer, part) for part in ([0, 1], [2])]
        fp32 = torch.autocast(device.type, enabled=False)
        nats = accumulate_(self.pair_loss_model(policy, kind, beta), batches, len(pairs), fp32, World(device))
        return nats / len(pairs), {name: grad_of(p) for name, p in trained(policy).items()}

    def pairs(self, pairs: list[list[Document]]) -> Pairs:
        """As finetune.data.pairs reads them."""
        return Pairs(masked([document for pair in pairs for document in pair]))

    def pushed(self, push: Callable[[Tensor], Tensor]) -> Transformer:
        model = trainable(self.nano)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(push(parameter))
        return model

    def reference(self, pairs: Pairs) -> Tensor:
        model = trainable(self.nano)
        add_dropout_(model, 0.1)
        world = World(model.tok_embeddings.weight.device)
        config = TrainConfig(seq_len=int(pairs.lengths.max()), batch_size=1)
        fp32 = torch.autocast(world.device.type, enabled=False)
        return make_reference(model.train(), (pairs, pairs), self.log_probs, config, world, fp32)["train"]

    def log_probs(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return sequence_log_probs(*inputs)

    def pair_batch(self, packer: PairPacker, pairs: list[int]) -> PairBatch:
        return packer.batch([pairs])

    def pair_loss_model(self, model: Transformer, kind: str, beta: float) -> PairLossModel:
        return PairLossModel(model, kind, beta)

    def distillation(
        self, parts: list[list[Document]], push: Callable[[Tensor], Tensor], temperature: float, mix: float, kind: str
    ) -> tuple[Tensor, Grads]:
        """By finetune's own objective, a micro-batch of each part; dialogues' masks as finetune.chat makes them."""
        student, teacher = self.pushed(push), trainable(self.nano).eval().requires_grad_(False)
        how = Recipe(temperature, mix)
        batches = [self.taught_batch(Distilled(teacher, how, kind == "all"), part) for part in parts]
        count, device = self.taught_count(batches), student.tok_embeddings.weight.device
        model, fp32 = self.distill_model(student, teacher, how), torch.autocast(device.type, enabled=False)
        nats = accumulate_(model.train(), batches, count, fp32, World(device))
        return nats / count, {name: grad_of(p) for name, p in trained(student).items()}

    def taught_batch(self, objective: Distilled, documents: list[Document]) -> TaughtBatch:
        tokens = sum(len(ids) for ids, _ in documents)
        packer = objective.packer(masked(documents), tokens, seed=0, doc_mask=True)
        made = packer.batch([list(range(len(documents)))])
        assert isinstance(made, TaughtBatch)
        return made

    def taught_count(self, batches: list[TaughtBatch]) -> int:
        return sum(batch.count for batch in batches)

    def distill_model(self, student: Transformer, teacher: Transformer, how: Recipe) -> nn.Module:
        return DistillModel(student, teacher, how)

    def adapters(
        self,
        parts: list[list[Document]],
        make: Callable[[Tensor, int], dict[str, Tensor]],
        targets: list[str],
        rank: int,
        alpha: float,
        kind: str,
    ) -> tuple[Tensor, Grads]:
        model = trainable(self.nano)
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(tuple(targets))}
        made = {name: make(weight, rank) for name, weight in weights.items()}
        pairs = {name: (of["lora_A"], of["lora_B"]) for name, of in made.items()}
        magnitudes = {name: of["lora_magnitude"] for name, of in made.items() if kind == "dora"}
        adapter = Adapter(pairs, dict.fromkeys(pairs, alpha), magnitudes=magnitudes)
        wear_(model, adapter, 0.0, torch.Generator())
        return run(self.worn(model), [self.batch(part) for part in parts])

    def worn(self, model: Transformer) -> Transformer:
        """The model with its adapters, ready to be trained."""
        return model

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
        """A LoRA or a DoRA on every layer, whose B is not zero any more, nor its lengths those of the weights."""
        generator = torch.Generator().manual_seed(0)
        add_lora_(model, ADAPTER_RANK, ADAPTER_ALPHA, LORA_TARGETS, 0.0, generator)
        add_lora_(model, ADAPTER_RANK, ADAPTER_ALPHA, DORA_TARGETS, 0.0, generator, dora=True)
        for name, parameter in lora_parameters(model).items():
            drawn = torch.empty(parameter.shape).normal_(std=0.01, generator=generator).to(parameter.device)
            if name.endswith("lora_B"):
                parameter.data.copy_(drawn)
            elif name.endswith("lora_magnitude"):
                parameter.data.mul_(1 + drawn)

    def merge(self, model: Transformer) -> Transformer:
        return merged_model(model, self.nano.attention)

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
