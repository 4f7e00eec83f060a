"""A candidate that is a server with OpenAI's completions interface: llama.cpp, llama-cpp-python, vLLM, SGLang, Ollama.

    python -m parity.check --candidate http://127.0.0.1:8000/v1 --model my-llama --api_key MY_KEY --dtype bf16

What a server samples by is switched off, whatever it calls it; a key that it refuses is left out, and that is said.
Prompts are sent as token ids, so the server's tokenizer is out of play; a server that takes text alone gets the text of
ids that its own tokenizer makes of it again. There are no logits: tokens are judged (`argmax`, `greedy`), and where
answers list log-probabilities, these (`logits`, `kl`). --dtype says what the server computes in.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import torch

from parity.candidates.crash import Unasked
from parity.candidates.limits import SERVER, Limits
from parity.candidates.nano.opening import open_checkpoint
from parity.candidates.server import completions
from parity.candidates.server.completions import Listing
from parity.candidates.server.spelling import Spelling
from parity.candidates.server.transport import QUICK_S, Refused, ServerError, Transport, line
from parity.contract import UsageError

OPTIONS = ("model", "api_key", "tokenizer")  # behind the # of a server's name
# By key, the values that switch it off, the preferred first. Servers disagree: top_k is off at -1 (vLLM, SGLang) or 0.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_k": (-1, 0),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "repeat_penalty": (1,),  # llama.cpp, llama-cpp-python, Ollama
    "repetition_penalty": (1,),  # vLLM, SGLang, TGI
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "seed": (0,),
}
# What makes answers complete, the most telling value first.
TELLING: dict[str, tuple[Any, ...]] = {
    "logprobs": (20, 5, 1),
    "prompt_logprobs": (20, 5, 1),
    "echo": (True,),
    "ignore_eos": (True,),
    "return_token_ids": (True,),
    "return_tokens_as_token_ids": (True,),
    "post_sampling_probs": (False,),
    "cache_prompt": (False,),
}
OF_PROMPT = ("echo", "prompt_logprobs")  # asked for where the prompt's log-probabilities are wanted alone
# Where a server makes ids of a text: its path, and the key that the text goes by.
TOKENIZERS = (("/extras/tokenize", "input"), ("/tokenize", "prompt"), ("/tokenize", "content"))
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


def server_name(candidate: str, **options: str | None) -> str:
    """The name of a server with these options, as `resolve` takes it. Raises UsageError where they do not fit."""
    given = {name: value for name, value in options.items() if value is not None}
    is_server = candidate.startswith(("http://", "https://"))
    for name in given:
        if name != "tokenizer" and not is_server:
            raise UsageError(f"--{name} is a server's: --candidate {candidate} is none")
    return f"{candidate}#{urlencode(given, safe='/:')}" if is_server and given else candidate


def endpoint_loader(name: str, limits: Limits = SERVER) -> Callable[[str, torch.dtype, str], "Endpoint"]:
    """load(checkpoint, dtype, device) of a server. Raises UsageError for a name that is none.

    Its answers are the same whatever dtype is asked for: they are asked for once.
    """
    parts = urlsplit(name)
    if "@" in parts.netloc:
        raise UsageError("candidate http://...@...: a password in an address would be shown; use --api_key NAME")
    options = {key: values[0] for key, values in parse_qs(parts.fragment).items() if key in OPTIONS}
    transport = Transport(parts._replace(fragment="").geturl().rstrip("/"), key_in(options.get("api_key")), limits)
    known: dict[str, Endpoint] = {}

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Endpoint:
        if checkpoint not in known:
            try:
                known[checkpoint] = Endpoint(transport, checkpoint, options.get("model"), options.get("tokenizer"))
            except (ServerError, Unasked) as error:
                raise UsageError(str(error)) from error
        return known[checkpoint]

    load.streams = True  # type: ignore[attr-defined]  # whether the model fits into memory is the server's own business
    return load


def key_in(variable: str | None) -> str | None:
    """The key that an environment variable holds. Raises UsageError, which shows neither: it may be the key itself."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip() if re.fullmatch(r"[A-Za-z_]\w*", variable) else ""
    if not key:
        raise UsageError(
            "--api_key: expected the name of an environment variable that holds the key; none of that name"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"--api_key {variable}: what it holds cannot be a key: it has characters beyond ASCII, or spaces"
        )
    return key


class Endpoint:
    """Greedy answers of a server. Raises ServerError where it cannot be asked, Unasked where one prompt cannot be."""

    def __init__(self, transport: Transport, checkpoint: str, model: str | None, tokenizer: str | None) -> None:
        self.transport, self.url = transport, transport.url
        self.root = re.sub(r"/v1$", "", self.url)
        opened = open_checkpoint(checkpoint)
        file = Path(tokenizer) if tokenizer else opened.tokenizer
        self.rows = opened.config.vocab_size
        self.spelling = Spelling(file, self.rows) if file else None
        self.named = completions.named_by(self.spelling.token if self.spelling else None)
        self.max_positions: int | None = None
        self.model = self._chosen(model)
        if self.max_positions is None:
            self.max_positions = self._of_props()
        self.wanted = {key: list(values) for key, values in (NEUTRAL | TELLING).items()}  # what is still sent, by key
        self.left_out: list[str] = []
        self.as_text = self.spell_bos = False
        self.tokenizes: tuple[str, str] | None = None  # of TOKENIZERS, what this server has
        self.lists_prompts = True  # until it does not
        self.answers: dict[tuple[int, ...], tuple[list[int | None], Listing]] = {}  # to one token after these ids
        self._meet()

    @property
    def notices(self) -> list[str]:
        """What the report says of the server."""
        how = "token ids" if not self.as_text else "text whose ids are the checkpoint's"
        if self.as_text and self.tokenizes is None:
            how = "text whose ids are as many as the checkpoint's (the server does not say which)"
        found = [f"the server's model is {line(self.model) or 'unnamed'}; prompts are sent as {how}"]
        if self.left_out:
            found.append(f"the server refuses {', '.join(self.left_out)}: sent without")
        if proxy := self.transport.proxy:
            found.append(f"the server is asked through the proxy {line(proxy)}, which the environment names")
        if self.max_positions is not None:
            found.append(f"the server holds {self.max_positions} positions")
        return found

    # --- What the harness asks ---------------------------------------------------------------------------------------

    def next_tokens(self, ids: list[int], n: int) -> list[int]:
        """The n greedy tokens after `ids`; fewer where the server stops, or a token's text is that of several."""
        tokens, _ = self._answer(ids, n)
        known = tokens[: tokens.index(None)] if None in tokens else tokens
        if not known:
            raise Unasked("the answer's text is that of several tokens, or of none")
        return [token for token in known[:n] if token is not None]

    def log_probs(self, ids: list[int], positions: list[int]) -> dict[int, Listing]:
        """{position: {id: log-probability of it as the next token}}: of the whole prompt at once where a server lists
        it, else of what it generates after each of `positions`."""
        found = self._of_prompt(ids) if self.lists_prompts else None
        if found is None:
            found = {position: self._generated(ids[: position + 1]) for position in positions}
        return {position: row for position, row in found.items() if row}

    def _generated(self, ids: list[int]) -> Listing:
        try:
            return self._answer(ids, 1)[1]
        except Unasked:
            return {}

    def _of_prompt(self, ids: list[int]) -> dict[int, Listing] | None:
        """Of as many of the first tokens as the server holds, and as are a text where it takes text alone."""
        before = self.max_positions
        most = len(ids) if before is None else min(len(ids), before - 1)
        held = next((ids[:n] for n in range(most, 1, -1) if not self.as_text or self._is_text(ids[:n])), [])
        try:
            choice = self._complete(held, 1, OF_PROMPT) if held else {}
        except Unasked:
            return {} if self.max_positions == before else self._of_prompt(ids)
        found = self._read(completions.prompt_listings, choice, held, self.named)
        self.lists_prompts = found is not None or not held
        return found

    def _is_text(self, ids: list[int]) -> bool:
        try:
            return bool(self._text(ids))
        except Unasked:
            return False

    def _answer(self, ids: list[int], n: int) -> tuple[list[int | None], Listing]:
        key = tuple(ids)
        if n == 1 and key in self.answers:
            return self.answers[key]
        choice = self._complete(ids, n)
        tokens = self._read(completions.tokens_of, choice, self.named)
        if self.spelling is None and None in tokens:
            tokens = []
        listing = self._read(completions.generated_listing, choice, self.named)
        if not tokens and choice.get("finish_reason") == "stop":
            raise Unasked("the server stops there, and does not say by which token")
        if not tokens and n > 1:
            return self._one_by_one(ids, n), listing
        if not tokens and self.spelling and isinstance(choice.get("text"), str):
            tokens = [self.spelling.token(choice["text"])]
        if not tokens:
            raise ServerError(
                f"candidate {self.url}: its answers name no token ids; expected token_ids, token_id:N in "
                "logprobs.tokens, id in logprobs.content, or text and a checkpoint with its tokenizer"
            )
        if n == 1:
            self.answers[key] = tokens, listing
        return tokens, listing

    def _one_by_one(self, ids: list[int], n: int) -> list[int | None]:
        """Of a server whose answers are text alone: one token's text is that of an id, a longer one may be several."""
        found: list[int] = []
        while len(found) < n:
            try:
                found += self.next_tokens([*ids, *found], 1)
            except Unasked:
                break
        return list(found)

    # --- How the server is asked -------------------------------------------------------------------------------------

    def _complete(self, ids: list[int], n: int, more: tuple[str, ...] = ()) -> dict[str, Any]:
        """The first choice of an answer. A key that the server refuses is sent otherwise, or no more."""
        while True:
            if self.max_positions is not None and len(ids) + n > self.max_positions:
                raise Unasked(f"the server holds {self.max_positions} positions")
            values = {k: v[0] for k, v in self.wanted.items() if v and (k not in OF_PROMPT or k in more)}
            prompt: Any = self._text(ids) if self.as_text else ids
            body = {"model": self.model, "prompt": prompt, "max_tokens": n, "stream": False} | values
            try:
                answer = self.transport.ask(f"{self.url}/completions", body)
            except Refused as refusal:
                self._give_way(refusal, ids, n, list(values))
                continue
            choice = self._read(completions.choice_of, answer)
            self._count(answer, ids)
            return choice

    def _give_way(self, refusal: Refused, ids: list[int], n: int, sent: list[str]) -> None:
        """Ask otherwise next time. Raises Unasked, or the refusal where there is no other way."""
        held = completions.holds(refusal)
        if held is not None and len(ids) + n > held:
            self.max_positions = held
            return
        if keys := completions.complained_of(refusal, sent):
            for key in keys:
                self.wanted[key].pop(0)
                if not self.wanted[key] and key not in self.left_out:
                    self.left_out.append(key)
            return
        if not self.as_text and (refusal.status in (400, 422) or re.search(r"\bprompt\b", refusal.words)):
            self._speak(refusal)
            return
        raise refusal

    def _speak(self, refusal: Refused) -> None:
        """From now on, prompts are text. Raises ServerError where the server makes other ids of it."""
        if self.spelling is None:
            raise ServerError(f"{refusal}; it takes no token ids, and the checkpoint has no tokenizer to write text by")
        self.as_text = True
        example = self.spelling.example()
        self.tokenizes = next((t for t in TOKENIZERS if self._ids_of("a", t) is not None), None)
        if self.tokenizes is None:
            return
        for self.spell_bos in (False, True):
            text = self.spelling.text(example, self.spell_bos)
            if text is not None and self._ids_of(text, self.tokenizes) == example:
                return
        raise ServerError(
            f"candidate {self.url}: takes text alone, and its tokenizer is not the checkpoint's: of "
            f"{self.spelling.text(example, False)!r} it makes other ids than {example}"
        )

    def _text(self, ids: list[int]) -> str:
        assert self.spelling is not None
        text = self.spelling.text(ids, self.spell_bos)
        if text is None or (self.tokenizes is not None and self._ids_of(text, self.tokenizes) != ids):
            raise Unasked("these ids are not those of a text")
        return text

    def _ids_of(self, text: str, tokenizer: tuple[str, str]) -> list[int] | None:
        """The server's own ids of a text; None where it does not say."""
        path, key = tokenizer
        body = {key: text, "model": self.model, "add_special": True, "parse_special": True}
        try:
            found = self.transport.ask(self.root + path, body, QUICK_S)
        except ServerError:
            return None
        tokens = found.get("tokens") if isinstance(found, dict) else None
        return tokens if isinstance(tokens, list) and tokens and all(type(i) is int for i in tokens) else None

    def _count(self, answer: dict[str, Any], ids: list[int]) -> None:
        """Text whose ids a server does not tell must at least be as many. Raises Unasked."""
        if self.as_text and self.tokenizes is None:
            usage = answer.get("usage")
            count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            if count != len(ids):
                raise Unasked(f"the server makes {count} tokens of a text of {len(ids)}: not the checkpoint's ids")

    def _read(self, read: Callable[..., Any], *args: Any) -> Any:
        try:
            return read(*args)
        except UNREADABLE as error:
            raise ServerError(f"candidate {self.url}: its answer {line(str(error))}") from error

    # --- What it says of itself --------------------------------------------------------------------------------------

    def _chosen(self, model: str | None) -> str:
        """The model to ask. Raises ServerError where that is open."""
        try:
            answer = self.transport.ask(f"{self.url}/models", None, QUICK_S)
        except Refused:
            return model or ""  # a server may do without a list
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
            raise ServerError(
                f"candidate {self.url}/models: answers {line(str(answer))!r}: expected an object with data"
            )
        listed = {str(entry.get("id", "")): entry for entry in data}
        names = ", ".join(map(line, listed))
        if model is None and len(listed) > 1:
            raise ServerError(f"candidate {self.url}: serves {len(listed)} models, {names}: name one with --model")
        if model is not None and listed and model not in listed:
            raise ServerError(f"candidate {self.url}: has no model {model!r}: it serves {names}")
        name = model if model is not None else next(iter(listed), "")
        self.max_positions = _positive(listed.get(name, {}).get("max_model_len"))  # vLLM, SGLang
        return name

    def _of_props(self) -> int | None:
        """The positions that llama.cpp's server holds; None of another."""
        try:
            found = self.transport.ask(f"{self.root}/props", None, QUICK_S)
        except ServerError:
            return None
        settings = found.get("default_generation_settings") if isinstance(found, dict) else None
        return _positive(settings.get("n_ctx")) if isinstance(settings, dict) else None

    def _meet(self) -> None:
        """One token, so that what cannot be asked is known before anything else runs."""
        self._answer(self.spelling.example() if self.spelling else [n % self.rows for n in (1, 2, 3)], 1)


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
