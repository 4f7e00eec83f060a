"""Ways in which training has been wrong: masks, labels, accumulation, gradients, optimizer.

Each replaces one method of the candidate's trainer, or its loss_and_grads.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.packing import Batch
from finetune.data.pairs import PairBatch, Pairs
from finetune.distill import Distilled, DistillModel, Recipe, TaughtBatch
from finetune.lora import LoraLinear
from finetune.optim import trained
from finetune.pairwise import PairLossModel
from nanollama.checkpoint.adapter import add_low_rank, row_lengths
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


# --- DoRA ------------------------------------------------------------------------------------------------------------


def adapted(model: Transformer) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def lengths_frozen(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """The lengths of rows get no gradient."""

    def worn(model: Transformer) -> Transformer:
        for module in adapted(true(model)):
            if module.lora_magnitude is not None:
                module.lora_magnitude.register_hook(torch.zeros_like)
        return model

    return worn


def norm_not_detached(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """The norm of each row has a gradient to A and B."""

    def stretch(module: LoraLinear) -> Tensor:
        assert module.lora_magnitude is not None
        return module.lora_magnitude / row_lengths(whole_of(module))

    def worn(model: Transformer) -> Transformer:
        for module in adapted(true(model)):
            override(module, "stretch", lambda module=module: stretch(module))
        return model

    return worn


def whole_of(module: LoraLinear) -> Tensor:
    return add_low_rank(module.base.weight, module.lora_A, module.lora_B, module.scale)


def trained_unscaled(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """The adapter is trained without its alpha / rank."""

    def worn(model: Transformer) -> Transformer:
        for module in adapted(true(model)):
            module.alpha = module.rank
        return model

    return worn


def merged_without_lengths(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """Of a DoRA the low-rank change alone is merged."""

    def merge(model: Transformer) -> Transformer:
        for module in adapted(model):
            module.lora_magnitude = None
        return true(model)

    return merge


def merged_by_the_bases_norm(trainer: NanoTrainer, true: Any) -> Callable[[Transformer], Transformer]:
    """Rows are divided by the norm of the base's, not of the sum's."""

    def merge(model: Transformer) -> Transformer:
        for module in adapted(model):
            if module.lora_magnitude is not None:
                module.lora_magnitude.mul_(row_lengths(whole_of(module)) / row_lengths(module.base.weight))
        return true(model)

    return merge


# --- Distillation ----------------------------------------------------------------------------------------------------


def followed_at_prompts(trainer: NanoTrainer, true: Any) -> Callable[[Distilled, list[Document]], TaughtBatch]:
    """The divergence is taken at prompts, too, where the labels were asked for."""
    return lambda objective, documents: true(replace(objective, everywhere=True), documents)


def over_labels_alone(trainer: NanoTrainer, true: Any) -> Callable[[list[TaughtBatch]], int]:
    """The sum over all tokens is divided by the number of labels."""
    return lambda batches: sum(batch.valid for batch in batches)


def no_temperature_squared(trainer: NanoTrainer, true: Any) -> Callable[..., nn.Module]:
    return _by_parts(true, lambda how: (how.mix / how.temperature**2, 1 - how.mix))


def mixed_the_other_way(trainer: NanoTrainer, true: Any) -> Callable[..., nn.Module]:
    """The share is the labels', the rest the teacher's."""
    return _by_parts(true, lambda how: (1 - how.mix, how.mix))


def _by_parts(true: Callable[..., DistillModel], shares: Callable[[Recipe], tuple[float, float]]) -> Callable:
    """The divergence, T^2 included, and the labels' loss, each by its share."""

    class Parts(nn.Module):
        def __init__(self, student: Transformer, teacher: Transformer, how: Recipe) -> None:
            super().__init__()
            self.models = [true(student, teacher, replace(how, mix=mix)) for mix in (1.0, 0.0)]
            self.shares = shares(how)

        def forward(self, *inputs: Any) -> Tensor:
            divergence, nats = (model(*inputs) for model in self.models)
            return self.shares[0] * divergence + self.shares[1] * nats

    return Parts


def teacher_without_mask(trainer: NanoTrainer, true: Any) -> Callable[..., nn.Module]:
    """The teacher reads across the documents of a row."""

    class Unmasked:
        def __init__(self, model: Transformer) -> None:
            self.model, self.logits = model, model.logits

        def hidden(self, tokens: Tensor, positions: Tensor, doc_ids: Tensor | None) -> Tensor:
            return self.model.hidden(tokens, positions, None)

    return lambda student, teacher, how: true(student, Unmasked(teacher), how)


def other_direction(trainer: NanoTrainer, true: Any) -> Callable[..., nn.Module]:
    """KL(student || teacher)."""
    return _plain(lambda p, q, heat: (F.log_softmax(p / heat, -1), F.log_softmax(q / heat, -1)), swapped=True)


def cool_student(trainer: NanoTrainer, true: Any) -> Callable[..., nn.Module]:
    """The teacher's distribution at the temperature, the student's at 1."""
    return _plain(lambda p, q, heat: (F.log_softmax(p / heat, -1), F.log_softmax(q, -1)), swapped=False)


def _plain(logs: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]], *, swapped: bool) -> Callable:
    """The loss of all logits at once, by torch's own functions; logs: of teacher and student."""

    class Plain(nn.Module):
        def __init__(self, student: Transformer, teacher: Transformer, how: Recipe) -> None:
            super().__init__()
            self.student, self.teacher, self.how = student, (teacher,), how

        def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, doc_ids: Tensor, at: Tensor) -> Tensor:
            mine, theirs = (m.logits(m.hidden(tokens, positions, doc_ids)) for m in (self.student, self.teacher[0]))
            log_p, log_q = logs(theirs[at].float(), mine[at].float(), self.how.temperature)
            into, of = (log_p, log_q) if swapped else (log_q, log_p)
            divergence = F.kl_div(into, of, reduction="sum", log_target=True) * self.how.temperature**2
            nats = F.cross_entropy(mine.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            return self.how.mix * divergence + (1 - self.how.mix) * nats

    return Plain


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
