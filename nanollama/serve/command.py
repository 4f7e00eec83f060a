"""`nanollama serve`: a checkpoint behind OpenAI's completions interface, on this machine unless told otherwise.

$ python -m nanollama.serve --ckpt Meta-Llama-3.1-8B-Instruct
serving Meta-Llama-3.1-8B-Instruct at http://127.0.0.1:8000/v1 (context 8,192 of 131,072 tokens; Ctrl-C ends it)
"""

import importlib.util
import ipaddress
import itertools
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanollama.cli import UsageError
from nanollama.options import Drawing, ModelOptions, say

if TYPE_CHECKING:
    from nanollama.serve.app import Service

LOCAL = ("127.0.0.1", "localhost", "[::1]")
CONTEXT_TOKENS = 8192  # where nobody says: a cache of 1 GiB for an 8B in bf16, and the caller chooses how much of it


@dataclass(frozen=True)
class Door:
    """The flags of who may ask, where, and for how much."""

    host: str = "127.0.0.1"  # address to listen on; another than this machine's own needs --api_key_env
    port: int = 8000  # 0: any that is free
    name: str = ""  # of the model, in requests and answers; default: that of the checkpoint's file or folder
    api_key_env: str = ""  # environment variable that holds the key which clients have to send; default: no key
    without_key: bool = False  # listen on other addresses though there is no key: whoever reaches them is answered
    context: int | None = None  # tokens of a prompt and its answer, at most; default: the model's, up to 8192
    waiting: int = 16  # requests that may wait while one is answered; more are told to come again
    body_mb: float = 4.0  # largest request, in MiB

    def key(self) -> str | None:
        """What clients have to send. Raises UsageError for flags that cannot be meant."""
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port {self.port}: expected 0 (any) to 65535")
        if self.context is not None and self.context < 1:
            raise UsageError(f"--context {self.context}: expected 1 token or more")
        if self.waiting < 0:
            raise UsageError(f"--waiting {self.waiting}: expected 0 or more")
        if not 0 < self.body_mb <= 1024:
            raise UsageError(f"--body_mb {self.body_mb:g}: expected more than 0, up to 1024")
        key = read_key(self.api_key_env) if self.api_key_env else None
        if key is None and not self.without_key and not is_local(self.host):
            raise UsageError(
                f"--host {self.host} is reached from other machines: give --api_key_env NAME, the variable that holds "
                "a key, or --without_key to answer anybody"
            )
        return key


def serve(
    ckpt: str,  # Meta folder, Hugging Face folder or hub id, .gguf or .bin
    *,
    door: Door = Door(),
    drawing: Drawing = Drawing(max_new_tokens=1024, temperature=1.0),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Answer requests of OpenAI's shape: /v1/completions, /v1/chat/completions, /v1/models. One at a time."""
    require_extra()
    key = door.key()
    if model.tp != 1:
        raise UsageError("--tp: one process serves; leave it out, or use generate under torchrun")
    # Before the model is loaded: an address that is taken is known at once, and whoever asks meanwhile waits.
    with listen(door.host, door.port) as listening:
        from nanollama.serve.app import Server

        service = load(ckpt, door, key, drawing, model)
        reader = service.reader
        place = f"http://{f'[{door.host}]' if ':' in door.host else door.host}:{listening.getsockname()[1]}/v1"
        most = reader.llama.config.max_seq_len
        held = f"context {reader.context_tokens:,} of {most:,} tokens"
        say(f"serving {reader.name} at {place} ({held}; Ctrl-C ends it)")
        try:
            Server(service).run(sockets=[listening])
        except KeyboardInterrupt:  # how a server ends
            pass
        finally:
            service.engine.end()
            service.engine.join(10.0)
        say("ended")


def load(ckpt: str, door: Door, key: str | None, drawing: Drawing, model: ModelOptions) -> "Service":
    """The model behind everything that is asked. Raises ValueError, one line."""
    from nanollama.generation.llama import Sampling
    from nanollama.serve.app import Service
    from nanollama.serve.engine import Engine
    from nanollama.serve.request import Reader

    Sampling(**vars(drawing))  # raises ValueError for what is out of range
    llama = model.load(ckpt)
    most = llama.config.max_seq_len
    if door.context is not None and door.context > most:
        raise UsageError(f"--context {door.context}: the model's is {most}")
    seeds = itertools.count(drawing.seed)
    size = door.context or min(most, CONTEXT_TOKENS)
    reader = Reader(llama, door.name or model_name(ckpt), size, drawing, lambda: next(seeds))
    hosts = None if key or door.without_key else (*LOCAL, door.host)
    return Service(reader, Engine(llama.model.layers, door.waiting), int(door.body_mb * 2**20), key, hosts)


def require_extra() -> None:
    """Raises UsageError without the packages of the extra."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"serving needs the package {package}: pip install 'llama-parity[serve]'")


def read_key(variable: str) -> str:
    """The key that an environment variable holds. Raises UsageError, which shows neither: it may be the key itself."""
    key = os.environ.get(variable, "").strip() if re.fullmatch(r"[A-Za-z_]\w*", variable) else ""
    if not key:
        raise UsageError(
            "--api_key_env: expected the name of an environment variable that holds the key; it holds none"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            "--api_key_env: what the variable holds cannot be a key: it has spaces or characters beyond ASCII"
        )
    return key


def is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Raises UsageError for an address that cannot be listened on."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None


def model_name(ckpt: str) -> str:
    """Of a folder or file its name, with nothing of where it is; a hub id as it stands."""
    path = Path(ckpt)
    return path.resolve().name if path.exists() else ckpt
