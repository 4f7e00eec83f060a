"""Distillation: a student learns a teacher's whole distribution of the next token, beside the token itself.

    python -m finetune.text --data notes/ --ckpt Llama-3.2-1B --teacher Llama-3.1-8B --teacher_quantize int8

With p the teacher's distribution at `--temperature` T, q the student's, and m `--distill_mix`, a token's loss is
m T^2 KL(p || q) + (1 - m) (-log q_1(label)), q_1 at temperature 1 (Hinton et al., arXiv 1503.02531). `--distill_on all`
takes the divergence at every token, prompts included, and not at the labels alone; the sum is divided by the number of
tokens that it is taken at. As in the plain loss no logits of all tokens exist, of neither model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.config import TrainConfig
from finetune.data.documents import IGNORE, Documents, Ints
from finetune.data.files import Say
from finetune.data.packing import Batch, Cursor, Packer, Packing
from finetune.errors import UserError
from finetune.evaluate import HeldOut, Score, evaluate
from finetune.loss import MIN_CHUNK_TOKENS, LossModel, chunk_tokens
from finetune.parallelize import World
from finetune.train import Setup
from nanollama.generation.llama import Llama
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer

ARRAYS = 4  # of a chunk's size at a time, where the plain loss has one: its chunks are four times as long
Logits = Callable[[Tensor], Tensor]  # hidden states (n, D) -> logits (n, V) in fp32


@dataclass(frozen=True)
class Recipe:
    temperature: float
    mix: float  # of the divergence; the rest is the labels' own loss


class DistillLoss(torch.autograd.Function):
    """Summed loss; gradients are made in the forward pass, as in finetune.loss, and the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        taught: Tensor,
        states: Tensor,
        teacher: Logits,
        how: Recipe,
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, C), head (V, C), labels (N,), taught (N,) bool: where the divergence is taken, states (N, D).

        Returns the loss and, of it, the summed divergence.
        """
        used = (taught | (labels != IGNORE)).nonzero().squeeze(1)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, weight = hidden[used].to(dtype), head.to(dtype)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(dtype, torch.float32)
        grad_rows = torch.empty_like(rows) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, exact)) if need_head else None
        total, divergence = torch.zeros(2, dtype=exact, device=hidden.device)
        step = max(MIN_CHUNK_TOKENS, chunk_tokens(head) // ARRAYS)
        for start in range(0, len(used), step):
            at, part = used[start : start + step], slice(start, start + step)
            logits = F.linear(rows[part], weight).to(exact)  # (n, V)
            loss, kl, grad = token_losses(logits, teacher(states[at]).to(exact), labels[at], taught[at], how)
            total, divergence = total + loss, divergence + kl
            if grad_rows is not None:
                grad_rows[part] = grad.to(dtype) @ weight
            if grad_head is not None:
                grad_head += grad.to(dtype).T @ rows[part]
        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = torch.zeros_like(hidden)
            grad_hidden[used] = grad_rows.to(hidden.dtype)
        ctx.made = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(divergence)
        return total, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head = (None if made is None else made.mul_(grad) for made in ctx.made)
        ctx.made = None
        return hidden, head, None, None, None, None, None


def token_losses(
    logits: Tensor, theirs: Tensor, labels: Tensor, taught: Tensor, how: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, summed divergence, gradient of the loss by the student's logits (n, V)) of logits (n, V) each."""
    heat, mix = how.temperature, how.mix
    log_p, log_q = (F.log_softmax(x / heat, dim=1) for x in (theirs, logits))
    p, at = log_p.exp(), taught.unsqueeze(1).to(logits.dtype)
    kl = heat**2 * (p * (log_p - log_q) * at).sum()
    grad = (log_q.exp() - p) * (at * mix * heat)
    if mix == 1:
        return kl, kl, grad
    log_1 = log_q if heat == 1 else F.log_softmax(logits, dim=1)
    known = (labels != IGNORE).unsqueeze(1).to(logits.dtype)
    place = labels.clamp(min=0).unsqueeze(1)
    nats = -(log_1.gather(1, place) * known).sum()
    ones = torch.zeros_like(log_1).scatter_(1, place, 1.0)
    grad += (log_1.exp() - ones) * (known * (1 - mix))
    return mix * kl + (1 - mix) * nats, kl, grad


# --- The objective ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """Documents without their mask: each token but the first is one to be taught."""

    masked: Documents

    @property
    def bos_id(self) -> int | None:
        return self.masked.bos_id

    @property
    def lengths(self) -> Ints:
        return self.masked.lengths

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return self.masked.tokens(document, start, stop)


@dataclass(frozen=True)
class TaughtBatch:
    """A batch, and where the divergence is taken."""

    batch: Batch
    taught: Tensor  # (B, T) bool

    @property
    def valid(self) -> int:
        return self.batch.valid

    @property
    def count(self) -> int:
        return int(self.taught.sum())

    def inputs(self) -> tuple[Any, ...]:
        return *self.batch.inputs(), self.taught

    def to(self, device: torch.device) -> "TaughtBatch":
        return TaughtBatch(self.batch.to(device), self.taught.to(device, non_blocking=True))

    def pinned(self) -> "TaughtBatch":
        return TaughtBatch(self.batch.pinned(), self.taught.pin_memory())


class TaughtPacker:
    """A Packer's rows; `whole`: the divergence is taken at all their tokens."""

    def __init__(self, packer: Packer, whole: Packer | None) -> None:
        self.documents, self.packer, self.whole = packer.documents, packer, whole

    def holds(self, cursor: Cursor) -> bool:
        return self.packer.holds(cursor)

    def rows_an_epoch(self) -> int:
        return self.packer.rows_an_epoch()

    def take(self, cursor: Cursor, count: int) -> tuple[list[list[int]], Cursor]:
        return self.packer.take(cursor, count)

    def in_order(self, documents: int) -> list[list[int]]:
        return self.packer.in_order(documents)

    def documents_in(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return self.packer.documents_in(rows)

    def batch(self, rows: Sequence[Sequence[int]]) -> TaughtBatch:
        batch = self.packer.batch(rows)
        labels = self.whole.batch(rows).labels if self.whole else batch.labels
        return TaughtBatch(batch, labels != IGNORE)


class DistillModel(nn.Module):
    """(tokens, labels, positions, doc_ids, taught) -> summed loss: the unit that DDP and torch.compile wrap."""

    def __init__(self, model: Transformer, teacher: Transformer, how: Recipe) -> None:
        super().__init__()
        self.model, self.how = model, how
        self.teacher = (teacher,)  # in a tuple: it is no part of what is trained, wrapped or saved
        self.divergence = [0.0, 0.0]  # nats and tokens since they were last asked for

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, doc_ids: Tensor | None, taught: Tensor
    ) -> Tensor:
        teacher = self.teacher[0]
        with torch.no_grad():
            states = teacher.hidden(tokens, positions, doc_ids).flatten(0, 1)  # (B*T, D)
        hidden = self.model.hidden(tokens, positions, doc_ids).flatten(0, 1)  # (B*T, C)
        rest = (labels.flatten(), taught.flatten(), states, teacher.logits, self.how)
        loss, kl = DistillLoss.apply(hidden, self.model.head(), *rest)
        seen = (float(kl) / self.how.temperature**2, float(taught.sum()))
        self.divergence = [old + new for old, new in zip(self.divergence, seen, strict=True)]
        return loss


@dataclass(frozen=True)
class Distilled:
    """The objective (see finetune.objective) of --teacher; validation is the plain loss, as without a teacher."""

    teacher: Transformer
    how: Recipe
    everywhere: bool  # --distill_on all
    scores_text = True

    def packer(self, documents: Documents, seq_len: int, *, seed: int, doc_mask: bool) -> Packing:
        made = Packer(documents, seq_len, seed=seed, doc_mask=doc_mask)
        whole = Packer(Whole(documents), seq_len, seed=seed, doc_mask=doc_mask) if self.everywhere else None
        return TaughtPacker(made, whole)

    def loss_model(self, model: Transformer) -> nn.Module:
        return DistillModel(model, self.teacher, self.how)

    def evaluate(
        self, model: nn.Module, held_out: HeldOut, world: World, batch_size: int, autocast: torch.autocast
    ) -> Score:
        assert isinstance(model, DistillModel) and isinstance(held_out.packer, TaughtPacker)
        plain = LossModel(model.model).train(model.training)
        score = evaluate(plain, replace(held_out, packer=held_out.packer.packer), world, batch_size, autocast)
        model.train(model.training)
        return score

    def measure_step(self, model: nn.Module, world: World) -> dict[str, float]:
        assert isinstance(model, DistillModel)
        nats, tokens = world.sum(model.divergence).tolist()
        model.divergence = [0.0, 0.0]
        return {"kl": nats / max(tokens, 1.0)}


def with_teacher(setup: Setup, say: Say) -> Setup:
    """The run with the teacher that its config names. Raises UserError for one that has other tokens."""
    config = setup.folder.config
    if not config.teacher:
        return setup
    dtype = None if config.teacher_quantize else "fp32" if config.dtype == "fp32" else "bf16"
    device = str(setup.world.device).partition(":")[0]
    loaded = Llama.load(
        config.teacher, dtype=dtype, device=device, quantize=config.teacher_quantize, compile="off", say=say
    )
    check_tokens(setup, loaded.tokenizer, loaded.config.vocab_size)
    if config.seq_len > loaded.config.max_seq_len:
        raise UserError(
            f"--teacher {config.teacher}: was made for at most {loaded.config.max_seq_len} tokens: lower --seq_len"
        )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    say(f"teacher: {config.teacher}: {parameters:,} parameters{', int8' if config.teacher_quantize else ''}")
    how = Recipe(config.temperature, config.distill_mix)
    return replace(setup, objective=Distilled(loaded.model, how, config.distill_on == "all"))


def check_tokens(setup: Setup, theirs: Tokenizer | None, rows: int) -> None:
    """Raises UserError unless every id means the same to both."""
    name, mine = setup.folder.config.teacher, setup.tokenizer
    if rows != setup.model.config.vocab_size:
        raise UserError(
            f"--teacher {name}: has rows for {rows:,} tokens, the student for {setup.model.config.vocab_size:,}: a "
            "teacher needs the student's tokenizer"
        )
    if theirs is None:
        return
    for i in range(min(mine.vocab_size, theirs.vocab_size)):
        if mine.token_bytes(i) != theirs.token_bytes(i):
            raise UserError(
                f"--teacher {name}: token {i} is another one to it: a teacher needs the student's tokenizer"
            )


def check_teaching(entry: str, config: TrainConfig) -> None:
    """Raises UserError for flags of a teacher that is not there, or that this run cannot have."""
    usual = TrainConfig()
    for name in ("teacher_quantize", "temperature", "distill_mix", "distill_on"):
        if not config.teacher and getattr(config, name) != getattr(usual, name):
            raise UserError(f"--{name} is about a teacher: name one with --teacher")
    if config.teacher and entry == "preference":
        raise UserError("--teacher: finetune.preference has none; its reference is the model as the run begins")
    if not 0 < config.distill_mix <= 1 or not config.temperature > 0:
        raise UserError(
            f"--distill_mix {config.distill_mix} --temperature {config.temperature}: expected a share above 0, at most "
            "1, and a temperature above 0"
        )
