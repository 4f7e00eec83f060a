"""The body of a request -> what is asked, checked: prompts as ids, how to draw, what to tell. Nothing is dropped.

What changes the answer and is not served here is refused by its name; a value that changes nothing is let pass.

    reader.completion({"prompt": "Once upon a time", "max_tokens": 8, "logprobs": 5}).prompts[0].ids
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from nanollama.chat import encode_chat
from nanollama.gate import shown
from nanollama.generation.llama import Llama, Sampling
from nanollama.options import Drawing

MAX_PROMPTS = 256  # of one request, answered one after the other
MAX_TOP = 20  # log-probabilities listed with a token, as many as OpenAI and vLLM list
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
# What others serve and this does not, with the values that ask for nothing.
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # for the bookkeeping of whoever asks


class BadRequest(ValueError):
    """What is asked cannot be answered. One line; param: the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Prompt(NamedTuple):
    ids: list[int]
    text: str | None  # as it came; None: it came as ids, or as messages


@dataclass(frozen=True)
class Asked:
    """One request. chat: its answer is a message."""

    prompts: list[Prompt]
    samplings: list[Sampling | None]  # one a prompt; None: nothing is generated
    chat: bool
    logprobs: int | None = None  # alternatives listed with each token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, in vLLM's shape
    echo: bool = False
    stream: bool = False
    include_usage: bool = False  # a last chunk with the usage
    token_ids: bool = False  # name the tokens by their ids, too
    names_as_ids: bool = False  # write tokens as token_id:N

    @property
    def scores(self) -> int | None:
        """Alternatives to list with each token of the prompts; None: these are not scored."""
        wanted = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((n for n in wanted if n is not None), default=None)


class Fields:
    """The fields of one request, each taken once; null is as if it were not there."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.left = {name: value for name, value in body.items() if value is not None or name not in OFF}
        for name in NOTES:
            self.left.pop(name, None)

    def take(self, name: str) -> Any:
        return self.left.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise BadRequest(f"{name} is {shown(value)}: expected true or false", name)
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise BadRequest(f"{name} is {shown(value)}: expected a whole number from {low} to {high}", name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise BadRequest(f"{name} is {shown(value)}: expected a number from {low:g} to {high:g}", name)
        return float(value)

    def end(self) -> None:
        """Raises BadRequest for what nobody took."""
        left = {name: value for name, value in self.left.items() if not (name in OFF and value in OFF[name])}
        if len(left) == 1 and (name := next(iter(left))) in OFF:
            values = " or ".join(map(repr, OFF[name]))
            raise BadRequest(f"{name} is {shown(left[name])}: this server takes {values} alone; leave it out", name)
        if left:
            names = ", ".join(shown(name)[1:-1] for name in list(left)[:20])
            raise BadRequest(
                f"unsupported: {names}; leave out what this server does not know", names if len(left) == 1 else None
            )


@dataclass(frozen=True)
class Reader:
    """What one server makes of requests. context_tokens: the most that a prompt and its answer have together."""

    llama: Llama
    name: str
    context_tokens: int
    drawing: Drawing  # where a request says nothing
    seeds: Callable[[], int]  # the next of them, where a request has none

    @cached_property
    def longest_token_bytes(self) -> int:
        tokenizer = self.llama.tokenizer
        return max(map(len, tokenizer.vocabulary.tokens), default=1) if tokenizer else 1

    def completion(self, body: Mapping[str, Any]) -> Asked:
        """Of /v1/completions. Raises BadRequest."""
        fields = Fields(body)
        self._check_model(fields)
        prompts = self._prompts(fields.take("prompt"))
        limit = fields.whole("max_tokens", 0, 2**31)
        logprobs = fields.whole("logprobs", 0, MAX_TOP)
        common = self._common(fields)
        echo = fields.flag("echo")
        samplings = self._samplings(fields, prompts, limit, logprobs, "prompt")
        fields.end()
        return Asked(prompts, samplings, False, logprobs=logprobs, echo=echo, **common)

    def chat(self, body: Mapping[str, Any]) -> Asked:
        """Of /v1/chat/completions. Raises BadRequest."""
        fields = Fields(body)
        self._check_model(fields)
        prompts = [Prompt(self._chat_ids(fields.take("messages")), None)]
        limit = fields.whole("max_tokens", 1, 2**31)
        limit = fields.whole("max_completion_tokens", 1, 2**31, limit)
        logprobs = 0 if fields.flag("logprobs") else None
        top = fields.whole("top_logprobs", 0, MAX_TOP)
        if top is not None and logprobs is None:
            raise BadRequest("top_logprobs without logprobs: set logprobs to true", "top_logprobs")
        logprobs = logprobs if top is None else top
        common = self._common(fields)
        samplings = self._samplings(fields, prompts, limit, logprobs, "messages")
        fields.end()
        return Asked(prompts, samplings, True, logprobs=logprobs, **common)

    def _check_model(self, fields: Fields) -> None:
        model = fields.take("model")
        if model is not None and model != self.name:
            raise BadRequest(
                f"there is no model {shown(model)}: this server has {self.name}", "model", 404, "model_not_found"
            )

    def _common(self, fields: Fields) -> dict[str, Any]:
        stream = fields.flag("stream")
        options = fields.take("stream_options")
        if options is not None and not (stream and isinstance(options, dict)):
            raise BadRequest("stream_options: expected an object, and stream true beside it", "stream_options")
        inner = Fields(options or {})
        found = {
            "stream": stream,
            "include_usage": inner.flag("include_usage"),
            "prompt_logprobs": fields.whole("prompt_logprobs", 0, MAX_TOP),
            "token_ids": fields.flag("return_token_ids"),
            "names_as_ids": fields.flag("return_tokens_as_token_ids"),
        }
        inner.end()
        return found

    # --- Prompts -----------------------------------------------------------------------------------------------------

    def _prompts(self, given: Any) -> list[Prompt]:
        if isinstance(given, str) or (isinstance(given, list) and given and all(type(i) is int for i in given)):
            given = [given]
        if not isinstance(given, list) or not given:
            raise BadRequest(
                f"prompt is {shown(given)}: expected text, a list of token ids, or a list of such", "prompt"
            )
        if len(given) > MAX_PROMPTS:
            raise BadRequest(f"prompt holds {len(given):,} prompts: this server takes up to {MAX_PROMPTS}", "prompt")
        return [self._prompt(i, item) for i, item in enumerate(given)]

    def _prompt(self, index: int, given: Any) -> Prompt:
        if isinstance(given, str):
            self._refuse_endless(len(given), "prompt")
            found = Prompt(self._said(lambda: self.llama.encode(given), "prompt"), given)
        elif isinstance(given, list) and all(type(i) is int for i in given):
            found = Prompt(given, None)
        else:
            raise BadRequest(f"prompt {index} is {shown(given)}: expected text or a list of token ids", "prompt")
        if not found.ids:
            raise BadRequest(f"prompt {index} is empty: give at least one token", "prompt")
        most = self.llama.config.vocab_size - 1
        if not 0 <= min(found.ids) <= max(found.ids) <= most:
            wrong = next(i for i in found.ids if not 0 <= i <= most)
            raise BadRequest(f"prompt {index} has the token id {shown(wrong)}: expected 0 to {most}", "prompt")
        return found

    def _chat_ids(self, messages: Any) -> list[int]:
        if not isinstance(messages, list) or not messages:
            raise BadRequest(f"messages is {shown(messages)}: expected a list of messages", "messages")
        tokenizer = self.llama.tokenizer
        if tokenizer is None:
            raise BadRequest(
                "the checkpoint has no tokenizer, so it knows no messages: ask /v1/completions by ids", "messages"
            )
        self._refuse_endless(sum(map(characters, messages)), "messages")
        # What OpenAI calls the developer's word is the system's in every Llama template.
        given = [
            {**m, "role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m for m in messages
        ]
        return self._said(lambda: encode_chat(given, tokenizer, add_generation_prompt=True).ids, "messages")

    def _said(self, call: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return call()
        except ValueError as error:
            raise BadRequest(str(error), param) from None

    def _refuse_endless(self, n_characters: int, param: str) -> None:
        """Raises BadRequest for text that no number of tokens within the context spells: it is not encoded."""
        if n_characters > self.longest_token_bytes * self.context_tokens:
            raise BadRequest(
                f"{n_characters:,} characters are more than this model's maximum context length of "
                f"{self.context_tokens} tokens holds: shorten them",
                param,
                code="context_length_exceeded",
            )

    # --- Drawing -----------------------------------------------------------------------------------------------------

    def _samplings(
        self, fields: Fields, prompts: list[Prompt], limit: int | None, logprobs: int | None, param: str
    ) -> list[Sampling | None]:
        d, stop = self.drawing, self._stop(fields.take("stop"))
        draw: dict[str, Any] = {
            "temperature": fields.number("temperature", 0, 100, d.temperature),
            "top_p": fields.number("top_p", 0, 1, d.top_p) or 1e-9,  # 0 is the most probable token, as elsewhere
            "min_p": fields.number("min_p", 0, 1, d.min_p),
            "top_k": max(0, fields.whole("top_k", -1, 2**31, d.top_k) or 0),
            "repetition_penalty": fields.number("repetition_penalty", 0.01, 100, d.repetition_penalty),
            "seed": fields.whole("seed", -(2**63), 2**63 - 1),
            "stop": stop,
            "stop_ids": frozenset() if fields.flag("ignore_eos") else None,
            "top_logprobs": logprobs or 0,
        }
        if draw["seed"] is None:
            draw["seed"] = self.seeds()
        rooms = [self._room(len(prompt.ids), limit, param) for prompt in prompts]
        try:
            return [Sampling(max_new_tokens=room, **draw) if room else None for room in rooms]
        except ValueError as error:
            raise BadRequest(str(error), str(error).partition(" ")[0]) from None

    def _room(self, prompt_tokens: int, limit: int | None, param: str) -> int:
        """Tokens of the answer. The last one that fits is decided and never read, so it needs no position."""
        room = self.context_tokens + 1 - prompt_tokens
        if room < (1 if limit is None else limit):
            wanted = "" if limit is None else f", {limit} for the answer"
            raise BadRequest(
                f"this model's maximum context length is {self.context_tokens} tokens; you asked for "
                f"{prompt_tokens + (limit or 0)} ({prompt_tokens} in the prompt{wanted}): shorten the prompt"
                + (", or lower max_tokens" if limit else ""),
                param,
                code="context_length_exceeded",
            )
        return min(self.drawing.max_new_tokens, room) if limit is None else limit

    def _stop(self, given: Any) -> tuple[str, ...]:
        found = [given] if isinstance(given, str) else given or []
        fine = isinstance(found, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in found)
        if not fine or len(found) > MAX_STOPS:
            what = f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of up to {MAX_STOPS} such"
            raise BadRequest(f"stop is {shown(given)}: expected {what}", "stop")
        if found and self.llama.tokenizer is None:
            raise BadRequest("stop: the checkpoint has no tokenizer, so answers have no text", "stop")
        return tuple(found)


def characters(value: Any) -> int:
    """In all texts of a JSON value, which nests as deep as strict JSON may."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 0
