"""Where in a port's repository a report belongs: the candidate's file, and the line of what it is about.

    place_of(report, Path("my_port.py"))       # Place(file=PosixPath('my_port.py'), line=41, name='rotate')

A crash names its own line. Else the line is that of the first function or class that is named after the tap that
departs first, or of the method that a failing check asks; where there is none, line 1.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parity.candidates.interface import METHODS
from parity.candidates.limits import split_limits
from parity.contract import Result, Status
from parity.report.model import Report

SOURCE_BYTES = 1 << 22  # a larger file is no source
OWN_LINE = re.compile(r"([\w./-]+\.\w+):(\d+)")  # my_port.py:17, src/main.rs:12:5, as languages tell where they stopped
# A line that defines something, in the languages of ports: def f, class F, fn f, func f, function f, void f(, float *f(
DEFINED = re.compile(
    r"^\s*(?:(?:export|pub|public|private|static|inline|const|async|template<[^>]*>|unsafe)\s+)*"
    r"(?:(?:def|class|fn|func|function|struct|impl|fun|sub|proc)\s+(?:\([^)]*\)\s*)?(\w+)"
    r"|(?:void|int|float|double|auto|bool|size_t|[A-Z]\w*)\s*[*&]*\s+[*&]*(\w+)\s*\()"
)
NORM, ATTENTION, FFN = ("norm",), ("attention", "attn", "sdpa"), ("feed_forward", "feedforward", "mlp", "ffn", "swiglu")
# Tap -> what ports call the code that makes it, the nearest first.
NAMES = {
    "embed": ("embed",),
    "attn_norm": NORM,
    "ffn_norm": NORM,
    "final_norm": NORM,
    **dict.fromkeys(("q", "k", "v"), ("project", "qkv", *ATTENTION)),
    **dict.fromkeys(("q_rope", "k_rope"), ("rope", "rotary", "rotate", "freq")),
    **dict.fromkeys(("attn_mix", "attn_out"), ATTENTION),
    **dict.fromkeys(("gate", "up", "ffn_mix", "ffn_out"), FFN),
    "out": ("block", "layer"),
}


@dataclass(frozen=True)
class Place:
    """A file, a line in it, and what stands there; `name` is None where the line is only the file's first."""

    file: Path
    line: int = 1
    name: str | None = None


def source_of(candidate: str) -> Path | None:
    """The file that a candidate's name leads to; None where there is none: a server, a program that is no file."""
    _, name = split_limits(candidate)
    kind, _, rest = name.partition(":")
    if name.startswith(("http://", "https://")) or name == "nanollama":
        return None
    if kind == "cmd":
        return next((Path(word) for word in _words(rest) if Path(word).is_file()), None)
    if kind == "hf":
        config = Path(rest) / "config.json"
        return config if rest and config.is_file() else None
    if kind == "env":
        name = " ".join(_words(rest)[1:])
    elif kind == "torch":
        name = rest
    return _file_of(name.rpartition(":")[0] or name)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _file_of(module: str) -> Path | None:
    """A file by its path, or of a dotted module, which is not imported."""
    dotted = Path(*module.split(".")) if module and not module.startswith(".") else Path(module)
    tries = (Path(module), dotted.with_suffix(".py"), dotted / "__init__.py")
    return next((path for path in (*tries, *(Path("src") / t for t in tries)) if path.is_file()), None)


def place_of(report: Report, file: Path) -> Place:
    """The place of what is wrong first."""
    bad = [r for r in report.results if r.status in (Status.FAIL, Status.ERROR)]
    if crashed := next(filter(None, (own_line(r, file) for r in bad)), None):
        return crashed
    first = report.first_divergence
    asked = [m.name for r in bad for m in METHODS if m.check == r.check and m.name != "__call__"]
    words = NAMES.get(first.tap.rpartition(".")[2], ()) if first else ()
    defined = list(definitions(file))
    for word in words:
        for line, name in defined:
            if word in name.lower():
                return Place(file, line, name)
    for line, name in defined if not words else ():
        if name in asked:
            return Place(file, line, name)
    return Place(file)


def own_line(r: Result, file: Path) -> Place | None:
    """The line where the candidate stopped, as its error says: in its file or a neighbour, or one by its path."""
    for found in OWN_LINE.finditer(r.reason or ""):
        said = Path(found[1])
        for path in (file.with_name(said.name), said):
            theirs = path is said and not path.resolve().is_relative_to(Path.cwd())  # a library's
            if path.is_file() and not theirs:
                return Place(path, max(1, int(found[2][:9])), found[0])
    return None


def definitions(file: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of what a source file defines, by the look of its lines; nothing of what is no text."""
    if not file.is_file() or file.stat().st_size > SOURCE_BYTES:
        return
    data = file.read_bytes()
    if b"\0" in data:
        return
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if found := DEFINED.match(line[:400]):
            yield number, found[1] or found[2]
