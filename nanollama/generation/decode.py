"""The decode loop: prompts are read, then each step decides one token of every row and reads it, until all have ended.

Each row has its own position, random numbers and stop conditions, so its tokens are those it would get alone (within
rounding); a row that stops leaves the batch. Prompts are read in chunks, a prompt with several answers only once.

    rows = [Row(0, 0, prompt_ids, sampling, tokenizer, model.config.max_seq_len)]
    for event in decode(model, rows, sampling, eager_step(model)):
        print(event.text, end="", flush=True)
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nanollama.generation.logprobs import Top, log_probabilities, most_probable
from nanollama.generation.sample import Sampler, keep_tokens, make_sampler, penalize_repetition, row_generator
from nanollama.model import KVCache, Transformer
from nanollama.speed.step import Step, last_logits
from nanollama.tokenizer import Tokenizer
from nanollama.tokenizer.stream import ByteStream, PieceStream

MASK_SLOTS = 8  # CUDA's kernels take masks of whole vectors; others they would pad anew in every layer
PREFILL_CHUNK_TOKENS = 512  # bounds the memory of the attention mask and the activations, whatever the prompt


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends. Raises ValueError for what is out of range."""

    max_new_tokens: int = 256  # the context may end an answer earlier
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int = 0
    n: int = 1  # answers per prompt, each with random numbers of its own
    stop: Sequence[str] = ()  # texts that end an answer and are not part of it
    stop_ids: frozenset[int] | None = None  # None: the tokenizer's
    top_logprobs: int = 0  # of the most probable tokens, told with each that is chosen

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.n < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens} and n is {self.n}: expected at least 1")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs is {self.top_logprobs}: expected 0 (none) or more")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: expected more than 0 (1 is off)")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}: expected a list of texts, none of them empty")
        self.sampler()

    def sampler(self) -> Sampler:
        return make_sampler(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@dataclass(frozen=True)
class Event:
    """One token of one answer."""

    prompt: int  # index of the prompt
    answer: int  # index among the prompt's n answers
    token: int
    text: str  # the characters that are certain with this token: whole ones, and not the start of a stop text
    logprob: float  # nats, under the model's own distribution: before temperature, filters and penalty
    finish: Literal["stop", "length"] | None  # set on an answer's last event
    top: tuple[tuple[int, float], ...] = ()  # Sampling.top_logprobs tokens and their logprobs, the most probable first


class Row:
    """One answer in the making: where it stands, and what of its text may be shown."""

    def __init__(
        self,
        prompt: int,
        answer: int,
        ids: list[int],
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        context: int,
    ) -> None:
        self.prompt, self.answer, self.ids = prompt, answer, ids
        # The position of the newest token; the last one that fits the context is decided, but never read.
        self.position = len(ids) - 1
        self.tokens_left = min(sampling.max_new_tokens, context - len(ids) + 1)
        self.generator = row_generator(sampling.seed, answer)
        own = tokenizer.stop_ids if tokenizer else frozenset()
        self.stop_ids = own if sampling.stop_ids is None else sampling.stop_ids
        self.text = AnswerText(tokenizer, ids, sampling.stop)
        self.n_tokens = tokenizer.vocab_size if tokenizer else sys.maxsize  # rows beyond them are never drawn

    def add(self, token: int, logprob: float, top: Top = ()) -> Event:
        self.position += 1
        self.tokens_left -= 1
        is_stop = token in self.stop_ids
        text = "" if is_stop else self.text.push(token)
        finish: Literal["stop", "length"] | None = None
        if is_stop or self.text.stopped:
            finish = "stop"
            text += self.text.flush()
        elif not self.tokens_left:
            finish = "length"
            text += self.text.held  # and not the half of a character that the limit cut off
        return Event(self.prompt, self.answer, token, text, logprob, finish, top)


@dataclass
class AnswerText:
    """Tokens in, text out, held back while it may be the start of a stop text."""

    tokenizer: Tokenizer | None
    prompt: list[int]
    stop: Sequence[str]
    held: str = ""
    stopped: bool = False
    stream: ByteStream | PieceStream | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and the checkpoint has none: name one with --tokenizer")
        if self.tokenizer is not None:
            self.stream = self.tokenizer.stream()
            for token in self.prompt:  # so that the answer's first word keeps its leading space
                self.stream.push(token)

    def push(self, token: int) -> str:
        return self._release(self.stream.push(token)) if self.stream else ""

    def flush(self) -> str:
        """What was held back, and an unfinished character; "" after a stop text."""
        if self.stopped or self.stream is None:
            return ""
        text = self._release(self.stream.flush())
        return text if self.stopped else text + self.held

    def _release(self, new: str) -> str:
        text = self.held + new
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


@torch.inference_mode()
def decode(model: Transformer, rows: list[Row], sampling: Sampling, step: Step) -> Iterator[Event]:
    """The tokens of all rows as they are decided."""
    sampler = sampling.sampler()
    # 1. Read the prompts: their keys and values, and the logits of what comes next.
    cache, logits = prefill(model, rows)  # (B, V)
    seen = seen_tokens(rows, logits) if sampling.repetition_penalty != 1 else None  # (B, V)
    while True:
        # 2. Decide one token of each row.
        scores = scores_of(logits, seen, sampling, rows[0].n_tokens)  # (B, V)
        ids = sampler(scores, [row.generator for row in rows])  # (B,)
        table = log_probabilities(logits, exact=sampling.top_logprobs > 0)  # (B, V)
        logprobs = table.gather(1, ids.to(table.device).unsqueeze(1)).squeeze(1)  # (B,)
        if seen is not None:
            seen[torch.arange(len(rows)), ids] = True
        # 3. Tell it, as far as its text is certain.
        decided = zip(rows, ids.tolist(), logprobs.tolist(), most_probable(table, sampling.top_logprobs), strict=True)
        events = [row.add(token, logprob, top) for row, token, logprob, top in decided]
        yield from events
        # 4. Rows that have ended leave the batch.
        alive = [slot for slot, event in enumerate(events) if event.finish is None]
        if not alive:
            return
        if len(alive) < len(rows):
            keep_rows_(cache, alive, max(row.position for row in rows))
            rows, ids = [rows[slot] for slot in alive], ids[alive]
            seen = None if seen is None else seen[alive]
        # 5. Read the tokens: the next logits.
        positions = torch.tensor([row.position for row in rows], device=ids.device)  # (B,)
        logits = step(ids, positions, cache)  # (B, V)


def scores_of(logits: Tensor, seen: Tensor | None, sampling: Sampling, n_tokens: int) -> Tensor:
    """What the sampler sees of logits (B, V): tokens in `seen` penalized, rows beyond `n_tokens` left out."""
    if seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    return keep_tokens(logits, n_tokens)


def prefill(model: Transformer, rows: list[Row]) -> tuple[KVCache, Tensor]:
    """A cache that holds every row's prompt, and the logits (B, V) of its last token.

    Prompts are read one after the other: none is padded, and each gets the numbers that it gets alone.
    """
    cache = new_cache(model, len(rows), max(len(row.ids) + row.tokens_left - 1 for row in rows))
    logits: list[Tensor] = []
    for slot, row in enumerate(rows):
        if slot and rows[slot - 1].prompt == row.prompt:  # another answer to it
            for buffer in (*cache.k, *cache.v):
                buffer[slot] = buffer[slot - 1]
            logits.append(logits[-1])
            continue
        logits.append(read_tokens(model, row.ids, cache_slots(cache, slot, slot + 1)))  # (1, V)
    cache.length = max(len(row.ids) for row in rows)
    return cache, torch.cat(logits)


def new_cache(model: Transformer, rows: int, max_len: int) -> KVCache:
    """An empty cache of `max_len` positions a row, or as many more as the device's kernels like."""
    embeddings = model.tok_embeddings.weight
    if embeddings.is_cuda:
        max_len = -(-max_len // MASK_SLOTS) * MASK_SLOTS
    return KVCache(model.config, rows, max_len, dtype=embeddings.dtype, device=embeddings.device)


def read_tokens(model: Transformer, ids: list[int], cache: KVCache) -> Tensor:
    """Logits (1, V) after ids, which follow the `length` tokens of a cache of one row; in chunks."""
    tokens = torch.tensor([ids], device=cache.rows.device)  # (1, T)
    for chunk in tokens.split(PREFILL_CHUNK_TOKENS, dim=1):
        logits = last_logits(model, chunk, None, cache)
    return logits


def cache_slots(cache: KVCache, start: int, stop: int) -> KVCache:
    """Rows start..stop of the cache as an empty cache of their own, on the same memory."""
    own = copy.copy(cache)
    own.k = [k[start:stop] for k in cache.k]
    own.v = [v[start:stop] for v in cache.v]
    own.rows = cache.rows[: stop - start]
    own.length = 0
    return own


def keep_rows_(cache: KVCache, slots: list[int], length: int) -> None:
    """Shrink the cache to these rows (ascending), of which `length` positions are in use; nothing is reallocated."""
    for buffers in (cache.k, cache.v):
        for layer, buffer in enumerate(buffers):
            for to, slot in enumerate(slots):
                if to != slot:
                    buffer[to, :length] = buffer[slot, :length]
            buffers[layer] = buffer[: len(slots)]
    cache.rows = cache.rows[: len(slots)]


def seen_tokens(rows: list[Row], logits: Tensor) -> Tensor:
    """Which tokens the prompts hold: (B, V) bool."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for slot, row in enumerate(rows):
        seen[slot, row.ids] = True
    return seen
