"""The commands that a Markdown page tells its reader to type, and the files that it shows.

A fenced block without a language, or of `sh` or `bash`, holds commands: a line that begins with a program that is
typed in these docs; other lines are what it prints. A block of Python whose first line is `# NAME.py` is a file. A
comment `<!-- needs WHAT: WHY -->` in front of a block says what it takes that not everybody has.
"""

import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = (
    "python",
    "pip",
    "make",
    ".",
    "nanollama",
    "parity",
    "finetune",
    "pytest",
    "torchrun",
    "srun",
    "uvx",
    "cd",
    "cc",
)
BLOCK = re.compile(r"(?:<!-- needs ([^:]+): (.+?) -->\n+)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/.-]+\.py)\n")
OURS = re.compile(r"(?:nanollama|parity|finetune|reference|benchmarks)(?:\.[a-z_]+)*$")  # finetune.NAME is none


@dataclass(frozen=True)
class Typed:
    """One command as printed. `needs`: what it takes that not everybody has, and why, or None."""

    text: str
    line: int  # of the block, in the page
    needs: tuple[str, str] | None = None

    @property
    def stays(self) -> bool:
        """Whether it runs on beside what is typed next."""
        return shlex.split(self.text, comments=True)[-1] == "&"

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text, comments=True)
        return words[:-1] if self.stays else words


@dataclass(frozen=True)
class Shown:
    """A file that the page shows."""

    name: str
    text: str


def read_page(page: Path) -> Iterator[Typed | Shown]:
    """In the order of the page."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        what, why, language, body = found.groups()
        if language == "python" and (name := FILE.match(body)):
            yield Shown(name[1], body)
        if language in ("", "sh", "bash", "console"):
            line = text.count("\n", 0, found.start(4)) + 1
            for command in commands_of(body):
                yield Typed(command, line, (what, why) if what else None)


def commands_of(body: str) -> Iterator[str]:
    """Lines that are typed, continued ones as one."""
    for line in body.replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ").strip()
        first = next((word for word in line.split() if not re.match(r"[A-Z_]+=", word)), "")
        if first in PROGRAMS or first.startswith((".venv/", "./")):
            yield line


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module of ours that `python -m`, torchrun or a console script runs, and its words."""
    words = words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words)) :]
    if "-m" in words[1:] and re.search(r"(^|/)(python[\d.]*|torchrun|srun)$", words[0]):
        at = words.index("-m") + 1
        return (words[at], words[at + 1 :]) if at < len(words) and OURS.match(words[at]) else None
    if words[:1] == ["nanollama"] and len(words) > 1:
        return "nanollama", words[1:]
    if words and words[0] in ("parity", "finetune") and importlib.util.find_spec(".".join(words[:2])):
        return ".".join(words[:2]), words[2:]
    return None


def exit_code(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Of `python -m MODULE WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0
