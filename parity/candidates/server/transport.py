"""One exchange with a server: JSON there and back over HTTP, bounded in time and size; each fault in one line.

An answer is bounded as a whole, from the first byte sent to the last received, so that one that drips ends, too; it
travels unpacked, so that its size is that of what arrives. Redirects are not followed, so that a key goes to the
address that the user named and nowhere else; this machine is asked without a proxy; where a server's own words hold the
key, it is struck out before anybody reads them.
"""

import asyncio
import json
import re
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import httpx

from parity.candidates.limits import SERVER, Limits

QUICK_S = 20.0  # of what a server knows without a forward pass
REFUSAL_BYTES = 1 << 20  # of an answer with an HTTP error status
SHOWN_CHARACTERS = 200
HERE = re.compile(r"localhost|.*\.localhost|127\.[\d.]+|::1|0\.0\.0\.0", re.IGNORECASE)


class ServerError(RuntimeError):
    """The server cannot be asked, or its answer is none. One line."""


class Refused(ServerError):
    """An answer with an HTTP error status. `content` is its JSON, or its text where it is none."""

    def __init__(self, line: str, status: int, content: Any) -> None:
        super().__init__(line)
        self.status, self.content = status, content
        self.words = content if isinstance(content, str) else json.dumps(content)


class TooLate(Exception):
    """No byte within so many seconds."""


class Transport:
    """Asks one server. `key` goes into the Authorization header; it is in no message."""

    def __init__(self, url: str, key: str | None = None, limits: Limits = SERVER) -> None:
        self.url, self.key, self.limits = url, key, limits
        self.headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.verify = httpx.create_ssl_context()
        self.proxy = proxy_of(url)

    def ask(self, url: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """The JSON that `url` answers: to a GET, or to a POST of `body`. Raises Refused and ServerError."""
        limit = min(seconds or self.limits.answer_s, self.limits.answer_s)
        try:
            status, target, content = asyncio.run(asyncio.wait_for(self._exchange(url, body), limit))
        except TooLate:
            why = f"gave no answer within {self.limits.first_byte_s:g} s: a larger --first_byte_s waits"
            raise self._error(url, why) from None
        except asyncio.TimeoutError:
            more = "" if seconds else ": a larger --answer_s waits"
            raise self._error(url, f"gave no whole answer within {limit:g} s{more}") from None
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
        method, content = "GET" if body is None else "POST", bytearray()
        options: dict[str, Any] = {"verify": self.verify, "headers": self.headers, "timeout": None}
        async with httpx.AsyncClient(**options, trust_env=self.proxy is not None) as client:
            request = client.build_request(method, url, json=body)
            try:
                response = await asyncio.wait_for(client.send(request, stream=True), self.limits.first_byte_s)
            except asyncio.TimeoutError:
                raise TooLate from None
            packed = response.headers.get("content-encoding", "identity")
            if packed.lower() != "identity":
                raise self._error(url, f"answers packed as {self._shown(packed)}, which it was not asked for")
            most = self.limits.answer_bytes if response.status_code < 400 else REFUSAL_BYTES
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > most and response.status_code < 400:
                    raise self._error(url, f"answers more than {most / 2**20:g} MiB: a larger --answer_mb lets it")
                if len(content) > most:
                    break
            await response.aclose()
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


def proxy_of(url: str) -> str | None:
    """The proxy by which the environment has this address asked; None: there is none, or the server is this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if HERE.fullmatch(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def line(text: str) -> str:
    """A server's words as one short line that a terminal only prints."""
    flat = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in flat)[:SHOWN_CHARACTERS]
