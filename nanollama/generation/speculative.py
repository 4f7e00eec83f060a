"""Speculative decoding: a drafter guesses several tokens, the model checks them all in one pass.

The answer is the model's own. Greedy: a guess stays while it is the model's choice. Sampling: a guess x is kept with
probability min(1, p(x) / q(x)), else a token is drawn from what p has beyond q; either way x is distributed as p, the
model's distribution after temperature, filters and penalty, whatever the drafter's q is (Leviathan et al., arXiv
2211.17192; Chen et al., 2302.01318). A pass over a few tokens reads the weights once, so each kept guess is a token
for nothing: on text that repeats itself, or with a small draft model of the same vocabulary.

    from nanollama.generation.speculative import Lookup
    llama = Llama.load("Meta-Llama-3.1-8B", drafter=Lookup())         # or DraftModel(small.model)
    for event in llama.generate(["Once upon a time"]): ...
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanollama.generation.decode import Event, Row, Sampling, prefill, read_tokens, scores_of, seen_tokens
from nanollama.generation.logprobs import Top, log_probabilities, most_probable
from nanollama.generation.sample import Filter, draw, make_filter
from nanollama.model import KVCache, Transformer
from nanollama.tokenizer.base import common_length


@dataclass(frozen=True)
class Draft:
    """Guesses for the next tokens; `probs` (n, V) are the distributions they were drawn from, None: certain guesses."""

    tokens: list[int]
    probs: Tensor | None = None


class Drafter(Protocol):
    def propose(self, ids: list[int], n: int, row: Row, keep: Filter | None) -> Draft:
        """Up to n guesses for what follows `ids` (prompt and answer so far).

        keep: the filter of the sampling, None when greedy. A drafter that draws uses row.generator.
        """

    def start(self) -> "Drafter":
        """A drafter for a new answer: it shares nothing that changes with this one."""


@dataclass(frozen=True)
class Lookup:
    """Prompt lookup: what followed the last tokens when they came before. Costs nothing, needs no second model."""

    longest: int = 3  # tokens of the end that are looked for, and fewer where these never came before

    def propose(self, ids: list[int], n: int, row: Row, keep: Filter | None) -> Draft:
        for length in range(min(self.longest, len(ids) - 1), 0, -1):
            end = ids[-length:]
            for at in range(len(ids) - length - 1, -1, -1):
                if ids[at : at + length] == end:
                    return Draft(ids[at + length : at + length + n])
        return Draft([])

    def start(self) -> "Lookup":
        return self


class DraftModel:
    """A smaller model with the same vocabulary, which decodes n tokens by itself."""

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval()
        self.cache: KVCache | None = None
        self.read: list[int] = []  # the tokens whose keys and values the cache holds

    def start(self) -> "DraftModel":
        return DraftModel(self.model)

    def propose(self, ids: list[int], n: int, row: Row, keep: Filter | None) -> Draft:
        n = min(n, self.model.config.max_seq_len - len(ids))
        tokens: list[int] = []
        probs: list[Tensor] = []
        for _ in range(n):
            logits = self._next_logits([*ids, *tokens], len(ids) + row.tokens_left)
            if keep is None:
                tokens.append(int(logits.argmax(-1)))
                continue
            kept = keep(logits)  # (1, V)
            tokens.append(int(draw(kept, row.generator)))
            probs.append(kept.double().softmax(-1))
        return Draft(tokens, torch.cat(probs) if probs else None)

    def _next_logits(self, ids: list[int], max_len: int) -> Tensor:
        """Logits (1, V) after ids; only what the cache does not hold is read."""
        if self.cache is None:
            weight = self.model.tok_embeddings.weight
            self.cache = KVCache(self.model.config, 1, max_len, dtype=weight.dtype, device=weight.device)
        # The newest token is always read again: its logits are wanted.
        same = min(common_length(self.read, ids), len(ids) - 1)
        self.cache.length, self.read = same, list(ids)
        return read_tokens(self.model, ids[same:], self.cache)


@torch.inference_mode()
def decode_speculative(
    model: Transformer, rows: list[Row], sampling: Sampling, drafter: Drafter, n: int = 5
) -> Iterator[Event]:
    """As `decode`, with up to n guesses a pass; the answers come one after the other."""
    for row in rows:
        yield from _answer(model, row, sampling, drafter.start(), n)


def _answer(model: Transformer, row: Row, sampling: Sampling, drafter: Drafter, n: int) -> Iterator[Event]:
    cache, logits = prefill(model, [row])  # (1, V)
    seen = seen_tokens([row], logits) if sampling.repetition_penalty != 1 else None  # (1, V)
    judge = Judge(row, sampling, seen)
    ids, draft = list(row.ids), Draft([])
    while True:
        for token, logprob, top in judge.decide(logits, draft):
            event = row.add(token, logprob, top)
            ids.append(token)
            yield event
            if event.finish is not None:
                return
        draft = drafter.propose(ids, min(n, row.tokens_left - 1), row, judge.keep)
        # The newest token stands at row.position; slots of guesses that were refused are written again.
        tokens = torch.tensor([[ids[-1], *draft.tokens]], device=logits.device)  # (1, T)
        positions = row.position + torch.arange(tokens.shape[1], device=logits.device).unsqueeze(0)
        logits = model.logits(model.hidden(tokens, positions, cache=cache)[0])  # (T, V)


class Judge:
    """Decides tokens from the model's logits and the guesses: the heart of the method."""

    def __init__(self, row: Row, sampling: Sampling, seen: Tensor | None) -> None:
        self.row, self.sampling, self.seen = row, sampling, seen
        # None when greedy.
        self.keep: Filter | None = None
        if sampling.temperature > 0:
            self.keep = make_filter(
                sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
            )

    def decide(self, logits: Tensor, draft: Draft) -> Iterator[tuple[int, float, Top]]:
        """(token, logprob, top) for each guess that stays, and for one token more; logits (1 + guesses, V)."""
        for i in range(len(draft.tokens) + 1):
            scores = scores_of(logits[i : i + 1], self.seen, self.sampling, self.row.n_tokens)  # (1, V)
            guess = draft.tokens[i] if i < len(draft.tokens) else None
            token = self._choose(scores, guess, None if draft.probs is None or guess is None else draft.probs[i])
            if self.seen is not None:
                self.seen[0, token] = True
            table = log_probabilities(logits[i : i + 1], exact=self.sampling.top_logprobs > 0)  # (1, V)
            yield token, float(table[0, token]), most_probable(table, self.sampling.top_logprobs)[0]
            if token != guess:
                return

    def _choose(self, scores: Tensor, guess: int | None, q: Tensor | None) -> int:
        """A token distributed as the filtered softmax of scores (1, V); `guess` itself if it may stay."""
        if self.keep is None:
            return int(scores.argmax(-1))
        kept = self.keep(scores)
        if guess is None:
            return int(draw(kept, self.row.generator))
        p = kept[0].double().softmax(-1)  # (V,)
        if q is None:
            q = torch.zeros_like(p)
            q[guess] = 1
        aim = torch.rand((), generator=self.row.generator, dtype=torch.float64)
        if float(aim) * float(q[guess]) < float(p[guess]):
            return guess
        beyond = (p - q).clamp(min=0)
        # Where rounding leaves nothing beyond q, the two are the same distribution.
        left = beyond if bool(beyond.sum() > 0) else p
        return int(draw(left.log().nan_to_num(neginf=-math.inf).unsqueeze(0), self.row.generator))
