"""Text from a model: prefill and decode as one iterator of events, for one prompt or a ragged batch.

Each row has its own positions, random numbers and stop conditions, so its tokens are those it would get alone (within
rounding); a row that stops leaves the batch. Prompts are read in chunks, a prompt with several answers only once.

    from nanollama.generation.llama import Llama, Sampling
    llama = Llama.load("Meta-Llama-3.1-8B")
    for event in llama.generate(["Once upon a time"], Sampling(max_new_tokens=64, temperature=0.8)):
        print(event.text, end="", flush=True)
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.adapter import merged, read_adapter
from nanollama.checkpoint.weights import DTYPES
from nanollama.generation.sample import Sampler, keep_tokens, make_sampler, penalize_repetition, row_generator
from nanollama.model import KVCache, ModelConfig, Transformer
from nanollama.speed.compiled import CompileError, Step, compile_step, worth_compiling
from nanollama.speed.pages import settle_
from nanollama.speed.quantize import apply_head, load_quantized
from nanollama.speed.static import StaticStep
from nanollama.tokenizer import Tokenizer, open_tokenizer
from nanollama.tokenizer.stream import ByteStream, PieceStream
from nanollama.vocabulary.write import fitting

if TYPE_CHECKING:
    from nanollama.generation.speculative import Drafter

GRAPH_TOKENS = 32  # capturing a CUDA graph takes as long as these tokens win by it
SETTLE_TOKENS = 100  # copying the weights into large pages takes as long as these tokens win by it
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

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.n < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens} and n is {self.n}: expected at least 1")
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


class Llama:
    """A model with its tokenizer; `tokenizer` may be None where prompts are token ids.

    compile: whether decoding runs compiled: "off", "on" (ValueError where it cannot), or "auto", where it is compiled
    already or the tokens asked for win back the time. On CUDA "auto" replays the model's own kernels as a graph.
    say: gets a line when compiling takes time or goes wrong.
    drafter: guesses tokens that the model then checks, see nanollama.generation.speculative.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        compile: Literal["auto", "on", "off"] = "off",
        say: Callable[[str], None] | None = None,
        drafter: "Drafter | None" = None,
    ) -> None:
        self.model, self.tokenizer, self.compile, self.say, self.drafter = model, tokenizer, compile, say, drafter
        self._steps: dict[int, Step] = {}
        self._settled = False
        if tokenizer is not None:
            fitting(tokenizer.vocabulary, model.config.vocab_size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        quantize: str | None = None,
        compile: Literal["auto", "on", "off"] = "auto",
        say: Callable[[str], None] | None = None,
        drafter: "Drafter | None" = None,
    ) -> "Llama":
        """Open a checkpoint of any format. Weights that keep their dtype (the default) on CPU stay memory-mapped.

        tokenizer: a file, where the checkpoint has none beside it. adapter: a LoRA adapter's folder, added to the
        weights as they are read. dtype: "fp32", "bf16", "fp16". quantize: "int8" or
        "int4" (see nanollama.speed.quantize). compile, say, drafter: as for the class.
        Raises ValueError (CheckpointError, TokenizerError) with one line.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
        if not _is_available(device):
            raise ValueError(f"device {device!r} is not available to this torch: use cpu")
        checkpoint = open_checkpoint(path)
        tokenizer = tokenizer or checkpoint.tokenizer
        opened = open_tokenizer(tokenizer, rows=checkpoint.config.vocab_size) if tokenizer else None
        wanted, config, weights = DTYPES[dtype] if dtype else None, checkpoint.config, checkpoint.weights
        if adapter is not None:
            weights = merged(weights, read_adapter(adapter, config))
        if quantize is None:
            model = Transformer.from_weights(config, weights, dtype=wanted, device=device)
        else:
            model = load_quantized(config, weights, quantize, dtype=wanted).to(device)
        return cls(model.eval(), opened, compile=compile, say=say, drafter=drafter)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids with BOS. Raises ValueError where there is no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer beside it: name one with --tokenizer, or give token ids")
        return self.tokenizer.encode(prompt, bos=True)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None) -> Iterator[Event]:
        """Answers to all prompts at once, as events in the order in which tokens are decided.

        prompts: texts (encoded with BOS) or token ids (taken as they are). Raises ValueError, before the first event,
        for a prompt that is empty, outside of the vocabulary or longer than the context.
        """
        sampling = sampling or Sampling()
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for i, prompt in enumerate(ids):
            self._check_prompt(i, prompt)
        rows = [
            Row(i, answer, prompt, sampling, self.tokenizer, self.config.max_seq_len)
            for i, prompt in enumerate(ids)
            for answer in range(sampling.n)
        ]
        if not rows:
            return iter(())
        if self.drafter is not None:
            from nanollama.generation.speculative import decode_speculative  # which is built on this module

            return decode_speculative(self.model, rows, sampling, self.drafter)
        return decode(self.model, rows, sampling, self.step(rows))

    def step(self, rows: Sequence["Row"]) -> Step:
        """What decodes the next token of these rows: compiled, or the model itself."""
        B, tokens = len(rows), max(row.tokens_left for row in rows) - 1
        if self.compile == "off" or not tokens:
            return eager_step(self.model)
        if self.model.tok_embeddings.weight.device.type == "cuda":
            return self._graph_step(tokens)
        if B not in self._steps and self.compile == "auto" and not worth_compiling(self.model, B, tokens):
            return eager_step(self.model)
        if tokens >= SETTLE_TOKENS and not self._settled:
            self._settled = True
            if settle_(self.model):
                self._steps.clear()  # they hold the weights of before
        if B not in self._steps:
            self._steps[B] = self._compiled_step(B)
        return self._steps[B]

    def _graph_step(self, tokens: int) -> Step:
        """On CUDA: a graph of the model's own kernels, or, with compile="on", of compiled ones. It serves any rows."""
        if self.compile == "auto" and tokens < GRAPH_TOKENS:
            return eager_step(self.model)
        if 0 not in self._steps:
            self._steps[0] = StaticStep(self.model, compile=self.compile == "on")
        return self._steps[0]

    def _compiled_step(self, B: int) -> Step:
        try:
            return compile_step(self.model, B, say=self.say)
        except CompileError as error:
            if self.compile == "on":
                raise
            if self.say:
                self.say(str(error))
            return eager_step(self.model)

    def _check_prompt(self, index: int, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"prompt {index} is empty: give at least one token")
        if len(ids) > self.config.max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(ids):,} tokens and the context holds {self.config.max_seq_len:,}: shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"prompt {index} has a token id outside of the model's 0..{self.config.vocab_size - 1}")


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
        self.text = Text(tokenizer, ids, sampling.stop)
        self.n_tokens = tokenizer.vocab_size if tokenizer else sys.maxsize  # rows beyond them are never drawn

    def add(self, token: int, logprob: float) -> Event:
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
        return Event(self.prompt, self.answer, token, text, logprob, finish)


@dataclass
class Text:
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


def _is_available(device: str) -> bool:
    kind = device.partition(":")[0]
    return kind == "cpu" or (kind in ("cuda", "mps") and torch.get_device_module(kind).is_available())


@torch.inference_mode()
def decode(model: Transformer, rows: list[Row], sampling: Sampling, step: Step | None = None) -> Iterator[Event]:
    """Prefill the rows, then one token for each per step until all have ended."""
    step = step or eager_step(model)
    sampler, penalty = sampling.sampler(), sampling.repetition_penalty
    cache, logits = prefill(model, rows)  # (B, V)
    seen = seen_tokens(rows, logits) if penalty != 1 else None  # (B, V)
    rows = list(rows)
    while rows:
        scores = logits if seen is None else penalize_repetition(logits, seen, penalty)
        ids = sampler(keep_tokens(scores, rows[0].n_tokens), [row.generator for row in rows])  # (B,)
        logprobs = logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)  # (B,)
        if seen is not None:
            seen[torch.arange(len(rows)), ids] = True
        events = [row.add(*new) for row, *new in zip(rows, ids.tolist(), logprobs.tolist(), strict=True)]
        yield from events
        alive = [slot for slot, event in enumerate(events) if event.finish is None]
        if not alive:
            return
        if len(alive) < len(rows):
            keep_rows_(cache, alive, max(row.position for row in rows))
            rows, ids = [rows[slot] for slot in alive], ids[alive]
            seen = seen if seen is None else seen[alive]
        logits = step(ids, torch.tensor([row.position for row in rows], device=ids.device), cache)


def eager_step(model: Transformer) -> Step:
    """The model itself as a step: ids (B,), positions (B,), cache -> logits (B, V)."""
    return lambda ids, positions, cache: last_logits(model, ids.unsqueeze(1), positions.unsqueeze(1), cache)


def prefill(model: Transformer, rows: list[Row]) -> tuple[KVCache, Tensor]:
    """A cache that holds every row's prompt, and the logits (B, V) of its last token.

    Prompts are read one after the other: none is padded, and each gets the numbers that it gets alone.
    """
    embeddings = model.tok_embeddings.weight
    max_len = max(len(row.ids) + row.tokens_left - 1 for row in rows)
    cache = KVCache(model.config, len(rows), max_len, dtype=embeddings.dtype, device=embeddings.device)
    logits: list[Tensor] = []
    for slot, row in enumerate(rows):
        if slot and rows[slot - 1].prompt == row.prompt:  # another answer to it
            for buffer in (*cache.k, *cache.v):
                buffer[slot] = buffer[slot - 1]
            logits.append(logits[-1])
            continue
        own = cache_slots(cache, slot, slot + 1)
        tokens = torch.tensor([row.ids], device=embeddings.device)  # (1, T)
        for chunk in tokens.split(PREFILL_CHUNK_TOKENS, dim=1):
            last = last_logits(model, chunk, None, own)  # (1, V)
        logits.append(last)
    cache.length = max(len(row.ids) for row in rows)
    return cache, torch.cat(logits)


def last_logits(model: Transformer, tokens: Tensor, positions: Tensor | None, cache: KVCache) -> Tensor:
    """Logits after the last of tokens (B, T), in float32: (B, V). The head is not applied to the others."""
    return apply_head(model, model.hidden(tokens, positions, cache=cache)[:, -1])


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
