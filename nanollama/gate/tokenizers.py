"""tokenizer.json, checked before a library sees it; what is not of a known form runs within limits first.

Its normalizer, pre-tokenizer and decoder are programs of strangers: a rule may double a text sixty times, a regular
expression may backtrack for years, a panic ends no `except Exception`. The forms that Llamas have are known to be
linear and run at once. Any other text goes through a process of its own first (worker.py), which the system stops.

    from nanollama.gate.tokenizers import Guard, is_known, load
    content = load(data, path)
    guard = None if is_known(content) else Guard(data, path)
    if guard: guard.check(text="Hello")     # raises CheckpointError
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from nanollama import gate
from nanollama.gate import CheckpointError

GROWTH = 8  # bytes out for each byte in
LOAD_S, TEXT_S, S_PER_MB = 10.0, 1.0, 1.0  # of the worker's CPU; the clock on the wall has ten times as long
MAX_NESTED = 32  # of normalizers and the like: Rust's recursion is not limited
MAX_RULE_CHARS = 4096  # of a rule's text
MAX_STEPS = 64  # of normalizers and the like
MAX_TOKEN_BYTES = 65_535  # Llama 2's longest is 27
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT = r"\p{N}"
PATTERNS = frozenset((GPT2, LLAMA3, QWEN2, TEKKEN))
# One class of characters, repeated or not: nothing to backtrack into.
SIMPLE = re.compile(r"(\\[dDsSwW]|\\p\{\w+\}|\[[^\[\]\\]+\]|[^\\()\[\]{}*+?|^$.])([+*]|\{\d(,\d?)?\})?")
# Steps that take time and room in proportion to the text, whatever their settings.
LINEAR = frozenset(
    ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt")
    + ("ByteLevel", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation", "BertPreTokenizer", "Metaspace")
    + ("ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "CharDelimiterSplit", "UnicodeScripts")
    + ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
)


def load(data: bytes, where: str | Path) -> dict[str, Any]:
    """The content of a tokenizer.json within its limits. Raises CheckpointError that begins with `where`."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise CheckpointError(where, "not a usable tokenizer.json: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise CheckpointError(where, f"not a usable tokenizer.json: not valid JSON: {gate.reason(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(where, 'JSON, but no tokenizer: it has no "model"')
    steps = 0
    for name in STEPS:
        steps += _check_step(content.get(name), name, where)
    if steps > MAX_STEPS:
        raise CheckpointError(
            where, f"its normalizer, pre_tokenizer and decoder have {steps} steps: at most {MAX_STEPS}"
        )
    for key, value in content["model"].items():
        if isinstance(value, str) and len(value) > MAX_RULE_CHARS:
            raise CheckpointError(where, f"its model's {key[:40]} has {len(value):,} characters: refused")
    vocabulary = content["model"].get("vocab")
    pairs = vocabulary if isinstance(vocabulary, list) else ()
    names = vocabulary if isinstance(vocabulary, dict) else [v[0] for v in pairs if isinstance(v, list) and v]
    longest = max((len(name) for name in names if isinstance(name, str)), default=0)
    if longest > MAX_TOKEN_BYTES:
        raise CheckpointError(where, f"it has a token of {longest:,} characters: at most {MAX_TOKEN_BYTES:,} are read")
    return content


def _check_step(step: Any, name: str, where: str | Path) -> int:
    """How many steps there are in one; raises CheckpointError beyond the limits of depth and length."""
    if step is not None and not isinstance(step, (dict, list)):
        raise CheckpointError(where, f"its {name} is {gate.shown(step)}, not an object: get this file again")
    layer, steps = [] if step is None else [step], 0
    for _ in range(MAX_NESTED + 1):
        inner: list[Any] = []
        for item in layer:
            steps += isinstance(item, dict) and isinstance(item.get("type"), str) and item["type"] != "SpecialToken"
            for key, value in item.items() if isinstance(item, dict) else enumerate(item):
                if isinstance(value, str) and len(value) > MAX_RULE_CHARS and key != "precompiled_charsmap":
                    raise CheckpointError(where, f"its {name} has a text of {len(value):,} characters: refused")
                if isinstance(value, (dict, list)):
                    inner.append(value)
        layer = inner
        if not layer:
            return steps
    raise CheckpointError(where, f"its {name} is nested more than {MAX_NESTED} deep")


def is_known(content: dict[str, Any]) -> bool:
    """Whether all that it does to a text is of a form that takes time and room in proportion."""
    return all(_growth(content.get(name)) <= GROWTH for name in STEPS)


def _growth(step: Any) -> float:
    """How many times as long a text can become, rules after one another multiplied; infinite where it is not known."""
    if step is None:
        return 1.0
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return float("inf")
    kind, pattern = step["type"], step.get("pattern")
    if kind == "Sequence":
        grown = 1.0
        for inner in (part for key in step if isinstance(step[key], list) for part in step[key]):  # of every list:
            grown *= _growth(inner)  # the library knows one by its name, and passes over the others
        return grown
    if kind == "Prepend":
        return 1.0 if len(str(step.get("prepend"))) <= 8 else float("inf")
    if not isinstance(pattern, dict):
        return 1.0 if kind in LINEAR else float("inf")
    text, regex, content = pattern.get("String"), pattern.get("Regex"), step.get("content")
    if kind == "Split":
        return 1.0 if isinstance(text, str) or _is_linear(regex) else float("inf")
    if kind == "Replace" and isinstance(content, str) and isinstance(text, str) and text:
        return max(1.0, len(content.encode()) / len(text.encode()))
    return float("inf")


def _is_linear(regex: Any) -> bool:
    return isinstance(regex, str) and (regex in PATTERNS or SIMPLE.fullmatch(regex) is not None)


class Guard:
    """A process that runs each text before it is run here, with limits of CPU time, memory and growth."""

    def __init__(self, data: bytes, where: str | Path) -> None:
        self.data, self.where = data, where
        self.owner = 0  # a forked process starts a worker of its own
        self.start()

    def start(self) -> None:
        """Raises CheckpointError where the library does not load the file within its limits."""
        if os.name != "posix":
            what = "its normalizer, pre_tokenizer or decoder is of no known form, and this system limits no process"
            raise CheckpointError(self.where, f"{what}: open it on Linux or macOS")
        ours, theirs = socket.socketpair()
        with theirs:
            line = [sys.executable, "-m", "nanollama.gate.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(
                line, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env=_environment(),
            )  # fmt: skip
        self.owner, self.door = os.getpid(), ours
        self.end = weakref.finalize(self, _end, self.process, ours, self.owner)
        self.ask(self.data, LOAD_S + S_PER_MB * len(self.data) / 1e6, "it cannot be loaded")

    def check(self, *, text: str | None = None, ids: list[int] | None = None) -> None:
        """Encode the text, or decode the ids. Raises CheckpointError beyond a limit; nothing is returned."""
        if os.getpid() != self.owner:
            self.start()
        request = json.dumps({"text": text, "ids": ids}).encode()
        self.ask(request, TEXT_S + S_PER_MB * len(request) / 1e6, "a text")

    def ask(self, request: bytes, cpu_s: float, what: str) -> None:
        said = ""
        try:
            self.door.settimeout(10 * (LOAD_S + cpu_s))  # a process that waits for the CPU is not ended for that
            self.door.sendall(len(request).to_bytes(8, "little") + int(cpu_s * 1000).to_bytes(8, "little") + request)
            said = self.door.recv(400).decode("utf-8", "replace")
        except OSError:
            pass
        if said == "ok":
            return
        self.end()
        limits = f"{what} takes more than {cpu_s:.3g} s, {GROWTH} times its length, or more memory than is allowed"
        raise CheckpointError(self.where, f"not a usable tokenizer.json: {gate.reason(ValueError(said or limits))}")


def _environment() -> dict[str, str]:
    """This package is found there as it was here."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}


def _end(process: subprocess.Popen[bytes], door: socket.socket, owner: int) -> None:
    door.close()
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
