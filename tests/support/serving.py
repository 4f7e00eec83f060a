"""nanollama's own server for tests: asked within the process, or on a socket of this machine."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from nanollama.generation.llama import Llama
from nanollama.options import Drawing
from nanollama.serve.app import Server, Service, make_app
from nanollama.serve.engine import Engine
from nanollama.serve.request import Reader

HERE = ("127.0.0.1", "localhost", "[::1]")


def service_of(llama: Llama, *, waiting: int = 4, context: int | None = None, **settings: Any) -> Service:
    """As the command makes it; greedy, 16 tokens, where a request says nothing."""
    seeds = itertools.count()
    size = context or llama.config.max_seq_len
    reader = Reader(llama, "tiny", size, Drawing(max_new_tokens=16), lambda: next(seeds))
    given: dict[str, Any] = {"body_bytes": 1 << 16, "hosts": HERE, **settings}
    return Service(reader, Engine(llama.model.layers, waiting), **given)


def ask(service: Service, path: str, body: Any = None, **more: Any) -> httpx.Response:
    """One exchange: a GET, or a POST of `body` (JSON, or bytes as they are)."""
    if body is not None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        more = {"content": content, **more, "headers": {"Content-Type": "application/json", **more.get("headers", {})}}

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request("GET" if body is None else "POST", path, **more)

    return asyncio.run(exchange())


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """What a stream says, which ends with [DONE]."""
    *lines, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The server on a socket; its address, with /v1."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        service.engine.end()
        thread.join()
