"""A candidate that is a server with OpenAI's completions interface, as llama.cpp and vLLM have it.

    python -m parity.check --candidate http://127.0.0.1:8000/v1 --dtype bf16

Prompts are sent as token ids, so the server's tokenizer is out of play, and answers must name their ids: as
`token_ids` or `token_id:N` (vLLM), or as `id` in the log-probabilities (llama.cpp). There are no logits to be had: the
checks are `argmax`, by the next token at some positions of each sequence, and `greedy`. --dtype says what the server
computes in: it decides at which positions only one token can be right.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import torch

from parity.contract import UsageError

TIMEOUT_S = 600  # of one answer


def endpoint_loader(url: str) -> Callable[[str, torch.dtype, str], "Endpoint"]:
    """load(checkpoint, dtype, device) of a server; the three are its own business."""

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Endpoint:
        return Endpoint(url.rstrip("/"))

    load.streams = True  # type: ignore[attr-defined]  # whether the model fits into memory is the server's own business
    return load


class Endpoint:
    """Greedy answers of a server. Raises UsageError where it cannot be asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        models = self._get("/models").get("data") or [{}]
        self.model = models[0].get("id", "")

    def next_tokens(self, ids: list[int], n: int) -> list[int]:
        """The n greedy tokens after `ids`; fewer where the server stops."""
        body = {"model": self.model, "prompt": ids, "max_tokens": n, "temperature": 0, "logprobs": 1}
        asked = body | {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
        answer = self._get("/completions", asked)
        choices = answer.get("choices")
        if not choices:
            raise UsageError(f"candidate {self.url}: its answer has no choices: {json.dumps(answer)[:200]}")
        return self._ids(choices[0])

    def _ids(self, choice: dict[str, Any]) -> list[int]:
        """The token ids of an answer, in any of the ways in which servers name them."""
        logprobs = choice.get("logprobs") or {}
        named = [t for t in logprobs.get("tokens") or [] if str(t).startswith("token_id:")]
        if choice.get("token_ids"):
            return [int(t) for t in choice["token_ids"]]
        if named:
            return [int(t.removeprefix("token_id:")) for t in named]
        found = [entry["id"] for entry in logprobs.get("content") or [] if "id" in entry]
        if not found:
            raise UsageError(
                f"candidate {self.url}: its answers name no token ids; "
                "expected token_ids, token_id:N in logprobs.tokens or id in logprobs.content"
            )
        return found

    def _get(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                answer: Any = json.load(response)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            raise UsageError(f"candidate {self.url}{path}: {error.code} {error.reason}: {said}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(
                f"candidate {self.url}{path}: cannot be asked ({reason}); is the server running?"
            ) from error
        if not isinstance(answer, dict):
            raise UsageError(f"candidate {self.url}{path}: answers {type(answer).__name__}: expected an object")
        return answer
