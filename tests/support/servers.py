"""A completions server of the standard library that answers by any port, in the manners of the servers in use."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama.tokenizer.base import Tokenizer
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

Logits = Callable[[Tensor], Tensor]  # tokens (1, T) -> (1, T, V)


def small_checkpoint(folder: Path) -> Path:
    """Meta's folder of a model with 512 rows, for a vocabulary of 256 bytes and 256 special tokens."""
    shape = replace(SHAPES["tiny"], vocab_size=512, n_layers=2, n_heads=16, n_kv_heads=4)  # head_dim 8
    synthesise(shape, folder)
    lines = [base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@dataclass(frozen=True)
class Manner:
    """How a server behaves: obliging by default, and as vLLM names tokens."""

    models: tuple[str, ...] = ("the-model",)
    key: str | None = None
    context: int | None = None
    tells: str = "400"  # where it says its context: "400", "models" or "props"
    refuses: tuple[str, ...] = ()  # keys of a request
    penalty: float = 1.0  # of tokens that occurred, where a request says nothing
    names: str = "token_ids"  # or "tokens", "content", "text"
    lists: str | None = None  # log-probabilities: "prompt_logprobs", "echo" or "content"; None: none
    speaks: Tokenizer | None = None  # it takes text alone, and says which ids it makes of it
    counts_only: bool = False  # it says how many
    text_of: Callable[[int], str] | None = None  # of a token; its number, where the server does not speak


class Server:
    """What it was asked is kept: `bodies` of completions, `paths` of all."""

    def __init__(self, logits: Logits, manner: Manner) -> None:
        self.logits, self.manner = logits, manner
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.url = ""

    def get(self, path: str) -> tuple[int, Any]:
        m = self.manner
        if path == "/v1/models":
            length = {"max_model_len": m.context} if m.tells == "models" else {}
            return 200, {"data": [{"id": name, **length} for name in m.models]}
        if path == "/props" and m.tells == "props":
            return 200, {"default_generation_settings": {"n_ctx": m.context}}
        return 404, "not found"

    def post(self, path: str, asked: dict[str, Any]) -> tuple[int, Any]:
        m = self.manner
        if path == "/tokenize" and m.speaks and not m.counts_only and "prompt" in asked:
            return 200, {"tokens": m.speaks.encode(asked["prompt"], bos=True)}
        if path != "/v1/completions":
            return 404, "not found"
        self.bodies.append(asked)
        if refused := [key for key in m.refuses if key in asked]:
            return 400, {"error": {"message": f"Unrecognized request arguments supplied: {', '.join(refused)}"}}
        if asked["model"] not in m.models or asked.get("temperature") != 0:
            return 400, {"error": {"message": "wrong request"}}
        if m.speaks and not isinstance(asked["prompt"], str):
            detail = {"loc": ["body", "prompt", "str"], "msg": "Input should be a valid string", "input": asked}
            return 422, {"detail": [detail]}
        ids = m.speaks.encode(asked["prompt"], bos=True) if m.speaks else list(asked["prompt"])
        n = asked["max_tokens"]
        if m.context is not None and len(ids) + n > m.context:
            said = f"maximum context length is {m.context} tokens. However, you requested {len(ids) + n} tokens"
            return 400, {"error": {"message": f"This model's {said} ({len(ids)} in the prompt)."}}
        return 200, {"choices": [self.choice(ids, n, asked)], "usage": {"prompt_tokens": len(ids)}}

    def choice(self, ids: list[int], n: int, asked: dict[str, Any]) -> dict[str, Any]:
        m, whole = self.manner, list(ids)
        penalty = asked.get("repeat_penalty", asked.get("repetition_penalty", m.penalty))
        for _ in range(n):
            scores = self.logits(torch.tensor([whole]))[0, -1].clone()
            seen = torch.tensor(whole).unique()
            scores[seen] = torch.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
            whole.append(int(scores.argmax()))
        new, text = whole[len(ids) :], m.text_of or str
        rows = self.logits(torch.tensor([whole]))[0].double().log_softmax(-1) if m.lists else None
        found: dict[str, Any] = {"text": "".join(map(text, new)), "finish_reason": "length"}
        if m.names == "token_ids":
            found["token_ids"] = new
        elif m.names == "tokens":
            found["logprobs"] = {"tokens": [f"token_id:{i}" for i in new]}
        elif m.names == "content":
            found["logprobs"] = {"content": [self.entry(i, rows, len(ids) + j - 1) for j, i in enumerate(new)]}
        if m.lists == "prompt_logprobs" and asked.get("prompt_logprobs") and rows is not None:
            given = [listing(row, i) for row, i in zip(rows, ids[1:], strict=False)]
            found["prompt_logprobs"] = [None, *({str(k): {"logprob": v} for k, v in row.items()} for row in given)]
        if m.lists == "echo" and rows is not None:
            start = 1 if asked.get("echo") else len(ids)  # BOS is left out of an echo, as llama-cpp-python does
            tops = [{text(k): v for k, v in listing(rows[p - 1], whole[p]).items()} for p in range(start, len(whole))]
            found["logprobs"] = {"tokens": [text(i) for i in whole[start:]], "top_logprobs": tops}
        return found

    def entry(self, token: int, rows: Tensor | None, position: int) -> dict[str, Any]:
        if rows is None:
            return {"id": token, "token": "?"}
        row = listing(rows[position], token)
        tops = [{"id": k, "token": "?", "logprob": v} for k, v in row.items()]
        return {"id": token, "token": "?", "logprob": row[token], "top_logprobs": tops}


def listing(row: Tensor, token: int) -> dict[int, float]:
    """The twenty likeliest, and `token`."""
    top = row.topk(20).indices.tolist()
    return {i: float(row[i]) for i in dict.fromkeys([*top, token])}


@contextmanager
def serving(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on the loopback interface that has every request answered by `handle`; its URL, with /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handle(self)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def answer(request: BaseHTTPRequestHandler, status: int, content: Any) -> None:
    data = json.dumps(content).encode() if not isinstance(content, bytes) else content
    request.send_response(status)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def asked_of(request: BaseHTTPRequestHandler) -> dict[str, Any]:
    return json.loads(request.rfile.read(int(request.headers["Content-Length"])))


@contextmanager
def server(logits: Logits, manner: Manner | None = None) -> Iterator[Server]:
    """A running server; `url` is where."""
    found = Server(logits, manner or Manner())

    def handle(request: BaseHTTPRequestHandler) -> None:
        found.paths.append(request.path)
        key = found.manner.key
        if key is not None and request.headers["Authorization"] != f"Bearer {key}":
            answer(request, 401, {"error": f"not the key: {request.headers['Authorization']}"})
        elif request.command == "GET":
            answer(request, *found.get(request.path))
        else:
            answer(request, *found.post(request.path, asked_of(request)))

    with serving(handle) as found.url:
        yield found
