"""A candidate that is any program: it reads requests from its standard input, one a line, and answers each with a line.

    python -m parity.check --candidate "cmd:./my_port {ckpt} {dtype}"

`{ckpt}`, `{dtype}` (fp32, bf16, fp16) and `{device}` are filled in; the program runs once for each dtype. Requests:

    can                        ok logits taps    what it answers: logits, and taps or not
    logits FILE 128000 9906    ok                FILE holds the logits of all T tokens: (T, V) float32, little-endian
    taps FOLDER 128000 9906    ok                FOLDER/layers.0.q.f32 and so on, the shapes of docs/parity.md

`error TEXT` in place of `ok` ends the run and becomes its reason. What the program writes to stderr is shown when it
ends before its input does.
"""

import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanollama.checkpoint import open_checkpoint
from parity.contract import DTYPES, UsageError

WITH_HEADS = (".q", ".k", ".v", ".q_rope", ".k_rope")


def command_loader(line: str) -> Callable[[str, torch.dtype, str], "Command"]:
    """load(checkpoint, dtype, device) of a program's command line. Raises UsageError where there is no such program."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"candidate cmd:{line}: {error}") from error
    if not words:
        raise UsageError("candidate cmd: names no program; expected cmd:PROGRAM ARGUMENT ...")
    if shutil.which(words[0]) is None:
        raise UsageError(f"candidate cmd:{line}: there is no program {words[0]!r}, or it may not be run")

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Command:
        name = next(name for name, kind in DTYPES.items() if kind == dtype)
        fields = {"{ckpt}": checkpoint, "{dtype}": name, "{device}": device}
        return Command([_filled(word, fields) for word in words], open_checkpoint(checkpoint).config.head_dim)

    return load


def _filled(word: str, fields: dict[str, str]) -> str:
    for field, value in fields.items():
        word = word.replace(field, value)
    return word


class Command:
    """A running program; it ends with this object."""

    def __init__(self, words: list[str], head_dim: int) -> None:
        self.words, self.head_dim = words, head_dim
        self.folder = Path(tempfile.mkdtemp(prefix="parity-cmd-"))
        with (self.folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1
            )
        weakref.finalize(self, end, self.process, self.folder)
        able = self._ask("can").split()
        if "logits" not in able:
            raise RuntimeError(f"{words[0]} answered `can` with {' '.join(able)!r}: expected `ok logits`")
        if "taps" in able:
            self.taps = self._taps  # a method only where the program has it

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V), row by row."""
        return torch.stack([self._logits(row) for row in tokens.tolist()])

    def _logits(self, ids: list[int]) -> Tensor:
        file = self.folder / "logits.f32"
        file.unlink(missing_ok=True)
        self._ask(f"logits {file} {' '.join(map(str, ids))}")
        return self._read(file, len(ids))

    def _taps(self, tokens: Tensor) -> dict[str, Tensor]:
        [ids] = tokens.tolist()
        folder = self.folder / "taps"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._ask(f"taps {folder} {' '.join(map(str, ids))}")
        found = {file.stem: self._read(file, len(ids)).unsqueeze(0) for file in folder.glob("*.f32")}
        for name in [name for name in found if name.endswith(WITH_HEADS)]:
            found[name] = found[name].unflatten(-1, (-1, self.head_dim))  # (1, T, heads, head_dim)
        return found

    def _read(self, file: Path, rows: int) -> Tensor:
        """(T, N) float32."""
        if not file.is_file():
            raise RuntimeError(f"{self.words[0]} answered ok and wrote no {file.name}")
        content = bytearray(file.read_bytes())
        if len(content) % (4 * rows) or not content:
            raise RuntimeError(f"{file.name} holds {len(content)} bytes: expected {rows} rows of float32")
        return torch.frombuffer(content, dtype=torch.float32).view(rows, -1)

    def _ask(self, request: str) -> str:
        """What follows `ok`. Raises RuntimeError with the program's own words."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(request + "\n")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""  # it has ended; the line stays in the pipe's buffer
        if not answer:
            code, said = self.process.wait(), (self.folder / "stderr").read_text(errors="replace").strip()
            last = said.splitlines()[-1] if said else "nothing on stderr"
            raise RuntimeError(f"{self.words[0]} ended with exit code {code} at `{request.split()[0]}`: {last}")
        word, _, rest = answer.strip().partition(" ")
        if word != "ok":
            raise RuntimeError(f"{self.words[0]} answered `{request.split()[0]}` with {answer.strip()!r}")
        return rest


def end(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Stop the program and delete what it wrote."""
    process.kill()
    process.communicate()
    shutil.rmtree(folder, ignore_errors=True)
