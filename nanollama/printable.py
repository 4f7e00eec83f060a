"""What a stranger's file or server may put before a person: control characters spelled out, long values cut.

Names of tensors, keys, tokens and models come from files; a terminal obeys the escape sequences in them, a log takes
their line feeds for lines of its own, an editor turns the text around at a bidirectional override.

    >>> printable("layers\x1b[2J\n0")
    'layers\\u001b[2J\\u000a0'

`printable` is for a value inside a line, `printed` stands before the streams while a command runs: there a line feed is
one, a tab too, and the text of a model streams as it is but for what would steer the terminal.
"""

import dataclasses
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO, TypeVar, cast

VALUE_CHARACTERS = 400  # of one value
WORD_CHARACTERS = 500  # of one word in an error: above the longest path in use
LINE_CHARACTERS = 4000  # of an error
# C0 without \t, \n and \r, DEL, C1, what turns the direction of text, and halves of surrogate pairs.
STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")
MOVES = re.compile("(\x1b\\[A|\n)*")  # what a progress bar writes by itself, to get to its line
T = TypeVar("T")


def printable(text: object, limit: int = VALUE_CHARACTERS) -> str:
    """One line that a terminal only shows: what is not printable is spelled \\uXXXX, the middle of a long text cut."""
    text = cut(str(text), limit)
    return text if text.isprintable() else "".join(c if c.isprintable() else spell(c) for c in text)


def spell(character: str) -> str:
    """As JSON spells it, so that JSON stays JSON."""
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def cut(text: str, limit: int) -> str:
    """Its two ends, and how many characters were between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}...({len(text) - 2 * half:,} characters more)...{text[-half:]}"


def printable_all(value: T) -> T:
    """A report with every text in it printable: in lists, dicts (keys too) and dataclasses."""
    found: Any = value
    if type(found) is str:
        found = printable(found, LINE_CHARACTERS)
    elif type(found) is list:
        found = [printable_all(entry) for entry in found]
    elif type(found) is tuple:
        found = tuple(printable_all(entry) for entry in found)
    elif type(found) is dict:
        found = {printable_all(key): printable_all(entry) for key, entry in found.items()}
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        texts = {f.name: printable_all(getattr(found, f.name)) for f in dataclasses.fields(found) if f.init}
        found = dataclasses.replace(found, **texts)
    return cast(T, found)


def error_line(error: object) -> str:
    """What a user is told of an error: one line, no value in it longer than it can be read."""
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}", LINE_CHARACTERS)
    words = str(error)[: 1 << 20].split()  # of a message that holds a whole file
    return printable(" ".join(cut(word, WORD_CHARACTERS) for word in words), LINE_CHARACTERS)


def complain(error: object, more: str = "") -> None:
    """`error: ...` on stderr."""
    print(f"error: {error_line(error)}{more}", file=sys.stderr)


# --- Streams ---------------------------------------------------------------------------------------------------------


class Printed:
    """A text stream that spells out what would steer a terminal, and what its encoding does not have.

    bars: progress bars go through it, whose lines begin with a carriage return.
    """

    def __init__(self, stream: TextIO, bars: bool = False) -> None:
        self.stream, self.bars, self.held = stream, bars, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Of a text that comes in pieces, a carriage return waits for its line feed."""
        text = self.held + text
        self.held = "\r" if text.endswith("\r") and not self.bars else ""
        begins = "\r" if self.bars and text.startswith("\r") else ""
        text = text[len(begins) : len(text) - len(self.held)]
        if not (self.bars and MOVES.fullmatch(text)):
            text = STEERING.sub(lambda found: spell(found.group()), text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        if not text.isascii():
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        self.stream.write(begins + text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Write what was held back."""
        if self.held:
            self.held = ""
            self.stream.write(spell("\r"))


@contextmanager
def printed() -> Iterator[None]:
    """Inside, and in the traceback that ends the process, nothing reaches the user's terminal but text."""
    sys.excepthook = show_traceback
    streams = sys.stdout, sys.stderr
    if any(stream is None or isinstance(stream, Printed) for stream in streams):
        yield
        return
    out, err = Printed(streams[0]), Printed(streams[1], bars=True)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        out.end()


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of an error of ours: it holds what was read from files, too."""
    with printed():
        traceback.print_exception(kind, error, trace)
