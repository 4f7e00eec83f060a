"""Servers that misbehave: each ends in one line that says how, bounded in time and size."""

import gzip
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch

from parity.candidates.limits import Limits
from parity.candidates.server.endpoint import endpoint_loader
from parity.candidates.server.transport import Transport, proxy_of
from parity.check import main
from parity.contract import UsageError
from servers import answer, asked_of, serving, small_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("ckpt") / "meta")


LIMITS = Limits(first_byte_s=1.0, answer_s=1.5, answer_bytes=1 << 20)
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


def silent(request: BaseHTTPRequestHandler) -> None:
    time.sleep(5)


def short(request: BaseHTTPRequestHandler) -> None:
    """Less than was announced."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"{}")


def bomb(request: BaseHTTPRequestHandler) -> None:
    """64 MB of spaces in 64 KB."""
    data = gzip.compress(b" " * (1 << 26))
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def long_headers(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        request.wfile.write(b"x" * 65536)


def long_refusal(request: BaseHTTPRequestHandler) -> None:
    request.send_response(400)
    request.end_headers()
    while True:
        request.wfile.write(b"no\x1b[2J" * 65536)


def no_http(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")


def redirect_to_itself(request: BaseHTTPRequestHandler) -> None:
    request.send_response(308)
    request.send_header("Location", request.path)
    request.end_headers()


def completion(token: object, logprob: object = -1.0) -> object:
    found = {"token_ids": [token], "logprobs": {"top_logprobs": [{"token_id:1": logprob}]}}
    return lambda request: answer(request, 200, {"choices": [found]})


FAULTS = {
    "drip": (drip, "gave no whole answer within 1.5 s: a larger --answer_s waits"),
    "drip of headers": (drip_of_headers, "gave no answer within 1 s: a larger --first_byte_s waits"),
    "silent": (silent, "gave no answer within 1 s"),
    "endless": (endless, "answers more than 1 MiB: a larger --answer_mb lets it"),
    "endless headers": (long_headers, "cannot be asked"),
    "endless refusal": (long_refusal, "400: no?[2Jno?[2J"),
    "bomb": (bomb, "answers packed as gzip"),
    "short": (short, "cannot be asked"),
    "no HTTP": (no_http, "cannot be asked"),
    "to itself": (redirect_to_itself, "sends elsewhere, to /v1/completions"),
    "an id of a fraction": (completion(1.5), "names the token"),
    "an id of true": (completion(True), "names the token"),
    "a NaN": (completion(1, float("nan")), "has the log-probability"),
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
def test_a_fault_is_one_line(kind: str, checkpoint: Path) -> None:
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
        endpoint_loader(url, LIMITS)(str(checkpoint), torch.float32, "cpu")
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


def test_a_server_of_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def other(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        answer(request, 200, {"from": "the proxy"})

    with (
        serving(other) as proxy,
        serving(lambda request: answer(request, 200, {"from": "the server"})) as url,
    ):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Transport(url).ask(url) == {"from": "the server"} and asked == []
        assert proxy_of("http://models.example/v1") == proxy.removesuffix("/v1")
        assert Transport("http://models.example/v1").ask("http://models.example/v1") == {"from": "the proxy"}
        monkeypatch.setenv("no_proxy", "models.example")
        assert proxy_of("http://models.example/v1") is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "a.localhost", "LOCALHOST"])
def test_this_machine_goes_by_many_names(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert proxy_of(f"http://{host}:8000/v1") is None
    assert proxy_of("http://127.0.0.1.example:8000/v1") == "http://proxy.example:3128"


def test_a_port_where_nothing_listens_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(RuntimeError, match="is the server running"):
            Transport(url).ask(url)


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
