"""The server on a socket: one answer at a time, clients that hang up, and its end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

pytest.importorskip("starlette", reason="the server is in the extra serve")
pytest.importorskip("uvicorn", reason="the server is in the extra serve")

import tiny
from nanollama.cli import UsageError
from nanollama.generation.llama import Llama
from nanollama.serve import command
from nanollama.serve.app import Service
from nanollama.serve.engine import Busy, Ended, Engine, Job, Left
from servers import small_checkpoint
from serving import ask, running, service_of

LONG = {"prompt": [1, 2, 3], "max_tokens": 300, "ignore_eos": True}


def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError(f"it never came to this: {what}")


@pytest.fixture
def slow() -> tuple[Service, threading.Event]:
    """A server whose model takes a while for every token until the event is set."""
    llama, go = Llama(tiny.model()), threading.Event()

    def wait(*_: Any) -> None:
        go.wait(0.05)

    llama.model.norm.register_forward_pre_hook(wait)
    return service_of(llama, waiting=1), go


# --- The engine ------------------------------------------------------------------------------------------------------


def run_engine(test: Callable[[Engine], Any], layers: nn.ModuleList | None = None) -> None:
    async def main() -> None:
        engine = Engine(layers or nn.ModuleList(), waiting=1)
        await test(engine)
        engine.end()
        engine.join(30)

    asyncio.run(main())


async def told(job: Job[int]) -> list[int]:
    return [value async for value in job.results()]


def test_jobs_run_one_after_the_other_and_more_are_refused() -> None:
    running_now: list[str] = []

    def job(name: str, hold: threading.Event) -> Iterator[int]:
        running_now.append(name)
        hold.wait(30)
        yield len(running_now)

    async def test(engine: Engine) -> None:
        holds = [threading.Event(), threading.Event()]
        first, second = (engine.submit(lambda n=n: job(str(n), holds[n])) for n in (0, 1))  # type: ignore[misc]
        with pytest.raises(Busy):
            engine.submit(lambda: job("third", holds[0]))
        holds[0].set()
        assert await told(first) == [1]
        holds[1].set()
        assert await told(second) == [2]
        assert engine.open == []

    run_engine(test)
    assert running_now == ["0", "1"]


def test_a_job_that_was_left_ends_and_one_that_waits_never_starts() -> None:
    ended: list[int] = []

    def endless() -> Iterator[int]:
        try:
            yield from iter(int, 1)
        finally:
            ended.append(1)

    async def test(engine: Engine) -> None:
        first, second = engine.submit(endless), engine.submit(lambda: iter(ended.append(2) or [2]))  # type: ignore[func-returns-value]
        assert await anext(first.results()) == 0
        second.leave()
        first.leave()
        assert await told(engine.submit(lambda: iter([7]))) == [7]

    run_engine(test)
    assert ended == [1]


def test_a_pass_through_the_layers_is_left_between_two() -> None:
    layers = nn.ModuleList(nn.Identity() for _ in range(3))
    seen: list[int] = []

    async def test(engine: Engine) -> None:
        inside = threading.Event()

        def job() -> Iterator[int]:
            for i, layer in enumerate(layers):
                layer(torch.zeros(1))
                seen.append(i)
                inside.set()
                until(lambda: first.gone, "the job is left")
            yield 0

        first = engine.submit(job)
        until(inside.is_set, "the first layer has run")
        first.leave()
        assert await told(engine.submit(lambda: iter([7]))) == [7]

    run_engine(test, layers)
    assert seen == [0]
    assert all(not layer._forward_pre_hooks for layer in layers)


def test_an_error_is_its_own_jobs_and_the_end_is_told_to_all() -> None:
    async def test(engine: Engine) -> None:
        with pytest.raises(ZeroDivisionError):
            await told(engine.submit(lambda: iter([1 // 0])))
        job = engine.submit(lambda: iter(int, 1))
        engine.end()
        with pytest.raises(Ended):
            await told(job)

    run_engine(test)
    assert issubclass(Left, Exception)


# --- On a socket -----------------------------------------------------------------------------------------------------


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, trust_env=False)


def test_a_client_that_hangs_up_frees_the_server(slow: tuple[Service, threading.Event]) -> None:
    service, go = slow
    with running(service) as url, client_of(url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/completions", json=LONG, timeout=0.5)
        until(lambda: not service.engine.open, "the answer that nobody waits for is left")
        with client.stream("POST", "/completions", json={**LONG, "stream": True}) as response:
            assert response.status_code == 200 and len(service.engine.open) == 1
        until(lambda: not service.engine.open, "the stream that nobody reads is left")
        go.set()
        assert client.post("/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200


def test_who_comes_when_the_queue_is_full_is_told_to_come_again(slow: tuple[Service, threading.Event]) -> None:
    service, go = slow
    codes: list[int] = []

    def wait_for_an_answer() -> None:
        with client_of(url) as own:
            codes.append(own.post("/completions", json=LONG).status_code)

    with running(service) as url, client_of(url) as client:
        threads = [threading.Thread(target=wait_for_an_answer) for _ in range(2)]
        for n, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda n=n: len(service.engine.open) == n, "a request waits")  # type: ignore[misc]
        response = client.post("/completions", json=LONG)
        assert response.status_code == 503 and response.headers["Retry-After"] == "1"
        assert response.json()["error"]["code"] == "overloaded"
        assert client.get("/models").status_code == 200  # what needs no model is answered meanwhile
        go.set()
        for thread in threads:
            thread.join()
        assert client.post("/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200
    assert codes == [200, 200]


def test_bytes_that_are_no_http_leave_the_server_as_it_was(slow: tuple[Service, threading.Event]) -> None:
    service, go = slow
    go.set()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sent = [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        head + b"Content-Length: -1\r\n\r\n{}",
        head + b"Content-Length: 100\r\n\r\n{}",  # and hangs up
        head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        head + b"X: " + b"b" * 100_000 + b"\r\n\r\n",
    ]
    with running(service) as url, client_of(url) as client:
        port = int(url.split(":")[2].split("/")[0])
        for data in sent:
            with socket.create_connection(("127.0.0.1", port)) as connection, suppress(ConnectionError):
                connection.sendall(data)
        assert client.post("/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cold_processes")
def test_ctrl_c_ends_the_server_and_tells_who_waits(tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "meta")
    line = [sys.executable, "-m", "nanollama", "serve", str(ckpt), "--port", "0", "--max_new_tokens", "100000"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("serving meta at http://127.0.0.1:") and "/v1 (context " in said
        url = said.split(" ")[3]
        asked = {**LONG, "max_tokens": 8000, "stream": True}
        with client_of(url) as client, client.stream("POST", "/completions", json=asked) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(process.pid, signal.SIGINT)
            *_, error, done = [text for text in lines if text]
        assert done == "data: [DONE]" and json.loads(error[6:])["error"]["code"] == "shutting_down"
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == "ended\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 is reached from other machines: give --api_key_env NAME"),
        ({"host": "::"}, "--host :: is reached from other machines"),
        ({"api_key_env": "NO_SUCH_VARIABLE_17"}, "--api_key_env: expected the name of an environment variable"),
        ({"api_key_env": "sk-abc"}, "--api_key_env: expected the name of an environment variable"),
        ({"port": 70_000}, "--port 70000: expected 0"),
        ({"context": 0}, "--context 0: expected 1"),
        ({"context": 10**6}, "--context 1000000: the model's is"),
        ({"waiting": -1}, "--waiting -1"),
        ({"body_mb": 0.0}, "--body_mb 0"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    ckpt = tiny.checkpoint(tmp_path / "m") if "context" in flags else tmp_path
    with pytest.raises(UsageError) as caught:
        command.serve(str(ckpt), door=command.Door(**{"port": 0, **flags}))
    assert str(caught.value).startswith(words) and "sk-abc" not in str(caught.value)


def test_an_address_that_is_taken_and_an_extra_that_is_missing_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: .*; choose another"):
            command.listen("127.0.0.1", port)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package starlette: pip install 'llama-parity\[serve\]'"):
        command.require_extra()


def test_a_models_name_says_nothing_of_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "My-Llama"
    folder.mkdir()
    assert command.model_name(str(folder)) == "My-Llama"
    assert command.model_name("org/name") == "org/name"
    assert ask(service_of(Llama(tiny.model())), "/v1/models").json()["data"][0]["id"] == "tiny"
