"""Losses over pairs of answers to one prompt, of which the first is preferred.

With p the log-probability of an answer (the sum over its tokens, end of turn included), r the reference's, n the number
of its tokens, b `--beta`; c is the chosen answer, j the rejected one; h = (p_c - r_c) - (p_j - r_j):

| --loss   | loss of a pair                                             | source                             |
| -------- | ---------------------------------------------------------- | ---------------------------------- |
| dpo      | -log sigmoid(b h)                                          | arXiv 2305.18290, equation 7       |
| dpo_norm | the same, each p and r divided by its n                    | arXiv 2411.15124 (Tulu 3)          |
| ipo      | (h - 1 / (2 b))^2, each p and r divided by its n, as trl's | arXiv 2310.12036, equation 17      |
| orpo     | -p_c / n_c - b log sigmoid(log odds_c - log odds_j), with  | arXiv 2403.07691, equation 6; it   |
|          | odds = q / (1 - q), log q = p / n                          | has no reference                   |

A batch's loss is the sum over its pairs, divided by their number over all micro-batches and ranks by the caller.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.documents import Documents
from finetune.data.packing import Packing
from finetune.data.pairs import PairBatch, pair_packer
from finetune.evaluate import HeldOut, Score
from finetune.loss import token_log_probs
from finetune.parallelize import World
from finetune.reference import Reference
from nanollama.model import Transformer

LOSSES = ("dpo", "ipo", "dpo_norm", "orpo")
BY_LENGTH = ("ipo", "dpo_norm", "orpo")  # log-probabilities are those of a token on average
SURE = -1e-9  # log-probability of a token beyond which its odds are infinite
SUMS = ("pairs", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_nats")


class PairLoss(NamedTuple):
    """All (P,): the loss, and what each answer is worth: margins and accuracy are made of these rewards."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def pair_loss(kind: str, beta: float, logps: Tensor, lengths: Tensor, reference: Tensor | None) -> PairLoss:
    """logps, reference: (P, 2) log-probabilities of the chosen and the rejected answer; lengths (P, 2) their tokens."""
    if kind in BY_LENGTH:
        logps = logps / lengths
        reference = None if reference is None else reference / lengths
    if kind == "orpo":
        odds = logps - torch.log(-torch.expm1(logps.clamp(max=SURE)))  # log odds, (P, 2)
        loss = -logps[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
        return PairLoss(loss, *(beta * logps.detach()).unbind(1))
    assert reference is not None
    ratios = logps - reference  # (P, 2)
    h = ratios[:, 0] - ratios[:, 1]
    loss = (h - 1 / (2 * beta)).square() if kind == "ipo" else -F.logsigmoid(beta * h)
    return PairLoss(loss, *(beta * ratios.detach()).unbind(1))


class PairLossModel(nn.Module):
    """A PairBatch's inputs -> summed loss of its pairs: the unit that DDP and torch.compile wrap."""

    def __init__(self, model: Transformer, kind: str, beta: float) -> None:
        super().__init__()
        self.model, self.kind, self.beta = model, kind, beta
        self.sums = [0.0] * len(SUMS)  # over the pairs since they were last asked for

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        doc_ids: Tensor,
        sequence: Tensor,
        pairs: int,
        reference: Tensor | None,
    ) -> Tensor:
        logps, lengths = sequence_log_probs(self.model, tokens, labels, positions, doc_ids, sequence, pairs)
        found = pair_loss(self.kind, self.beta, logps, lengths, reference)
        self._add(found, logps)
        return found.loss.sum()

    def _add(self, found: PairLoss, logps: Tensor) -> None:
        margin = found.chosen - found.rejected
        numbers = [margin, (margin > 0).to(margin.dtype), found.chosen, found.rejected, -logps.detach()[:, 0]]
        new = torch.stack([n.sum() for n in numbers]).tolist()
        self.sums = [old + more for old, more in zip(self.sums, [float(len(margin)), *new], strict=True)]

    def take_sums(self) -> list[float]:
        """SUMS since the last call."""
        taken, self.sums = self.sums, [0.0] * len(SUMS)
        return taken


def sequence_log_probs(
    model: Transformer,
    tokens: Tensor,
    labels: Tensor,
    positions: Tensor,
    doc_ids: Tensor,
    sequence: Tensor,
    pairs: int,
) -> tuple[Tensor, Tensor]:
    """((P, 2) sums of log p over the labels of each sequence, (P, 2) numbers of labels), in float64.

    float64: the losses are made of small differences between sums of hundreds of numbers.
    """
    hidden = model.hidden(tokens, positions, doc_ids)  # (B, T, C)
    wide = torch.float32 if hidden.device.type == "mps" else torch.float64
    each = token_log_probs(hidden.flatten(0, 1), model.head(), labels.flatten()).to(wide)  # (B*T,)
    judged = (labels.flatten() >= 0).nonzero().squeeze(1)
    place = sequence.flatten()[judged]
    zeros = torch.zeros(2 * pairs, dtype=wide, device=each.device)
    sums = zeros.index_add(0, place, each[judged])
    lengths = zeros.index_add(0, place, torch.ones_like(each[judged]))
    return sums.view(pairs, 2), lengths.view(pairs, 2)


@dataclass(frozen=True)
class Pairwise:
    """The objective (see finetune.objective) of --loss; orpo has no reference."""

    kind: str
    beta: float
    reference: Reference | None = None
    scores_text = False

    def packer(self, documents: Documents, seq_len: int, *, seed: int, doc_mask: bool) -> Packing:
        return pair_packer(documents, seq_len, seed)

    def loss_model(self, model: Transformer) -> nn.Module:
        return PairLossModel(model, self.kind, self.beta)

    def measure_step(self, model: nn.Module, world: World) -> dict[str, float]:
        assert isinstance(model, PairLossModel)
        sums = dict(zip(SUMS, world.sum(model.take_sums()).tolist(), strict=True))
        return {name: sums[name] / sums["pairs"] for name in SUMS[1:-1]}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, held_out: HeldOut, world: World, batch_size: int, autocast: torch.autocast
    ) -> Score:
        """Loss a pair, bits per byte of the chosen answers, margin, accuracy, and KL divergence to the reference."""
        assert isinstance(model, PairLossModel)
        was_training = model.training
        model.eval()
        model.take_sums()
        rows, loss, kl, judged = held_out.rows[world.rank :: world.size], 0.0, 0.0, 0
        for i in range(0, len(rows), batch_size):
            batch = held_out.packer.batch(rows[i : i + batch_size])
            assert isinstance(batch, PairBatch)
            with autocast:
                loss += model(*batch.to(world.device).inputs()).item()
                if self.reference:
                    nats, tokens = self.reference.divergence(model.model, batch, world.device)
                    kl, judged = kl + nats, judged + tokens
        model.train(was_training)
        total, all_kl, all_judged, *sums = world.sum([loss, kl, float(judged), *model.take_sums()]).tolist()
        found = dict(zip(SUMS, sums, strict=True))
        more = {f"val_{name}": found[name] / found["pairs"] for name in SUMS[1:-1]}
        if self.reference:
            more["val_kl"] = all_kl / max(all_judged, 1.0)
        return Score(total / found["pairs"], held_out.score(found["chosen_nats"], 1).bpb, more)
