"""The loss of next-token prediction: summed over valid labels here, divided by their number over all micro-batches and
ranks by the caller, so that neither accumulation nor parallelism changes what a token weighs (HF#34191,
torchtune#1875).

    python -c "from finetune.loss import IGNORE; print(IGNORE)"      # -100, torch's own convention
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nanollama.model import Transformer

IGNORE = -100  # label of a token whose successor is not to be predicted

# (hidden states (N, C), head (V, C), labels (N,)) -> summed loss in nats: the seam for losses that hold no logits.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats, in fp32, over the labels that are not IGNORE."""
    logits = F.linear(hidden, head).float()  # (N, V)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


class LossModel(nn.Module):
    """(tokens, labels, positions, doc_ids) -> summed loss: the unit that DDP and torch.compile wrap."""

    def __init__(self, model: Transformer, loss: Loss = cross_entropy_sum) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, doc_ids: Tensor | None) -> Tensor:
        hidden = self.model.hidden(tokens, positions, doc_ids)  # (B, T, C)
        return self.loss(hidden.flatten(0, 1), self.model.head(), labels.flatten())
