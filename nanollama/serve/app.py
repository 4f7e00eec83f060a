"""The HTTP side: paths, key, limits, refusals in OpenAI's shape, streams of server-sent events.

Every answer is JSON. What a client can get wrong is a 4xx that says what; what goes wrong here is a 500 with a
traceback on stderr, and the server goes on.
"""

import asyncio
import hmac
import json
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanollama.gate import shown
from nanollama.gate.documents import strict_json
from nanollama.serve.answer import Piece, Shape, pieces
from nanollama.serve.engine import Busy, Ended, Engine, Job
from nanollama.serve.request import Asked, BadRequest, Reader

BODY_S = 30.0  # for a client to send what it asks
END_S = 3.0  # for answers to be told that the server ends
CONNECTIONS = 128
READERS = 2  # bodies that are made ids of at once
T = TypeVar("T")


class Gone(Exception):
    """The client hung up."""


@dataclass(frozen=True)
class Service:
    """What the paths share. hosts: the names that it is asked by, where no key tells who asks; None: any."""

    reader: Reader
    engine: Engine
    body_bytes: int
    key: str | None = None
    hosts: tuple[str, ...] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    readers: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(READERS))

    # --- Paths -------------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        name = request.path_params.get("model")
        if name is None:
            return answer({"object": "list", "data": [self._model()]})
        if name != self.reader.name:
            raise BadRequest(
                f"there is no model {shown(name)}: this server has {self.reader.name}", "model", 404, "model_not_found"
            )
        return answer(self._model())

    def _model(self) -> dict[str, Any]:
        found = {"id": self.reader.name, "object": "model", "created": self.created, "owned_by": "nanollama"}
        return {**found, "max_model_len": self.reader.context_tokens}

    async def health(self, request: Request) -> Response:
        return answer({"status": "ok"})

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, self.reader.completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, self.reader.chat)

    async def _generate(self, request: Request, read: Callable[[Any], Asked]) -> Response:
        body = await self._body(request)
        # Tokenizing a long text takes a while, and other clients are not to wait for it.
        asked = await anyio.to_thread.run_sync(read, body, limiter=self.readers)
        shape = Shape(asked, self.reader.llama.tokenizer, self.reader.name)
        job = self.engine.submit(lambda: pieces(self.reader.llama, asked))
        if asked.stream:
            return Streamed(job, shape)
        try:
            found = await unless_gone(request.receive, gather(job))
        finally:
            job.leave()
        return answer(shape.whole(found))

    # --- What comes in -----------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        """Raises BadRequest for whom this server does not know."""
        if self.key is not None:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {self.key}".encode()):
                raise BadRequest(
                    "expected the header Authorization: Bearer KEY, with this server's key",
                    None,
                    401,
                    "invalid_api_key",
                )
        elif self.hosts is not None:
            # A page of another site whose name leads here must not read answers (DNS rebinding).
            host = request.headers.get("host", "")
            if re.sub(r":\d*$", "", host) not in self.hosts:
                raise BadRequest(f"this server answers to {', '.join(self.hosts)}, not to {shown(host)}", None, 403)

    async def _body(self, request: Request) -> dict[str, Any]:
        """Raises BadRequest for what is no JSON object of at most body_bytes."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send without being asked about it
            raise BadRequest(f"expected the header Content-Type: application/json, not {shown(kind)}", None, 415)
        data = bytearray()
        try:
            with anyio.fail_after(BODY_S):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.body_bytes:
                        raise BadRequest(f"the body has more than {self.body_bytes:,} bytes", None, 413)
        except TimeoutError:
            raise BadRequest(f"the body did not arrive within {BODY_S:g} s", None, 408) from None
        try:
            found = await anyio.to_thread.run_sync(strict_json, bytes(data), limiter=self.readers)
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(found, dict):
            raise BadRequest(f"the body is {shown(found)}: expected a JSON object")
        return found


def answer(content: Any, status: int = 200) -> Response:
    return Response(to_bytes(content), status, media_type="application/json")


def to_bytes(content: Any) -> bytes:
    """JSON; halves of surrogate pairs, which a client may send, become question marks."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def refusal(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error", 500: "server_error"}
    return {
        "error": {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": code}
    }


async def gather(job: Job[Piece]) -> list[Piece]:
    return [piece async for piece in job.results()]


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, whose client is watched. Raises Gone when it hangs up before."""
    watch, task = asyncio.ensure_future(hung_up(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait((watch, task), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)


async def hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(StreamingResponse):
    """Server-sent events, as long as somebody reads them."""

    def __init__(self, job: Job[Piece], shape: Shape) -> None:
        kept = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass them on as they come
        super().__init__(events(job, shape), headers=kept, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        except Gone:
            pass
        finally:
            self.job.leave()


async def events(job: Job[Piece], shape: Shape) -> AsyncIterator[bytes]:
    """The lines of a stream. What goes wrong on the way is its last event but [DONE]."""
    try:
        for chunk in shape.first_chunks():
            yield event(chunk)
        async for piece in job.results():
            for chunk in shape.chunks(piece):
                yield event(chunk)
        for chunk in shape.last_chunks():
            yield event(chunk)
    except Exception as error:
        yield event(failure(error)[0])
    yield b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    return b"data: " + to_bytes(content) + b"\n\n"


def failure(error: Exception) -> tuple[dict[str, Any], int]:
    """What a client is told of an exception, and the status; what is no client's mistake is shown here."""
    if isinstance(error, BadRequest):
        return refusal(str(error), error.status, error.param, error.code), error.status
    if isinstance(error, HTTPException):
        return refusal(error.detail, error.status_code), error.status_code
    if isinstance(error, Busy):
        return refusal("as many requests wait as may: ask again in a while", 503, code="overloaded"), 503
    if isinstance(error, Ended):
        return refusal("the server ends", 503, code="shutting_down"), 503
    traceback.print_exception(error)
    return refusal(f"the server failed ({type(error).__name__}); its own output says more", 500), 500


def answered(
    service: Service, handle: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """A path's handler behind the key, whose exceptions are answers."""

    async def handler(request: Request) -> Response:
        try:
            service.admit(request)
            return await handle(request)
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            content, status = failure(error)
            found = answer(content, status)
            if status == 503:
                found.headers["Retry-After"] = "1"
            return found

    return handler


def make_app(service: Service) -> Starlette:
    """Every path is there with /v1 and without, as clients differ in what they take for the address."""
    paths = {
        "/models": ("GET", service.models),
        "/models/{model:path}": ("GET", service.models),
        "/completions": ("POST", service.completions),
        "/chat/completions": ("POST", service.chat),
        "/health": ("GET", service.health),
    }
    routes = [
        Route(prefix + path, answered(service, handle), methods=[method])
        for prefix in ("/v1", "")
        for path, (method, handle) in paths.items()
    ]

    async def missing(request: Request, error: Exception) -> Response:
        return answer(*failure(error))

    return Starlette(routes=routes, exception_handlers={HTTPException: missing})


class Server(uvicorn.Server):
    """Whose end is told to those that wait for an answer."""

    def __init__(self, service: Service) -> None:
        settings: dict[str, Any] = {
            "lifespan": "off",
            "http": "h11",
            "ws": "none",
            "loop": "asyncio",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "limit_concurrency": CONNECTIONS,
            "timeout_graceful_shutdown": int(END_S),
        }
        config = uvicorn.Config(make_app(service), **settings)
        super().__init__(config)
        self.engine = service.engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.end()
        super().handle_exit(sig, frame)
