"""Ways in which training has been wrong: masks, labels, accumulation, gradients, optimizer.

Each replaces one method of the candidate's trainer, or its loss_and_grads.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.packing import Batch
from finetune.data.pairs import PairBatch, Pairs
from finetune.lora import LoraLinear
from finetune.optim import trained
from finetune.pairwise import PairLossModel
from nanollama.model import Transformer
from parity.candidates.nano.model import Nano
from parity.candidates.nano.training import NanoTrainer, run, trainable
from parity.mutants.edits.edit import Edit, override
from parity.run.training import IGNORED, LENGTHS, Document, Grads

EOS = 2


def in_trainer(name: str, method: Callable[[NanoTrainer, Any], Any]) -> Edit:
    """method(trainer, the true method) -> what stands in its place."""

    def edit(nano: Nano) -> None:
        def trainer() -> NanoTrainer:
            made = NanoTrainer(nano)
            override(made, name, method(made, getattr(made, name)))
            return made

        override(nano, "trainer", trainer)

    return edit


def in_loss_and_grads(change: Callable[[Callable, Tensor, Tensor], tuple[Tensor, Grads]]) -> Edit:
    def edit(nano: Nano) -> None:
        true = nano.loss_and_grads
        override(nano, "loss_and_grads", lambda tokens, targets: change(true, tokens, targets))

    return edit


def no_mask(trainer: NanoTrainer, true: Callable[[list[Document]], Batch]) -> Callable[[list[Document]], Batch]:
    """Positions restart with each document, and every document sees the ones before it."""
    return lambda documents: replace(true(documents), doc_ids=None)


def across_boundary(trainer: NanoTrainer, true: Any) -> Callable[[list[list[int]]], list[list[int]]]:
    """The last token of a document predicts the next one's BOS."""

    def labels(documents: list[list[int]]) -> list[list[int]]:
        made = true(documents)
        return [[*row[:-1], after[0]] for row, after in zip(made, documents[1:], strict=False)] + made[-1:]

    return labels


def eos_is_padding(trainer: NanoTrainer, true: Any) -> Callable[[list[list[int]]], list[list[int]]]:
    """Padding has the id of EOS and is masked by id."""
    return lambda documents: [[IGNORED if label == EOS else label for label in row] for row in true(documents)]


def mean_of_means(trainer: NanoTrainer, true: Any) -> Callable[[list[list[Document]]], tuple[Tensor, Grads]]:
    """Each micro-batch's mean counts the same, however many labels it has."""

    def accumulated(parts: list[list[Document]]) -> tuple[Tensor, Grads]:
        found = [run(trainable(trainer.nano), [trainer.batch(part)]) for part in parts]
        loss = torch.stack([loss for loss, _ in found]).mean()
        return loss, {n: torch.stack([grads[n] for _, grads in found]).mean(0) for n in found[0][1]}

    return accumulated


def full_window(trainer: NanoTrainer, true: Any) -> Callable[[list[list[Document]]], tuple[Tensor, Grads]]:
    """A window that is not full is divided by the count of a full one."""

    def accumulated(parts: list[list[Document]]) -> tuple[Tensor, Grads]:
        loss, grads = true(parts)
        share = len(parts) / len(LENGTHS)
        return loss, {n: g * share for n, g in grads.items()}

    return accumulated


def shifted_twice(true: Callable, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Grads]:
    """Targets that are shifted already are shifted again."""
    again = torch.full_like(targets, IGNORED)
    again[:, :-1] = targets[:, 1:]
    return true(tokens, again)


def norms_in_bf16(true: Callable, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Grads]:
    """The gradients of the norms' weights are summed in bf16."""
    loss, grads = true(tokens, targets)
    return loss, {n: g.bfloat16().float() if g.ndim == 1 else g for n, g in grads.items()}


def decayed_norms(trainer: NanoTrainer, true: Any) -> Callable[[Transformer, dict], torch.optim.Optimizer]:
    return _one_group(lambda hyper: hyper["weight_decay"])


def no_decay(trainer: NanoTrainer, true: Any) -> Callable[[Transformer, dict], torch.optim.Optimizer]:
    return _one_group(lambda hyper: 0.0)


def merged_in_bf16(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """The sum of weight and adapter is rounded to bf16 before it becomes the weight."""

    def merge(model: Transformer) -> Transformer:
        plain = true(model)
        for module in plain.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.bfloat16().float()
        return plain

    return merge


def merged_unscaled(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """The adapter is added without its alpha / rank."""

    def merge(model: Transformer) -> Transformer:
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.alpha = module.rank
        return true(model)

    return merge


# --- Preferences -----------------------------------------------------------------------------------------------------


def with_prompts(trainer: NanoTrainer, true: Callable[[Any], Pairs]) -> Callable[[Any], Pairs]:
    """The tokens of the prompt are judged as the answer's are."""

    def pairs(given: list[list[Document]]) -> Pairs:
        made = true(given)
        said = np.ones_like(made.sequences.said)
        said[made.sequences.starts[:-1]] = False  # nothing predicts the first token
        return replace(made, sequences=replace(made.sequences, said=said))

    return pairs


def other_way_round(trainer: NanoTrainer, true: Callable[[Any], Pairs]) -> Callable[[Any], Pairs]:
    """The rejected answer is preferred: the sign of the difference is wrong."""
    return lambda given: true([pair[::-1] for pair in given])


def mean_for_sum(trainer: NanoTrainer, true: Any) -> Callable[[Transformer, str, float], PairLossModel]:
    """An answer's log-probability is its tokens' mean where the sum belongs."""
    return lambda model, kind, beta: true(model, "dpo_norm" if kind == "dpo" else kind, beta)


def beta_twice(trainer: NanoTrainer, true: Any) -> Callable[[Transformer, str, float], PairLossModel]:
    """beta multiplies what it has multiplied already."""
    return lambda model, kind, beta: true(model, kind, beta * beta)


def training_reference(trainer: NanoTrainer, true: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The reference is computed with dropout, as it was left."""
    return lambda model, *rest: true(model.train(), *rest)


def no_reference(trainer: NanoTrainer, true: Any) -> Callable[[Pairs], Tensor]:
    """The reference's log-probabilities are left out: zero."""
    return lambda pairs: torch.zeros(len(pairs.lengths), 2, dtype=torch.float64)


def into_each_other(trainer: NanoTrainer, true: Any) -> Callable[[Any, list[int]], PairBatch]:
    """Both answers lie in one document: the rejected one reads the chosen one."""

    def batch(packer: Any, pairs: list[int]) -> PairBatch:
        made = true(packer, pairs)
        return replace(made, batch=replace(made.batch, doc_ids=made.batch.doc_ids // 2))

    return batch


def _one_group(decay: Callable[[dict], float]) -> Callable[[Transformer, dict], torch.optim.Optimizer]:
    def optimizer(model: Transformer, hyper: dict) -> torch.optim.Optimizer:
        values, betas = trained(model).values(), tuple(hyper["betas"])
        return torch.optim.AdamW(values, hyper["lr"], betas, hyper["eps"], decay(hyper))

    return optimizer
