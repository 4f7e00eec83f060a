"""What a run learns: which batches it sees, what their loss is, and what is measured on held-out data. The loop knows
this interface alone.

    Setup(..., objective=NEXT_TOKEN)      # the default: the next token; finetune.pairwise learns preferences
"""

from typing import Protocol

import torch
from torch import nn

from finetune.data.documents import Documents
from finetune.data.packing import Packer, Packing
from finetune.evaluate import HeldOut, Score, evaluate
from finetune.loss import LossModel
from finetune.parallelize import World
from nanollama.model import Transformer


class Objective(Protocol):
    """One way of learning from documents."""

    @property
    def scores_text(self) -> bool:
        """Whether validation is the loss of the next token, which chance and a bigram model have, too."""

    def packer(self, documents: Documents, seq_len: int, *, seed: int, doc_mask: bool) -> Packing:
        """The rows of a run, or of what is held out."""

    def loss_model(self, model: Transformer) -> nn.Module:
        """What gives the summed loss of a batch's `inputs()`; it has to run the model in its forward pass."""

    def evaluate(
        self, model: nn.Module, held_out: HeldOut, world: World, batch_size: int, autocast: torch.autocast
    ) -> Score:
        """Of a `loss_model`, on all ranks together."""

    def measure_step(self, model: nn.Module, world: World) -> dict[str, float]:
        """What there is to say of the step that the `loss_model` has just done, beside its loss."""


class NextToken:
    """Cross-entropy of the next token, over all labels alike."""

    scores_text = True

    def packer(self, documents: Documents, seq_len: int, *, seed: int, doc_mask: bool) -> Packing:
        return Packer(documents, seq_len, seed=seed, doc_mask=doc_mask)

    def loss_model(self, model: Transformer) -> nn.Module:
        return LossModel(model)

    def evaluate(
        self, model: nn.Module, held_out: HeldOut, world: World, batch_size: int, autocast: torch.autocast
    ) -> Score:
        return evaluate(model, held_out, world, batch_size, autocast)

    def measure_step(self, model: nn.Module, world: World) -> dict[str, float]:
        return {}


NEXT_TOKEN = NextToken()
