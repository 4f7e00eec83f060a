"""Validation loss in nats per token and, since that depends on the tokenizer, in bits per byte of text; the same of a
bigram model fitted on the training tokens, which a model that has learned anything beats.

    bits per byte = nats of all held-out tokens / ln 2 / bytes of their text

Run as a command it is finetune.scoring: checkpoints side by side on a text, and in tasks.

    python -m finetune.evaluate --ckpt A --ckpt B --data FILE
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from finetune.data.documents import Documents, Ints, first_documents, whole, whole_mask
from finetune.data.packing import Packing
from finetune.parallelize import World
from nanollama.tokenizer import Tokenizer

BIGRAM_TOKENS = 20_000_000  # training tokens that the bigram is fitted on, at most
PRIOR_COUNTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token
    bpb: float  # bits per byte
    more: dict[str, float] = field(default_factory=dict)  # of losses that have more to say


@dataclass(frozen=True)
class HeldOut:
    """What is evaluated: whole documents, packed, and the bytes of their text."""

    packer: Packing
    rows: list[list[int]]
    documents: int
    text_bytes: int  # of the labels

    def score(self, nats: float, tokens: int) -> Score:
        return Score(nats / tokens, nats / math.log(2) / self.text_bytes)


def hold_out(packer: Packing, tokenizer: Tokenizer, max_tokens: int) -> HeldOut:
    """The first documents, about `max_tokens` of them and at least one."""
    documents = packer.documents
    count = first_documents(documents, max_tokens)
    special = list(tokenizer.special_ids.values())  # their names are no text
    ids = (whole(documents, i)[whole_mask(documents, i)] for i in range(count))
    texts = (tokenizer.decode(labels[~np.isin(labels, special)].tolist()) for labels in ids)
    return HeldOut(packer, packer.in_order(count), count, sum(len(text.encode()) for text in texts))


@torch.no_grad()
def evaluate(model: nn.Module, held_out: HeldOut, world: World, batch_size: int, autocast: torch.autocast) -> Score:
    """Score `model` (a LossModel or what compiles it) on the held-out rows, shared among the ranks."""
    was_training = model.training
    model.eval()
    mine = held_out.rows[world.data_rank :: world.data_size]
    most = -(-len(held_out.rows) // world.data_size)  # rows of any rank: shards are gathered by all ranks together
    nats, tokens = 0.0, 0
    for i in range(0, most, batch_size):
        rows = mine[i : i + batch_size]
        batch = held_out.packer.batch(rows + [[]] * (batch_size - len(rows))).to(world.device)
        with autocast:
            nats += model(*batch.inputs()).item()
        tokens += batch.valid
    model.train(was_training)
    total_nats, total_tokens = world.sum([nats, float(tokens)]).tolist()
    return held_out.score(total_nats, int(total_tokens))


def bigram(train: Documents, held_out: HeldOut, vocab_size: int) -> Score:
    """An interpolated bigram: (count(a, b) + k p(b)) / (count(a) + k), with the k that suits the held-out text best."""
    first, second = _pairs(train, first_documents(train, BIGRAM_TOKENS))
    codes, counts = np.unique(first * vocab_size + second, return_counts=True)
    of_first = np.bincount(first, minlength=vocab_size)
    unigram = (np.bincount(second, minlength=vocab_size) + 1) / (len(second) + vocab_size)
    a, b = _pairs(held_out.packer.documents, held_out.documents)
    place = np.minimum(np.searchsorted(codes, a * vocab_size + b), len(codes) - 1)
    seen = np.where(codes[place] == a * vocab_size + b, counts[place], 0)
    nats = [-np.log((seen + k * unigram[b]) / (of_first[a] + k)).sum() for k in PRIOR_COUNTS]
    return held_out.score(float(min(nats)), len(b))


def _pairs(documents: Documents, count: int) -> tuple[Ints, Ints]:
    """All neighbouring tokens within the first `count` documents whose second one is a label."""
    texts = [(whole(documents, i), whole_mask(documents, i)[1:]) for i in range(count)]
    return np.concatenate([t[:-1][mask] for t, mask in texts]), np.concatenate([t[1:][mask] for t, mask in texts])


def loss_model_of(module: nn.Module) -> nn.Module:
    """The LossModel inside DDP's wrapper: ranks with different numbers of rows must not wait for each other."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    return inner


if __name__ == "__main__":
    from finetune.scoring import evaluate_checkpoints
    from nanollama.cli import run

    run(evaluate_checkpoints)
