"""The loss of next-token prediction: summed over valid labels here, divided by their number over all micro-batches and
ranks by the caller, so that neither accumulation nor parallelism changes what a token weighs (HF#34191,
torchtune#1875).

The logits of all tokens never exist together: chunk by chunk they become the loss and, while they are at hand, its
gradients (as in Cut Cross-Entropy, arXiv 2411.09009, and Liger, arXiv 2410.10989), so nothing is computed twice.

    loss = LossModel(model)(tokens, labels, positions, doc_ids) / number_of_labels
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.data.documents import IGNORE
from nanollama.model import Transformer

CHUNK_LOGITS = 2**24  # numbers at a time: 128 tokens of a Llama 3 vocabulary, 64 MB in fp32
CHUNK_LOGITS_GPU = 2**28  # a GPU is busy only with larger products, and sums the head's gradient once a chunk: 1 GB
BLOCK_NUMBERS = 2**19  # that elementwise passes go over at a time: 2 MB in fp32, a core's cache (docs/LOG.md)
MIN_CHUNK_TOKENS = 64  # matrix products of fewer rows are slow

# (hidden states (N, C), head (V, C), labels (N,)) -> summed loss in nats: the seam for other losses.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats, in fp32, over the labels that are not IGNORE; holds all logits."""
    logits = F.linear(hidden, head)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """`plain_cross_entropy` in chunks: its peak is one chunk of logits, and the head's gradient where it is trained."""
    return LinearCrossEntropy.apply(hidden, head, labels)


def token_log_probs(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of each row, (N,) in fp32 or finer, 0 where the label is IGNORE; in chunks, as the loss is.

    For losses that need what all tokens of a sequence sum to before a gradient is known: the backward pass makes the
    logits of each chunk again.
    """
    return TokenLogProbs.apply(hidden, head, labels)


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, vocabulary: "Vocabulary | None" = None
    ) -> Tensor:
        vocabulary = vocabulary or WholeVocabulary()
        valid = (labels != IGNORE).nonzero().squeeze(1)
        labels = labels[valid]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, weight = hidden[valid].to(dtype), head.to(dtype)
        need_hidden, need_head, *_ = ctx.needs_input_grad
        exact = torch.promote_types(dtype, torch.float32)
        grad_rows = torch.empty_like(rows, dtype=vocabulary.dtype_of_rows(dtype)) if need_hidden else None
        # Chunks are summed in fp32: in bf16 every sum would round, 64 of them to 6 times the plain loss's error.
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, exact)) if need_head else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        step = vocabulary.chunk_tokens(head)
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            total += _chunk(rows[part], weight, labels[part], part, grad_rows, grad_head, vocabulary)
        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = torch.zeros_like(hidden)
            grad_hidden[valid] = vocabulary.sum_(grad_rows).to(dtype).to(hidden.dtype)
        ctx.made = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.made is None:
            raise RuntimeError(
                "these gradients were handed out already: a second backward pass needs a new forward one"
            )
        hidden, head = (None if made is None else made.mul_(grad) for made in ctx.made)  # no second copy of the head's
        ctx.made = None
        return hidden, head, None, None


class Vocabulary(Protocol):
    """Which rows of the head this process has."""

    def chunk_tokens(self, head: Tensor) -> int:
        """Tokens whose logits exist at a time, the same on every rank that has rows of it."""

    def dtype_of_rows(self, dtype: torch.dtype) -> torch.dtype:
        """Of the hidden states' gradients before `sum_`."""

    def own(self, labels: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Which of labels (n,) are rows here, and those as numbers of these rows."""

    def join(self, largest: Tensor, sums: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        """From softmax_parts_ and the labels' logits, (n, 1) each, zero for a row that is elsewhere: what to divide
        these powers by, and the losses.
        """

    def sum_(self, grad_rows: Tensor) -> Tensor:
        """The hidden states' gradients by way of all rows."""


@dataclass(frozen=True)
class WholeVocabulary:
    """All rows."""

    def chunk_tokens(self, head: Tensor) -> int:
        return chunk_tokens(head)

    def dtype_of_rows(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def own(self, labels: Tensor) -> tuple[Tensor | slice, Tensor]:
        return slice(None), labels

    def join(self, largest: Tensor, sums: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        return sums, sums.log() + largest - picked

    def sum_(self, grad_rows: Tensor) -> Tensor:
        return grad_rows


class TokenLogProbs(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.save_for_backward(hidden, head, labels)
        valid = (labels != IGNORE).nonzero().squeeze(1)
        rows, weight, picks = hidden[valid].to(ctx.dtype), head.to(ctx.dtype), labels[valid]
        exact, step = torch.promote_types(ctx.dtype, torch.float32), chunk_tokens(head)
        found = torch.zeros(len(labels), dtype=exact, device=hidden.device)
        for start in range(0, len(valid), step):
            part = slice(start, start + step)
            logits = F.linear(rows[part], weight)  # (n, V)
            picked = logits.gather(1, picks[part].unsqueeze(1))
            _, largest, sums = softmax_parts_(logits)
            found[valid[part]] = (picked - largest - sums.log()).squeeze(1)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head, labels = ctx.saved_tensors
        valid = (labels != IGNORE).nonzero().squeeze(1)
        rows, weight, picks = hidden[valid].to(ctx.dtype), head.to(ctx.dtype), labels[valid]
        need_hidden, need_head, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if need_hidden else None
        exact, step = torch.promote_types(ctx.dtype, torch.float32), chunk_tokens(head)
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, exact)) if need_head else None
        counts = -grad[valid].unsqueeze(1)  # a chunk's gradients are those of -log p
        for start in range(0, len(valid), step):
            part = slice(start, start + step)
            _chunk(rows[part], weight, picks[part], part, grad_rows, grad_head, WholeVocabulary(), counts[part])
        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = torch.zeros_like(hidden)
            grad_hidden[valid] = grad_rows.to(hidden.dtype)
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None


def chunk_tokens(head: Tensor, rows: int = 0) -> int:
    """Tokens whose logits exist at a time, for a head (V, C). rows: in place of V."""
    return max(MIN_CHUNK_TOKENS, (CHUNK_LOGITS_GPU if head.is_cuda else CHUNK_LOGITS) // (rows or head.shape[0]))


def _chunk(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    part: slice,
    grad_rows: Tensor | None,
    grad_head: Tensor | None,
    vocabulary: Vocabulary,
    counts: Tensor | None = None,
) -> Tensor:
    """Loss of some rows (n, C); their gradients are put into grad_rows[part] and added to grad_head. No graph here.

    counts (n, 1): how often each row counts in the gradients; once, where there are none.

    With e = exp(logits - largest) and s = sum(e), the gradient of the logits is e / s less one at the label. The
    division moves to the small side of each product, and the label's part is taken off its row.
    """
    logits = F.linear(rows, weight)  # (n, V)
    here, ids = vocabulary.own(labels)
    picked = logits.new_zeros(len(labels), 1)
    picked[here] = logits[here].gather(1, ids.unsqueeze(1))  # (n, 1)
    powers, largest, sums = softmax_parts_(logits)
    sums, losses = vocabulary.join(largest, sums, picked)
    if grad_rows is not None:
        change = (powers @ weight) / sums
        change[here] -= weight[ids]
        grad_rows[part] = change if counts is None else change * counts
    if grad_head is not None:
        rows = rows if counts is None else (rows * counts).to(rows.dtype)
        scaled = (rows / sums).to(rows.dtype)
        if grad_head.dtype == rows.dtype:
            grad_head.addmm_(powers.T, scaled)
        else:
            add_in_blocks_(grad_head, powers.T @ scaled)
        grad_head.index_add_(0, ids, rows[here].to(grad_head.dtype), alpha=-1)
    return losses.sum()


def softmax_parts_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (n, V) -> exp(logits - largest) in their place, largest and the powers' sums (n, 1), in fp32 or finer.

    In blocks that stay in a core's cache from the first pass over them to the last.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    largest, sums = torch.empty(2, len(logits), 1, dtype=exact, device=logits.device)
    for block in row_blocks(logits):
        powers = logits[block].to(exact)  # a view of them, where they are exact already
        largest[block] = powers.amax(1, keepdim=True)
        sums[block] = powers.sub_(largest[block]).exp_().sum(1, keepdim=True)
        if exact != logits.dtype:
            logits[block] = powers
    return logits, largest, sums


def add_in_blocks_(total: Tensor, part: Tensor) -> None:
    """total (V, C) += part of a lower precision, block by block: seven times the speed of adding them whole."""
    for block in row_blocks(total):
        total[block] += part[block].to(total.dtype)


def row_blocks(x: Tensor) -> Iterator[slice]:
    """The rows of x, on CPU BLOCK_NUMBERS numbers at a time."""
    step = max(1, BLOCK_NUMBERS // x.shape[1]) if x.device.type == "cpu" else len(x)
    return (slice(at, at + step) for at in range(0, len(x), step))


class LossModel(nn.Module):
    """(tokens, labels, positions, doc_ids) -> summed loss: the unit that DDP and torch.compile wrap."""

    def __init__(self, model: Transformer, loss: Loss = linear_cross_entropy) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, doc_ids: Tensor | None) -> Tensor:
        hidden = self.model.hidden(tokens, positions, doc_ids)  # (B, T, C)
        return self.loss(hidden.flatten(0, 1), self.model.head(), labels.flatten())
