"""What the doctor looks at: a run that is set up and has not begun, and how much of it there is time for.

patient = Patient.of(setup, thorough=True)
patient.documents                           # the first ones, as training sees them
patient.batch                               # the first row, as training sees it
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.build import mixed_precision
from finetune.config import TrainConfig
from finetune.data.documents import IGNORE, Bools, Documents, Ints, mask_of
from finetune.data.packing import Batch, Cursor, Packer
from finetune.loss import LossModel
from finetune.optim import is_trained, select_trained_
from finetune.train import Setup
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer

QUICK_DOCUMENTS, DOCUMENTS = 64, 1000
QUICK_TOKENS = 512  # of a row, that the model is run on
QUICK_FLOPS = 2e11  # of one forward pass: about 4 s of a slow CPU; a smaller part of a row where it would take more


class Finding(NamedTuple):
    """An ill: its short name, and one line that says what was seen and how to mend it."""

    ill: str
    line: str


@dataclass
class Patient:
    """A run before its first step; nothing of it is changed when a check has returned."""

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig
    packer: Packer  # of the training documents
    val: Documents
    device: torch.device
    autocast: torch.autocast
    talks: bool = False  # documents are dialogues, of which a part is learned
    thorough: bool = True
    facts: list[str] = field(default_factory=list)  # what was measured and is no ill

    @classmethod
    def of(cls, setup: Setup, *, talks: bool = False, thorough: bool = True) -> "Patient":
        config = setup.folder.config
        select_trained_(setup.model, config.method)
        return cls(
            model=setup.model,
            tokenizer=setup.tokenizer,
            config=config,
            packer=Packer(setup.train, config.seq_len, seed=config.seed, doc_mask=config.doc_mask == "on"),
            val=setup.val,
            device=setup.world.device,
            autocast=mixed_precision(config, setup.world.device),
            talks=talks,
            thorough=thorough,
        )

    @cached_property
    def documents(self) -> list[tuple[Ints, Bools]]:
        """(tokens, which of them are labels) of the first ones."""
        documents = self.packer.documents
        count = min(len(documents.lengths), DOCUMENTS if self.thorough else QUICK_DOCUMENTS)
        most = 8 * self.config.seq_len  # of a book its beginning
        stops = np.minimum(documents.lengths[:count], most).tolist()
        return [(documents.tokens(i, 0, stop), mask_of(documents, i, 0, stop)) for i, stop in enumerate(stops)]

    @cached_property
    def rows(self) -> list[list[int]]:
        """The first rows of a run, each a list of pieces."""
        return self.packer.take(Cursor(), 1)[0]

    @cached_property
    def batch(self) -> Batch:
        return self.packer.batch(self.rows).to(self.device)

    def part(self) -> Batch:
        """The first row, or as much of it as there is time for."""
        weights = sum(p.numel() for p in self.model.parameters())
        affordable = int(QUICK_FLOPS / 2 / weights) if self.device.type == "cpu" else self.config.seq_len
        most = self.config.seq_len if self.thorough else QUICK_TOKENS
        return first_tokens(self.batch, max(16, min(most, affordable)))

    def is_trained(self, name: str) -> bool:
        return is_trained(name, self.config.method)

    def nats(self, batch: Batch, autocast: torch.autocast | None = None) -> Tensor:
        """The mean loss of a batch's labels; NaN where it has none."""
        total = self.loss(batch, autocast)
        return total / batch.valid if batch.valid else total * math.nan

    def loss(self, batch: Batch, autocast: torch.autocast | None = None) -> Tensor:
        with autocast or self.autocast:
            return LossModel(self.model)(batch.tokens, batch.labels, batch.positions, batch.doc_ids)


def first_tokens(batch: Batch, count: int) -> Batch:
    """Each row's first tokens; the last of them predicts nothing that is cut off."""
    if count >= batch.tokens.shape[1]:
        return batch
    labels = batch.labels[:, :count].clone()
    return replace(
        batch,
        tokens=batch.tokens[:, :count],
        labels=labels,
        positions=batch.positions[:, :count],
        doc_ids=None if batch.doc_ids is None else batch.doc_ids[:, :count],
        valid=int((labels != IGNORE).sum()),
    )


@contextmanager
def unchanged(patient: Patient) -> Iterator[None]:
    """Whatever is done to the trained parameters is undone, bit by bit; gradients go."""
    kept = {name: p.detach().clone() for name, p in patient.model.named_parameters() if p.requires_grad}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in patient.model.named_parameters():
                parameter.grad = None
                if name in kept:
                    parameter.copy_(kept[name])
