"""Rows and documents that cannot be used: counted, listed, and said in the same words whatever they were read from.

left_out = LeftOut()
left_out.add("--data notes.jsonl line 3: not JSON")
left_out.report("documents", "skip", print)     # data: 1 of 1 documents cannot be used and are left out:
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from finetune.data.files import NAMED, Say, write_atomically
from finetune.errors import UserError
from nanollama.printable import printable

OnBad = Literal["stop", "skip"]
KEPT = 10_000  # lines that are remembered; the rest is counted
NAMED_AT_STOP = 100  # lines that a run which stops lists: all that are to be mended, within reason
NAME = "left_out.json"


@dataclass
class LeftOut:
    """What was seen of some data, and what of it cannot be used."""

    lines: list[str] = field(default_factory=list)  # place and reason of each, the first KEPT
    count: int = 0
    seen: int = 0  # documents, those that cannot be used included
    empty: int = 0  # rows whose text is empty or null

    def add(self, line: str) -> None:
        self.count += 1
        self.seen += 1
        if len(self.lines) < KEPT:
            self.lines.append(line)

    def merge(self, other: "LeftOut") -> None:
        """Count another's along."""
        self.count, self.seen, self.empty = self.count + other.count, self.seen + other.seen, self.empty + other.empty
        self.lines += other.lines[: KEPT - len(self.lines)]

    def report(self, kind: str, on_bad: OnBad, say: Say, listed_in: Path | None = None) -> None:
        """Say what is left out. kind: "documents"; listed_in: the file that lists all of them.

        Raises UserError, of the first one, where the run is to stop.
        """
        if self.empty:
            say(f"data: {self.empty:,} rows have an empty text or none: left out")
        if not self.count:
            return
        many = f"{self.count:,} of {self.seen:,} {kind} cannot be used"
        named = self.lines[: NAMED if on_bad == "skip" else NAMED_AT_STOP]
        if self.count > 1 or on_bad == "skip":
            more = f"; the first {len(named)}" if self.count > len(named) else ""
            where = f" (all of them: {listed_in})" if more and listed_in else ""
            say(f"data: {many}{' and are left out' if on_bad == 'skip' else ''}{more}{where}:")
            for line in named:
                say(f"  {printable(line)}")
        if on_bad == "stop":
            raise UserError(f"{named[0]} ({many}; --on_bad skip leaves {'it' if self.count == 1 else 'them'} out)")

    def write(self, folder: Path) -> Path:
        """All of it as FOLDER/left_out.json."""
        write_atomically(folder / NAME, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())
        return folder / NAME


def read_left_out(folder: Path) -> LeftOut:
    """What `LeftOut.write` wrote; nothing was left out where there is no such file."""
    path = folder / NAME
    return LeftOut(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else LeftOut()
