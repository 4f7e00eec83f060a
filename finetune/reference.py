"""What the model of a preference run says before its first step: the log-probability of every answer, made once and
kept in the cache, so that training needs no second model in memory.

The KL divergence to the reference is exact: of the first held-out answers the reference's last hidden states are kept,
and its head where that is trained, from which its whole distribution at each token follows.

    CACHE/reference/HASH.safetensors     train, val (pairs, 2); hidden (tokens, C); head (V, C) where it is trained
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.config import TrainConfig
from finetune.data.documents import first_documents
from finetune.data.files import Say, appearing_whole
from finetune.data.pairs import PairBatch, PairPacker, Pairs
from finetune.lora import LoraLinear, NF4Linear
from finetune.loss import chunk_tokens
from finetune.parallelize import World
from nanollama.model import Transformer

KL_TOKENS = 8192  # of held-out pairs whose hidden states are kept, about
COMPUTED_BY = ("seq_len", "batch_size", "dtype", "weights", "device", "threads", "method")
LogProbs = Callable[..., tuple[Tensor, Tensor]]  # finetune.pairwise.sequence_log_probs


@dataclass(frozen=True)
class Reference:
    """Of a run's beginning."""

    train: Tensor  # (pairs, 2) float64, CPU: log-probabilities of the chosen and the rejected answers
    val: Tensor
    hidden: Tensor  # (tokens, C), CPU: last hidden states at the judged tokens of the first held-out sequences
    starts: tuple[int, ...]  # of each such sequence in `hidden`, and the end of the last one
    head: Path | None  # the file that holds the head; None: it is not trained, the model's own is it

    def divergence(self, model: Transformer, batch: PairBatch, device: torch.device) -> tuple[float, int]:
        """(summed KL(model || reference) in nats, tokens) over the judged tokens of this batch that are known."""
        known = [2 * pair + side for pair in batch.pairs for side in (0, 1)]
        kept = [i for i, sequence in enumerate(known) if sequence + 1 < len(self.starts)]
        if not kept:
            return 0.0, 0
        theirs = torch.cat([self.hidden[self.starts[known[i]] : self.starts[known[i] + 1]] for i in kept]).to(device)
        mine = judged_states(model, batch.to(device), kept)
        head = model.head()
        return summed_divergence(mine, head, theirs, self._head(head)), len(theirs)

    def _head(self, mine: Tensor) -> Tensor:
        if self.head is None:
            return mine
        with safe_open(self.head, "pt", device=str(mine.device)) as file:
            return file.get_tensor("head")


def judged_states(model: Transformer, batch: PairBatch, sequences: Sequence[int]) -> Tensor:
    """Last hidden states (n, C) at the labels of some of the batch's sequences, one after another."""
    tokens, labels, positions, doc_ids = batch.batch.inputs()
    hidden = model.hidden(tokens, positions, doc_ids).flatten(0, 1)  # (B*T, C)
    wanted = torch.isin(batch.sequence, torch.tensor(list(sequences), device=tokens.device))
    return hidden[((labels >= 0) & wanted).flatten()]


def summed_divergence(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> float:
    """Sum over rows of KL(p || q) in nats, p of the first states and head, q of the second; in chunks."""
    total, step = 0.0, chunk_tokens(head)
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        p, q = (
            F.log_softmax(F.linear(h[part].to(w.dtype), w).float(), dim=1)
            for h, w in ((hidden, head), (theirs, their_head))
        )
        total += float((p.exp() * (p - q)).sum())
    return total


# --- Making it -------------------------------------------------------------------------------------------------------


def open_reference(
    model: Transformer,
    pairs: tuple[Pairs, Pairs],
    log_probs: LogProbs,
    config: TrainConfig,
    cache: Path,
    world: World,
    autocast: torch.autocast,
    say: Say,
) -> Reference:
    """From the cache, else made by `model` as it stands, before anything is trained."""
    key = {name: value for name, value in asdict(config).items() if name in COMPUTED_BY}
    key |= {"model": model_digest(model), "pairs": [p.fingerprint() for p in pairs]}
    key |= {"torch": torch.__version__, "ranks": world.size}
    path = cache / "reference" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
    if world.from_main(path.exists):
        say(f"reference: log-probabilities of {sum(len(p.lengths) for p in pairs):,} pairs from the cache")
    else:
        say(f"reference: log-probabilities of {sum(len(p.lengths) for p in pairs):,} pairs, made once")
        tensors = make_reference(model, pairs, log_probs, config, world, autocast)
        if world.is_main:
            with appearing_whole(path) as temporary:
                save_file(tensors, temporary)
        world.barrier()
    with safe_open(path, "pt") as file:
        trained = "head" in file.keys()  # noqa: SIM118  # it is no dict
        train, val, hidden, starts = (file.get_tensor(name) for name in ("train", "val", "hidden", "starts"))
    return Reference(train, val, hidden, tuple(starts.tolist()), path if trained else None)


@torch.no_grad()
def make_reference(
    model: Transformer,
    pairs: tuple[Pairs, Pairs],
    log_probs: LogProbs,
    config: TrainConfig,
    world: World,
    autocast: torch.autocast,
) -> dict[str, Tensor]:
    """What the cache keeps. Without dropout, whatever the run has: the reference is not drawn anew each time."""
    was_training = model.training
    model.eval()
    with autocast:
        tables = [score_pairs(model, p, log_probs, config, world) for p in pairs]
        hidden, starts = held_out_states(model, pairs[1], config, world.device)
    model.train(was_training)
    found = {"train": tables[0], "val": tables[1], "hidden": hidden, "starts": starts}
    head = model.head()
    return found | ({"head": head.detach().cpu().clone()} if head.requires_grad else {})


def score_pairs(model: Transformer, pairs: Pairs, log_probs: LogProbs, config: TrainConfig, world: World) -> Tensor:
    """(pairs, 2) float64: each rank takes its share of the rows."""
    packer = PairPacker(pairs, config.seq_len)
    rows = packer.in_order(len(pairs.lengths))[world.rank :: world.size]
    table = torch.zeros(len(pairs.lengths), 2, dtype=torch.float64)
    for i in range(0, len(rows), config.batch_size):
        batch = packer.batch(rows[i : i + config.batch_size]).to(world.device)
        found, _ = log_probs(model, *batch.inputs()[:-1])
        table[list(batch.pairs)] = found.double().cpu()
    return world.sum(table).cpu()


def held_out_states(model: Transformer, pairs: Pairs, config: TrainConfig, device: torch.device) -> Any:
    """(last hidden states at the judged tokens of the first pairs, where each sequence begins), on every rank."""
    packer = PairPacker(pairs, config.seq_len)
    count = first_documents(pairs, KL_TOKENS)
    each: dict[int, Tensor] = {}
    for row in packer.in_order(count):
        batch = packer.batch([row]).to(device)
        for i, pair in enumerate(batch.pairs):
            for side in (0, 1):
                each[2 * pair + side] = judged_states(model, batch, [2 * i + side]).cpu()
    ordered = [each[sequence] for sequence in range(2 * count)]
    return torch.cat(ordered), torch.tensor(np.cumsum([0, *map(len, ordered)]))


def model_digest(model: Transformer) -> str:
    """A hash of every weight, adapters included; an adapter that changes nothing yet counts as none."""
    digest = hashlib.sha256()
    idle = {f"{n}.lora_" for n, m in model.named_modules() if isinstance(m, LoraLinear) and m.is_idle()}
    weights: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if not n.startswith(tuple(idle))]
    weights += [(n, m.weight) for n, m in model.named_modules() if isinstance(m, NF4Linear)]
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
