"""What the model says -> OpenAI's answers: text completions and chat completions, whole or in pieces.

for piece in pieces(llama, asked): ...            # in the engine's thread
Shape(asked, llama.tokenizer, "name").whole(all_pieces)
"""

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nanollama.generation.llama import Llama
from nanollama.generation.logprobs import Top
from nanollama.generation.score import Scored, score
from nanollama.serve.request import Asked, Prompt
from nanollama.tokenizer import Tokenizer


class Entry(NamedTuple):
    """A token as an answer tells it."""

    token: int
    logprob: float | None  # nats; None: it was not asked for, or nothing comes before the token
    top: Top = ()
    rank: int | None = None  # of a token of the prompt


class Piece(NamedTuple):
    """A part of the answer to one prompt: its echo, or a token."""

    choice: int
    text: str
    entries: list[Entry]
    finish: str | None = None
    is_prompt: bool = False


def pieces(llama: Llama, asked: Asked) -> Iterator[Piece]:
    """The answers to all prompts, one prompt after the other: each gets the numbers that it gets alone."""
    for i, (prompt, sampling) in enumerate(zip(asked.prompts, asked.samplings, strict=True)):
        if asked.scores is not None:
            first, *rest = prompt.ids
            scored: list[Scored] = list(score(llama.model, prompt.ids, asked.scores))
            entries = [Entry(t, s.logprob, s.top, s.rank) for t, s in zip(rest, scored, strict=True)]
            yield Piece(i, echoed(llama, prompt), [Entry(first, None), *entries], is_prompt=True)
        elif asked.echo:
            yield Piece(i, echoed(llama, prompt), [Entry(t, None) for t in prompt.ids], is_prompt=True)
        if sampling is None:
            yield Piece(i, "", [], "length")
            continue
        for event in llama.generate([prompt.ids], sampling):
            yield Piece(i, event.text, [Entry(event.token, event.logprob, event.top)], event.finish)


def echoed(llama: Llama, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return llama.tokenizer.decode(prompt.ids) if llama.tokenizer else ""


class Speller:
    """Tokens as answers write them."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self.tokenizer, self.as_ids = tokenizer, as_ids

    def content(self, token: int) -> bytes:
        """Its bytes; of a control token of sentencepiece, which shows nothing, those of its name."""
        t = self.tokenizer
        if t is None or token >= t.vocab_size:
            return b""
        shown = None if t.shown is None else t.shown[token]
        if shown is None or shown == "":
            return t.vocabulary.tokens[token]
        return shown if isinstance(shown, bytes) else shown.encode()

    def name(self, token: int) -> str:
        """Its text; of bytes that are no whole characters OpenAI's `bytes:\\xe2\\x80`."""
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token}"
        content = self.content(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


class Shape:
    """The JSON of one request's answer. A stream's pieces are told in their order: offsets are counted as they pass."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer | None, model: str) -> None:
        self.asked, self.tokenizer = asked, tokenizer
        self.spell = Speller(tokenizer, asked.names_as_ids)
        kind = "chatcmpl" if asked.chat else "cmpl"
        self.head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.completion_tokens = 0
        self.offsets = [Offsets(tokenizer, prompt, asked.echo) for prompt in asked.prompts]

    # --- Whole and in pieces -----------------------------------------------------------------------------------------

    def whole(self, found: Sequence[Piece]) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for i in range(len(self.asked.prompts)):
            mine = [piece for piece in found if piece.choice == i]
            text = "".join(piece.text for piece in mine if self._tells(piece))
            body = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
            choices.append(self._choice(i, body, mine))
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {"object": kind, **self.head, "choices": choices, **self._of_chat_prompt(found), "usage": self.usage()}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a stream says of one piece; nothing where there is nothing to say."""
        text = piece.text if self._tells(piece) else ""
        silent = not text and piece.finish is None and not (self.asked.token_ids and not piece.is_prompt)
        if silent and self.asked.logprobs is None and not (piece.is_prompt and self.asked.prompt_logprobs is not None):
            self._count(piece)
            return
        body = {"delta": {"content": text}} if self.asked.chat else {"text": text}
        yield self._chunk([self._choice(piece.choice, body, [piece])], **self._of_chat_prompt([piece]))

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """A chat begins with whose turn it is."""
        if self.asked.chat:
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self.asked.include_usage:
            yield {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.asked.prompts)
        done = self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        usage = {"usage": None} if self.asked.include_usage else {}
        return {"object": kind, **self.head, "choices": choices, **more, **usage}

    def _tells(self, piece: Piece) -> bool:
        return self.asked.echo or not piece.is_prompt

    def _count(self, piece: Piece) -> None:
        self.completion_tokens += 0 if piece.is_prompt else len(piece.entries)

    # --- One choice --------------------------------------------------------------------------------------------------

    def _choice(self, index: int, body: dict[str, Any], mine: Sequence[Piece]) -> dict[str, Any]:
        for piece in mine:
            self._count(piece)
        told = [entry for piece in mine if self._tells(piece) for entry in piece.entries]
        finish = next((piece.finish for piece in mine if piece.finish), None)
        found = {"index": index, **body, "logprobs": self._logprobs(index, told), "finish_reason": finish}
        if self.asked.token_ids:
            found["token_ids"] = [e.token for piece in mine if not piece.is_prompt for e in piece.entries]
            found["prompt_token_ids"] = self.asked.prompts[index].ids
        if self.asked.prompt_logprobs is not None and not self.asked.chat:
            found["prompt_logprobs"] = self._prompt_logprobs(mine)
        return found

    def _logprobs(self, index: int, told: list[Entry]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        if self.asked.chat:
            return {"content": [self._chat_entry(entry) for entry in told], "refusal": None}
        tops = [self._top(entry) for entry in told]
        return {
            "tokens": [self.spell.name(entry.token) for entry in told],
            "token_logprobs": [finite(entry.logprob) for entry in told],
            "top_logprobs": tops if self.asked.logprobs else None,
            "text_offset": [self.offsets[index].before(entry.token) for entry in told],
        }

    def _top(self, entry: Entry) -> dict[str, float | None] | None:
        """The most probable tokens, and the one that stands there; of two with one name, the more probable."""
        if entry.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in (*entry.top[: self.asked.logprobs], (entry.token, entry.logprob)):
            found.setdefault(self.spell.name(token), finite(logprob))
        return found

    def _chat_entry(self, entry: Entry) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in entry.top]
        return {**self._named(entry.token, entry.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = list(self.spell.content(token))
        return {"token": self.spell.name(token), "logprob": finite(logprob), "bytes": content, "id": token}

    def _prompt_logprobs(self, mine: Sequence[Piece]) -> list[dict[str, Any] | None] | None:
        """In vLLM's shape; None of a piece that has none to tell."""
        entries = [entry for piece in mine if piece.is_prompt for entry in piece.entries]
        return [self._ranked(entry) for entry in entries] or None

    def _ranked(self, entry: Entry) -> dict[str, Any] | None:
        if entry.logprob is None:
            return None
        n = self.asked.prompt_logprobs or 0
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:n], start=1)]
        own = [] if any(token == entry.token for token, *_ in ranked) else [(entry.token, entry.logprob, entry.rank)]
        return {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.spell.name(token)}
            for token, logprob, rank in [*ranked, *own]
        }

    def _of_chat_prompt(self, found: Sequence[Piece]) -> dict[str, Any]:
        """Where vLLM tells a chat's prompt_logprobs: beside its choices."""
        if self.asked.prompt_logprobs is None or not self.asked.chat:
            return {}
        return {"prompt_logprobs": self._prompt_logprobs(found)}


class Offsets:
    """Where in the text of an answer each of its tokens begins, in characters."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Prompt, echo: bool) -> None:
        self.stream, self.at = tokenizer.stream() if tokenizer else None, 0
        # BOS was put before a text and is not in it.
        self.hidden = int(echo and prompt.text is not None and bool(tokenizer) and prompt.ids[0] == tokenizer.bos_id)  # type: ignore[union-attr]
        if self.stream is not None and not echo:
            for token in prompt.ids:
                self.stream.push(token)

    def before(self, token: int) -> int:
        start = self.at
        shown = self.stream.push(token) if self.stream is not None else ""
        self.at += 0 if self.hidden else len(shown)
        self.hidden = 0
        return start
