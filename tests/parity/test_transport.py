"""Servers that misbehave: each ends in one line that says how, bounded in time and size."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch

from parity.candidates.server import transport
from parity.candidates.server.endpoint import endpoint_loader
from parity.check import main
from parity.contract import UsageError
from servers import answer, asked_of, serving, small_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("ckpt") / "meta")


MODELS = {"data": [{"id": "the-model"}]}


def headers(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()


def drip(request: BaseHTTPRequestHandler) -> None:
    headers(request)
    for _ in range(200):
        request.wfile.write(b" ")
        time.sleep(0.05)


def drip_of_headers(request: BaseHTTPRequestHandler) -> None:
    for n in range(200):
        request.wfile.write(b"HTTP/1.1 200 OK\r\n" if n == 0 else b"X-%d: 1\r\n" % n)
        time.sleep(0.05)


def endless(request: BaseHTTPRequestHandler) -> None:
    headers(request)
    while True:
        request.wfile.write(b" " * 65536)


def redirect(request: BaseHTTPRequestHandler) -> None:
    request.send_response(307)
    request.send_header("Location", "http://elsewhere.invalid/v1/completions")
    request.end_headers()


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.connection.close()


FAULTS = {
    "drip": (drip, "gave no whole answer within 1 s"),
    "drip of headers": (drip_of_headers, "gave no whole answer within 1 s"),
    "endless": (endless, "answers more than 1 MiB"),
    "redirect": (redirect, "sends elsewhere, to http://elsewhere.invalid/v1/completions"),
    "hang up": (hang_up, "cannot be asked"),
    "no JSON": (lambda r: answer(r, 200, b"<html>\x1b[31mhello"), "answers no JSON: '<html>?[31mhello'"),
    "deep": (lambda r: answer(r, 200, b"[" * 200_000), "answers no JSON"),
    "a list": (lambda r: answer(r, 200, [1]), "holds no choices"),
    "no choice": (lambda r: answer(r, 200, {"choices": []}), "holds no choices"),
    "words for ids": (lambda r: answer(r, 200, {"choices": [{"token_ids": ["x"]}]}), "names the token 'x'"),
    "no ids": (lambda r: answer(r, 200, {"choices": [{"logprobs": {"content": [{}]}}]}), "its answers name no token"),
    "wrong listing": (lambda r: answer(r, 200, {"choices": [{"token_ids": [1], "logprobs": 3}]}), "of another kind"),
    "a positive one": (
        lambda r: answer(r, 200, {"choices": [{"token_ids": [1], "logprobs": {"top_logprobs": [{"token_id:1": 5}]}}]}),
        "has the log-probability '5'",
    ),
    "broken": (lambda r: answer(r, 500, {"error": "out of memory"}), '500: {"error": "out of memory"}'),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_line(kind: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ANSWER_S", 1.0)
    monkeypatch.setattr(transport, "MAX_BYTES", 1 << 20)
    fault, said = FAULTS[kind]

    def handle(request: BaseHTTPRequestHandler) -> None:
        if request.command == "GET":
            answer(request, 200 if request.path == "/v1/models" else 404, MODELS)
            return
        asked_of(request)
        try:
            fault(request)
        except OSError:  # the harness has left
            return

    started = time.perf_counter()
    with serving(handle) as url, pytest.raises(UsageError) as caught:
        endpoint_loader(url)(str(checkpoint), torch.float32, "cpu")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert time.perf_counter() - started < 20


def test_a_right_answer_is_no_fault(checkpoint: Path) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        right = {"choices": [{"token_ids": [7]}]}
        answer(request, 200, MODELS if request.command == "GET" else right)

    with serving(handle) as url:
        endpoint = endpoint_loader(url)(str(checkpoint), torch.float32, "cpu")
        assert endpoint.next_tokens([1, 2], 1) == [7]


def test_a_key_stays_at_its_address(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setenv("A_KEY", "right-key")

    def other(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers["Authorization"])
        answer(request, 200, MODELS)

    with serving(other) as elsewhere:

        def handle(request: BaseHTTPRequestHandler) -> None:
            request.send_response(302)
            request.send_header("Location", f"{elsewhere}/models?key=right-key")
            request.end_headers()

        with serving(handle) as url, pytest.raises(UsageError, match="sends elsewhere") as caught:
            endpoint_loader(f"{url}#api_key=A_KEY")(str(checkpoint), torch.float32, "cpu")
    assert seen == [] and "right-key" not in str(caught.value)


def test_a_server_that_stops_on_the_way_is_an_error_that_keeps_the_rest(
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """By then, the references have run: what goes wrong is a result of the check that asked."""
    answers, lock = [0], threading.Lock()

    def handle(request: BaseHTTPRequestHandler) -> None:
        if request.command == "GET":
            answer(request, 200, MODELS)
            return
        asked_of(request)
        with lock:
            answers[0] += 1
        right = {"choices": [{"token_ids": [7]}]}
        answer(request, 200 if answers[0] < 20 else 503, right if answers[0] < 20 else "closed")

    out = tmp_path / "report.json"
    with serving(handle) as url:
        common = ("--references", "meta", "--dtype", "fp32", "--checks", "logits,argmax", "--json", str(out))
        assert main(["--ckpt", str(checkpoint), "--candidate", url, *common]) == 1
    (error,) = (r for r in json.loads(out.read_text())["results"] if r["status"] == "error")
    assert error["check"] == "argmax" and '503: "closed"' in error["reason"]
