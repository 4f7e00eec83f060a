"""One exchange with a server: JSON there and back over HTTP, bounded in time and size; each fault in one line.

An answer is bounded as a whole, from the first byte sent to the last received, so that one that drips ends, too.
Redirects are not followed, so that a key goes to the address that the user named and nowhere else; where a server's
own words hold the key, it is struck out before anybody reads them.
"""

import asyncio
import json
from typing import Any

import httpx

ANSWER_S = 600.0  # of one answer
QUICK_S = 20.0  # of what a server knows without a forward pass
MAX_BYTES = 1 << 26  # of one answer: a thousand positions with twenty log-probabilities each are 2 MiB
SHOWN_CHARACTERS = 200


class ServerError(RuntimeError):
    """The server cannot be asked, or its answer is none. One line."""


class Refused(ServerError):
    """An answer with an HTTP error status. `content` is its JSON, or its text where it is none."""

    def __init__(self, line: str, status: int, content: Any) -> None:
        super().__init__(line)
        self.status, self.content = status, content
        self.words = content if isinstance(content, str) else json.dumps(content)


class Transport:
    """Asks one server. `key` goes into the Authorization header; it is in no message."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.key = url, key
        self.headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.verify = httpx.create_ssl_context()

    def ask(self, url: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """The JSON that `url` answers: to a GET, or to a POST of `body`. Raises Refused and ServerError."""
        limit = seconds or ANSWER_S
        try:
            status, target, content = asyncio.run(asyncio.wait_for(self._exchange(url, body), limit))
        except asyncio.TimeoutError:
            raise self._error(url, f"gave no whole answer within {limit:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            why = self._shown(str(error)) or type(error).__name__  # some of httpx's have no words of their own
            raise self._error(url, f"cannot be asked ({why}); is the server running?") from error
        if 300 <= status < 400:
            raise self._error(
                url, f"sends elsewhere, to {self._shown(target)}: give that address as --candidate, if it is meant"
            )
        text = self._without_key(content.decode("utf-8", "replace"))
        if status >= 400:
            raise self._refused(url, status, text)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._error(url, f"answers no JSON: {self._shown(text)!r}") from None

    async def _exchange(self, url: str, body: dict[str, Any] | None) -> tuple[int, str, bytes]:
        method = "GET" if body is None else "POST"
        async with (
            httpx.AsyncClient(verify=self.verify, headers=self.headers, timeout=None) as client,
            client.stream(method, url, json=body) as response,
        ):
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise self._error(url, f"answers more than {MAX_BYTES >> 20} MiB")
            return response.status_code, response.headers.get("location", "nowhere"), bytes(content)

    def _refused(self, url: str, status: int, text: str) -> ServerError:
        if status in (401, 403):
            hint = (
                "refuses the key in the variable that --api_key names"
                if self.key
                else "wants a key: --api_key NAME, of an environment variable that holds it"
            )
            return self._error(url, f"{hint} ({status})")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = text
        return Refused(str(self._error(url, f"{status}: {self._shown(text)}")), status, content)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _shown(self, text: str) -> str:
        return line(self._without_key(text))

    def _error(self, url: str, what: str) -> ServerError:
        return ServerError(f"candidate {url}: {what}")


def line(text: str) -> str:
    """A server's words as one short line that a terminal only prints."""
    flat = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in flat)[:SHOWN_CHARACTERS]
