"""The commands that a Markdown page tells its reader to type, and the files that it shows.

A fenced block without a language, or of `sh` or `bash`, holds commands: a line that begins with a program that is
typed in these docs; other lines are what it prints. A block of Python whose first line is `# NAME.py` is a file. A
comment `<!-- needs WHAT: WHY -->` in front of a block says what it takes that not everybody has.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("python", "pip", "make", ".", "nanollama", "parity", "finetune", "pytest", "torchrun", "uvx", "cd", "cc")
BLOCK = re.compile(r"(?:<!-- needs ([^:]+): (.+?) -->\n+)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/.-]+\.py)\n")


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
