"""What transformers and the other libraries are given of a stranger's folder: files that passed the gate, in limits.

A tokenizer.json whose rules are of no known form is tried in a process of its own before transformers runs it, text by
text; a chat template is rendered by transformers itself in a forked process, which is ended at a limit.

    guard = guard_folder(Path("Llama-3.2-1B"))       # raises Unusable
    guard.text("Hello")                             # before each text that transformers encodes
"""

import contextlib
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from nanollama import gate
from nanollama.gate import CheckpointError, documents
from nanollama.gate.tokenizers import Guard, is_known, load
from reference.files.weights import Unusable, through_gate

# What transformers looks for in a folder by itself. Weights are no documents and have checks of their own.
DOCUMENTS: tuple[str, ...] = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
DOCUMENTS += ("generation_config.json", "chat_template.json", "processor_config.json", "preprocessor_config.json")
TEXTS = ("chat_template.jinja", "merges.txt", "tokenizer.model")
TEMPLATE_S, TEMPLATE_BYTES = 10.0, 4 << 20
TEMPLATE_MEMORY = 1 << 30  # beside what the process has


class TextGuard:
    """The limits of one tokenizer; without a guard, of a known form, every text passes."""

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard

    def text(self, text: str) -> None:
        """Raises Unusable for a text of which the tokenizer's rules would make too much."""
        self._ask(lambda guard: guard.check(text=text))

    def ids(self, ids: list[int]) -> None:
        """The same of a list of ids that is to be decoded."""
        self._ask(lambda guard: guard.check(ids=list(ids)))

    def _ask(self, check: Callable[[Guard], None]) -> None:
        try:
            if self.guard is not None:
                check(self.guard)
        except CheckpointError as error:
            raise Unusable(str(error)) from None


def guard_folder(folder: Path) -> TextGuard:
    """Every file that transformers may open there, checked. Raises Unusable, which names the file."""
    for name in DOCUMENTS:
        if _is_there(folder / name):
            found = through_gate(documents.read_json, folder / name)
            if found.get("auto_map") and name != "config.json":
                raise Unusable(f"{folder / name}: names code of its own for its tokenizer (auto_map), which is not run")
    for name in TEXTS:
        if _is_there(folder / name):
            through_gate(documents.read_bytes, folder / name)
    for template in sorted((folder / "additional_chat_templates").glob("*")):
        through_gate(documents.read_bytes, template)
    path = folder / "tokenizer.json"
    return guard_file(path) if _is_there(path) else TextGuard()


def guard_file(path: Path) -> TextGuard:
    """A tokenizer.json by itself. Raises Unusable."""
    data = through_gate(documents.read_bytes, path)
    try:
        return TextGuard(None if is_known(load(data, path)) else Guard(data, path))
    except CheckpointError as error:
        raise Unusable(str(error)) from None


def _is_there(path: Path) -> bool:
    through_gate(gate.require_file, path)
    return path.is_file()


def limited(make: Callable[[], str | None], where: Path, seconds: float = TEMPLATE_S) -> str | None:
    """What `make` returns, made in a forked process that is ended at its limits; None where it raises.

    Raises Unusable, which begins with `where`, for more than `seconds`, TEMPLATE_BYTES of text, or TEMPLATE_MEMORY.
    """
    if not hasattr(os, "fork"):
        return make()
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # torch's threads are not needed there
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render(make, writer)
    os.close(writer)
    try:
        said = _receive(reader, seconds)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not said.endswith(b"."):
        raise Unusable(
            f"{where}: its chat template takes more than {seconds:g} s, or more memory than a template needs"
        )
    found = said[1:-1].decode("utf-8", "surrogatepass") if said[:1] == b"T" else None
    if found is not None and len(found) > TEMPLATE_BYTES:
        raise Unusable(f"{where}: its chat template makes more than {TEMPLATE_BYTES:,} characters")
    return found


def _receive(reader: int, seconds: float) -> bytes:
    """All that comes until the other side closes; nothing where that is too much or too late."""
    said, deadline = bytearray(), time.monotonic() + seconds
    while len(said) <= 5 * TEMPLATE_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            break
        if not (part := os.read(reader, 1 << 16)):
            return bytes(said)
        said += part
    return b""


def _render(make: Callable[[], str | None], writer: int) -> None:
    """In the child: never returns."""
    try:
        _limit_memory()
        said = b"N."
        try:
            if (text := make()) is not None:
                said = b"T" + text[: TEMPLATE_BYTES + 1].encode("utf-8", "surrogatepass") + b"."
        except MemoryError:
            said = b""
        except Exception:  # what a template raises is its own business: it may know no system message
            pass
        while said:
            said = said[os.write(writer, said) :]
    finally:
        os._exit(0)


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + TEMPLATE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
