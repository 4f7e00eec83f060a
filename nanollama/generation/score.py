"""Log-probabilities of tokens that are given, not drawn: one pass over them, in chunks, without all logits at once.

for token in score(llama.model, llama.encode("Once upon a time"), top=5):
    print(token.logprob, token.rank, token.top)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nanollama.generation.decode import PREFILL_CHUNK_TOKENS, new_cache
from nanollama.generation.logprobs import Top, log_probabilities, most_probable
from nanollama.model import Transformer

ROWS = 64  # whose logits are there at once: 64 MB of float64 for 128,256 tokens


class Scored(NamedTuple):
    """One token, given those before it."""

    logprob: float  # nats, under the model's own distribution
    rank: int  # among all tokens; 1: none is more probable
    top: Top


@torch.inference_mode()
def score(model: Transformer, ids: list[int], top: int = 0) -> Iterator[Scored]:
    """Of each of ids but the first, which nothing comes before. Needs as many positions of the context as it tells."""
    if len(ids) < 2:
        return
    cache = new_cache(model, 1, len(ids) - 1)
    tokens = torch.tensor(ids, device=cache.rows.device)  # (T,)
    chunks = zip(tokens[:-1].split(PREFILL_CHUNK_TOKENS), tokens[1:].split(PREFILL_CHUNK_TOKENS), strict=True)
    for chunk, followers in chunks:
        hidden = model.hidden(chunk.unsqueeze(0), cache=cache)[0]  # (T, C)
        for states, wanted in zip(hidden.split(ROWS), followers.split(ROWS), strict=True):
            table = log_probabilities(model.logits(states), exact=True)  # (T, V)
            own = table.gather(1, wanted.to(table.device).unsqueeze(1))  # (T, 1)
            ranks = (table > own).sum(1) + 1
            rows = zip(own.squeeze(1).tolist(), ranks.tolist(), most_probable(table, top), strict=True)
            yield from (Scored(*row) for row in rows)
