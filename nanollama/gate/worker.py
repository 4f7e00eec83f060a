"""The process in which a tokenizer.json of no known form runs first: `Guard` in tokenizers.py starts it.

What the library does there is stopped by the system and not by the library: an interval timer of CPU time whose signal
ends the process, a limit of its memory. It answers "ok", or in one line what was wrong; a process that ended says no
more.

    python -m nanollama.gate.worker FD      # a socket: eight bytes of length, eight of milliseconds, the request
"""

import contextlib
import json
import signal
import socket
import sys
from typing import Any

GROWTH = 8  # as the guard's
SLACK_BYTES = 1024  # of a short text's growth
MEMORY_BYTES = 1 << 30  # beside what the file itself takes


def main(fd: int) -> None:
    door = socket.socket(fileno=fd)
    data, milliseconds = _receive(door)
    _limit_memory(len(data))
    _limit_time(milliseconds)
    backend: Any = None
    try:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_buffer(data.removeprefix(b"\xef\xbb\xbf"))
        backend.no_truncation()
        backend.no_padding()
        answer = "ok"
    except BaseException as error:  # a panic of Rust's is no Exception
        answer = _line(error)
    while True:
        door.sendall(answer.encode("utf-8", "replace")[:400])
        request, milliseconds = _receive(door)
        _limit_time(milliseconds)
        try:
            answer = check(backend, json.loads(request))
        except BaseException as error:
            answer = _line(error)


def check(backend: Any, request: dict[str, Any]) -> str:
    """ "ok", or which limit is broken."""
    if request["text"] is None:
        pieces = sum(len((backend.id_to_token(i) or "").encode()) for i in request["ids"])
        grown = len(backend.decode(request["ids"], skip_special_tokens=False).encode())
        return "ok" if grown <= GROWTH * pieces + SLACK_BYTES else f"decoding makes {grown:,} bytes of {pieces:,}"
    text = request["text"].encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    limit = GROWTH * len(text.encode()) + SLACK_BYTES
    grown = len(backend.normalizer.normalize_str(text).encode()) if backend.normalizer else 0
    if grown > limit:
        return f"its normalizer makes {grown:,} bytes of {len(text.encode()):,}"
    for plain in (True, False):  # special tokens' names as text, and as tokens
        backend.encode_special_tokens = plain
        count = len(backend.encode(text, add_special_tokens=False).ids)
        if count > limit:
            return f"encoding makes {count:,} tokens of {len(text.encode()):,} bytes"
    return "ok"


def _receive(door: socket.socket) -> tuple[bytes, int]:
    """The next request, and its milliseconds; ends the process when the other side is gone."""
    head = _exactly(door, 16)
    return _exactly(door, int.from_bytes(head[:8], "little")), int.from_bytes(head[8:], "little")


def _exactly(door: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = door.recv(min(1 << 20, size - len(parts)))
        if not part:
            sys.exit(0)
        parts += part
    return bytes(parts)


def _limit_time(milliseconds: int) -> None:
    """SIGPROF's own action ends the process; the timer counts the time that it computes, here and in the kernel."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, milliseconds / 1000)


def _limit_memory(file_bytes: int) -> None:
    import resource

    limit = MEMORY_BYTES + 40 * file_bytes
    with contextlib.suppress(ValueError, OSError):  # macOS takes no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        raise error
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


if __name__ == "__main__":
    main(int(sys.argv[1]))
