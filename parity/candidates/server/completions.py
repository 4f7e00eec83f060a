"""What servers with OpenAI's completions interface say, read: tokens, log-probabilities, refusals, context.

Each server names tokens in its own way: by `token_ids` or `token_id:N` (vLLM), by `id` in `logprobs.content`
(llama.cpp), or by their text alone (llama-cpp-python, SGLang); `Named` turns any of them into an id. Pure functions.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parity.candidates.server.transport import Refused

Named = Callable[[str], int | None]  # a token as a server writes it -> its id; None where it cannot be told
Listing = dict[int, float]  # token id -> its log-probability
PREFIX = "token_id:"
# The words in which servers say how many positions they hold, and the numbers' names in their JSON.
HOLDS = (
    r"context (?:length|window|size)\D{0,20}?(\d+)",  # vLLM, SGLang, llama.cpp, llama-cpp-python
    r"max_new_tokens\W* must be <= (\d+)",  # TGI
    r"\bn_ctx\W{1,4}(\d+)",
)


def choice_of(answer: Any) -> dict[str, Any]:
    """The first choice. Raises ValueError where there is none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"holds no choices: {str(answer)!r}")
    return choices[0]


def named_by(spelled: Named | None) -> Named:
    """`token_id:N` by itself, any other text by the checkpoint's tokenizer where there is one."""

    def named(text: str) -> int | None:
        if text.startswith(PREFIX):
            return int(text.removeprefix(PREFIX))
        return spelled(text) if spelled else None

    return named


def tokens_of(choice: dict[str, Any], named: Named) -> list[int | None]:
    """The tokens of an answer, None for each that cannot be told; empty where nothing names any. Raises ValueError."""
    logprobs = _logprobs(choice)
    if choice.get("token_ids"):
        return [_id(i) for i in choice["token_ids"]]
    entries = [e for e in _dicts(logprobs.get("content") or []) if "id" in e or "token" in e]
    if entries:
        return [_id(e["id"]) if "id" in e else named(str(e["token"])) for e in entries]
    if logprobs.get("tokens"):
        return [named(str(token)) for token in logprobs["tokens"]]
    return []


def generated_listing(choice: dict[str, Any], named: Named) -> Listing:
    """The log-probabilities of the first token that an answer generated; empty where it lists none."""
    logprobs = _logprobs(choice)
    for entry in _dicts(logprobs.get("content") or [])[:1]:
        return _of_entries([entry, *_dicts(entry.get("top_logprobs") or [])], named)
    for top in (logprobs.get("top_logprobs") or [])[:1]:
        return _of_names(top, named)
    return {}


def prompt_listings(choice: dict[str, Any], ids: Sequence[int], named: Named) -> dict[int, Listing] | None:
    """By position, the log-probabilities of the token after it, of an answer that has those of the prompt `ids`.

    None where it has none, or those of other tokens than were sent: a prompt that was cut, or another BOS.
    """
    found = choice.get("prompt_logprobs")
    if isinstance(found, list) and len(found) == len(ids) > 1:
        rows = {i - 1: {_id(int(k)): _number(v) for k, v in row.items()} for i, row in enumerate(found) if i and row}
        return rows if all(ids[i + 1] in row for i, row in rows.items()) else None
    logprobs = _logprobs(choice)
    tokens, tops = logprobs.get("tokens") or [], logprobs.get("top_logprobs") or []
    shift = _shift([named(str(token)) for token in tokens], ids)
    if shift is None or len(tokens) != len(tops):
        return None
    rows = {n + shift - 1: _of_names(top, named) for n, top in enumerate(tops) if top and n + shift > 0}
    return {position: row for position, row in rows.items() if row and position < len(ids)}


def _shift(tokens: list[int | None], ids: Sequence[int]) -> int | None:
    """Where an echo's first token stands in the prompt: 0, or 1 of one that leaves out BOS; None where it is none."""
    for shift in (0, 1):
        pairs = list(zip(tokens, ids[shift:], strict=False))
        known = [(a, b) for a, b in pairs if a is not None]
        if len(tokens) + shift >= len(ids) > 1 and known and all(a == b for a, b in known):
            return shift
    return None


def _logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("logprobs") or {}
    if not isinstance(found, dict):
        raise ValueError(f"holds logprobs of another kind: {str(found)!r}")
    return found


def _dicts(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"holds logprobs of another kind: {str(entries)!r}")
    return entries


def _of_entries(entries: list[dict[str, Any]], named: Named) -> Listing:
    ids = [(_id(e["id"]) if "id" in e else named(str(e.get("token"))), e) for e in entries]
    return {i: _number(e["logprob"]) for i, e in ids if i is not None and "logprob" in e}


def _of_names(top: Any, named: Named) -> Listing:
    if not isinstance(top, dict):
        raise ValueError(f"holds top_logprobs of another kind: {str(top)!r}")
    ids = [(named(str(name)), value) for name, value in top.items()]
    return {i: _number(value) for i, value in ids if i is not None}


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"names the token {str(value)!r}: expected an id")
    return value


def _number(value: Any) -> float:
    found: Any = value.get("logprob") if isinstance(value, dict) else value
    if type(found) not in (int, float) or math.isnan(found) or found > 1e-3:
        raise ValueError(f"has the log-probability {str(found)!r}: expected a number up to 0")
    return float(found)


# --- Refusals --------------------------------------------------------------------------------------------------------


def holds(refusal: Refused) -> int | None:
    """How many positions the server says that it holds."""
    found = next((m for pattern in HOLDS if (m := re.search(pattern, refusal.words))), None)
    return int(found[1]) if found else None


def complained_of(refusal: Refused, keys: Sequence[str]) -> list[str]:
    """The request's keys that a refusal names: by its JSON where that says where, else in its words."""
    places = list(_places(refusal.content))
    words = " ".join(places) if places else refusal.words.replace("prompt logprobs", "prompt_logprobs")
    return [key for key in keys if re.search(rf"\b{re.escape(key)}\b", words)]


def _places(content: Any) -> Iterator[str]:
    """`loc` of FastAPI's details, which repeat the whole request elsewhere; `param` of OpenAI's errors."""
    if not isinstance(content, dict):
        return
    details = content.get("detail")
    for entry in details if isinstance(details, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("loc"), list):
            yield " ".join(map(str, entry["loc"]))
    error = content.get("error")
    if isinstance(error, dict) and error.get("param") and "messages" not in str(error["param"]):
        yield str(error["param"])
