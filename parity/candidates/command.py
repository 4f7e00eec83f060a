"""A candidate that is any program: it reads requests from its standard input, one a line, and answers each with a line.

    python -m parity.check --candidate "cmd:./my_port {ckpt} {dtype}"

`{ckpt}`, `{dtype}` (fp32, bf16, fp16) and `{device}` are filled in; the program runs once for each dtype. Requests:

    can                        ok logits taps    what it answers of the requests in docs/parity.md; logits is enough
    logits FILE 128000 9906    ok                FILE holds the logits of all T tokens: (T, V) float32, little-endian
    taps FOLDER 128000 9906    ok                FOLDER/layers.0.q.f32 and so on, the shapes of docs/parity.md

`error TEXT` in place of `ok` is an error of the check, `no TEXT` means that it cannot. What the program writes to
stderr is shown when it ends before its input does. Where its libraries print to stdout, it writes its answers to the
file `{answers}` of its command line, and stdout joins stderr.
"""

import json
import os
import shlex
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.candidates.files import list_arrays, read_float32
from parity.candidates.interface import ATTRIBUTES
from parity.candidates.limits import PROGRAM, Limits
from parity.candidates.nano.opening import Checkpoint, open_checkpoint
from parity.candidates.program import WORK, Ended, Exceeded, Program
from parity.contract import DTYPES, UsageError

WITH_HEADS = (".q", ".k", ".v", ".q_rope", ".k_rope")
# Requests that become a method where the program has them; `logits` and `batch` are the call itself.
METHODS: tuple[str, ...] = (
    "taps",
    "prefill",
    "decode",
    "packed",
    "compiled",
    "rope",
    "next_tokens",
    "config",
    "weights",
)
METHODS += ("encode", "encode_plain", "encode_chat", "use_tokenizer", "grads")
NAMES = {"grads": "loss_and_grads"}
SHOWN_CHARACTERS = 400


def command_loader(line: str, limits: Limits = PROGRAM) -> Callable[[str, torch.dtype, str], "Command"]:
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
        fields = {"{ckpt}": checkpoint, "{dtype}": dtype_name(dtype), "{device}": device}
        return Command([_filled(word, fields) for word in words], open_checkpoint(checkpoint), limits)

    return load


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def _filled(word: str, fields: dict[str, str]) -> str:
    for field, value in fields.items():
        word = word.replace(field, value)
    return word


class Command:
    """A running program; it ends with this object."""

    def __init__(
        self, words: list[str], opened: Checkpoint, limits: Limits = PROGRAM, environment: dict[str, str] | None = None
    ) -> None:
        self.words, self.opened = words, opened
        self.folder = Path(tempfile.mkdtemp(prefix="parity-cmd-", dir=os.environ.get(WORK)))
        try:
            self.program = Program(words, limits, environment)
        except OSError as error:
            shutil.rmtree(self.folder)
            raise UsageError(f"candidate {words[0]}: cannot be run ({error.strerror})") from error
        weakref.finalize(self, end, self.program, self.folder)
        self.able = self.ask("can").split()
        if not {"logits", "next_tokens"} & set(self.able):
            raise RuntimeError(f"{words[0]} answered `can` with {' '.join(self.able)!r}: expected `ok logits`")
        for request in METHODS:
            if request in self.able:  # a method only where the program has it
                name = NAMES.get(request, request)
                setattr(self, name, getattr(self, f"_{name}"))
        if "declare" in self.able:
            self._declare(self._object("declare"))

    def _declare(self, said: dict[str, Any]) -> None:
        """Attributes of the interface's table, as the program has them. Raises UsageError for another one."""
        known = [row.name for row in ATTRIBUTES]
        for name, value in said.items():
            if name not in known:
                raise UsageError(f"candidate {self.words[0]} declares {name!r}: expected {', '.join(known)}")
            setattr(self, name, value)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V); row by row where the program has no `batch`."""
        rows = tokens.tolist()
        if len(rows) > 1 and "batch" in self.able:
            return self._array("batch", (len(rows), tokens.shape[1]), len(rows), *_flat(rows))
        return torch.cat([self._array("logits", (1, len(row)), *row) for row in rows])

    def _prefill(self, tokens: Tensor) -> Tensor:
        return self._array("prefill", (1, None), *_flat(tokens.tolist()))

    def _decode(self, tokens: Tensor) -> Tensor:
        return self._array("decode", (1, None), *_flat(tokens.tolist()))

    def _compiled(self, tokens: Tensor) -> Tensor:
        return self._array("compiled", tuple(tokens.shape), *_flat(tokens.tolist()))

    def _packed(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        return self._array("packed", tuple(tokens.shape), *_flat(tokens.tolist()), *_flat(doc_ids.tolist()))

    def _taps(self, tokens: Tensor) -> dict[str, Tensor]:
        found = self._arrays("taps", tokens.shape[1], *_flat(tokens.tolist()))
        for name in [name for name, x in found.items() if name.endswith(WITH_HEADS) and x.dim() == 3]:
            found[name] = found[name].unflatten(-1, (-1, self.opened.config.head_dim))  # (1, T, heads, head_dim)
        return found

    def _rope(self, positions: Tensor) -> tuple[Tensor | None, ...]:
        found = self._arrays("rope", len(positions), *positions.tolist())
        tables = (found.get("cos"), found.get("sin"))
        return tuple(None if x is None else x.reshape(len(positions), -1) for x in tables)

    def _loss_and_grads(self, tokens: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
        folder = self._emptied()
        both = [*_flat(tokens.tolist()), *_flat(targets.tolist())]
        said = self.ask("grads", folder, len(tokens), *both)
        try:
            loss = float(said.split()[0])
        except (ValueError, IndexError):
            raise RuntimeError(f"{self.words[0]} answered `grads` with {said[:60]!r}: expected the loss") from None
        shapes = self.opened.weights.shapes
        files = list_arrays(folder, self.words[0])
        return loss, {name: self._read(file, shapes.get(name, (-1,)), self.widest) for name, file in files.items()}

    def _next_tokens(self, ids: list[int], n: int) -> list[int]:
        return self._ids("next_tokens", n, *ids) or []

    def _encode(self, text: str) -> list[int] | None:
        return self._ids("encode", self._text(text))

    def _encode_plain(self, text: str) -> list[int] | None:
        return self._ids("encode_plain", self._text(text))

    def _encode_chat(self, dialog: list[dict[str, Any]]) -> list[int] | None:
        return self._ids("encode_chat", self._text(json.dumps(dialog)))

    def _use_tokenizer(self, path: str) -> None:
        self.ask("use_tokenizer", path)

    def _config(self) -> dict[str, Any]:
        return self._object("config")

    def _weights(self) -> dict[str, Any]:
        return self._object("weights")

    # --- The protocol ------------------------------------------------------------------------------------------------

    def _array(self, request: str, lead: tuple[int | None, ...], *words: Any) -> Tensor:
        """Logits (*lead, V); None: as many positions as the file holds, of the checkpoint's rows each."""
        file = self.folder / f"{request}.f32"
        file.unlink(missing_ok=True)
        said = self.ask(request, file, *words)
        if said:
            return self._read(file, self._shape(request, parse(said)), max(len(words), self.widest))
        single = getattr(self, "last_only", False) is True
        if None in lead or single:
            return self._read(file, (1, -1, self.opened.config.vocab_size), len(words))
        return self._read(file, (*lead, -1), self.widest)  # type: ignore[arg-type]

    def _arrays(self, request: str, rows: int, *words: Any) -> dict[str, Tensor]:
        """NAME.f32 files of a folder, (1, rows, ...) each."""
        folder = self._emptied()
        said = self.ask(request, folder, *words)
        shapes = parse(said) if said else {}
        if not isinstance(shapes, dict):
            raise RuntimeError(f"{self.words[0]} answered `{request}` with {said[:60]!r}: expected shapes by name")
        found = {name: self._shape(request, shape) for name, shape in shapes.items()}
        files = list_arrays(folder, self.words[0])
        return {name: self._read(file, found.get(name, (1, rows, -1)), self.widest) for name, file in files.items()}

    def _shape(self, request: str, said: Any) -> tuple[int, ...]:
        """Sizes of an array that the program names."""
        if not isinstance(said, list) or len(said) > 8 or not all(map(is_size, said)) or said.count(-1) > 1:
            raise RuntimeError(f"{self.words[0]} answered `{request}` with {str(said)[:60]!r}: expected a shape")
        return tuple(said)

    def _emptied(self) -> Path:
        folder = self.folder / "arrays"
        if folder.is_symlink():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _text(self, text: str) -> Path:
        file = self.folder / "text"
        file.write_bytes(text.encode())
        return file

    def _ids(self, request: str, *words: Any) -> list[int] | None:
        said = self.ask(request, *words)
        if said == "none":
            return None
        try:
            return [int(word) for word in said.split()]
        except ValueError:
            raise RuntimeError(f"{self.words[0]} answered `{request}` with {said[:60]!r}: expected ids") from None

    def _object(self, request: str) -> dict[str, Any]:
        said = self.ask(request)
        found = parse(said)
        if not isinstance(found, dict):
            raise RuntimeError(f"{self.words[0]} answered `{request}` with {said[:60]!r}: expected a JSON object")
        return found

    def _read(self, file: Path, shape: tuple[int, ...] | list[int], most: int) -> Tensor:
        """float32 of this shape, in which one size may be -1: what the program chose, up to `most`."""
        return read_float32(file, shape, most, self.words[0])

    @property
    def widest(self) -> int:
        """A row of any tap, with room for a wrong one that is to be told from garbage."""
        c = self.opened.config
        return 4 * max(c.vocab_size, c.hidden_dim, c.dim, c.n_heads * c.head_dim)

    def ask(self, request: str, *words: Any) -> str:
        """What follows `ok`. Raises NotImplementedError where the program says `no`, else what `failed` makes of it."""
        try:
            answer = self.program.ask(" ".join(map(str, (request, *words)))).strip()
        except Ended as end:
            raise self.ended(request, end.code, self.program.last_words()) from None
        except Exceeded as exceeded:
            raise RuntimeError(f"{self.words[0]} {exceeded}") from None
        word, _, rest = answer.partition(" ")
        if word == "no":
            raise NotImplementedError(rest)
        if word != "ok":
            raise self.failed(request, answer[:SHOWN_CHARACTERS])
        return rest

    def ended(self, request: str, code: int | None, last: str) -> Exception:
        return RuntimeError(f"{self.words[0]} {how_it_ended(code)} at `{request}`: {last}")

    def failed(self, request: str, answer: str) -> Exception:
        return RuntimeError(f"{self.words[0]} answered `{request}` with {answer!r}")


def parse(said: str) -> Any:
    """JSON; None of what is none."""
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return None


def is_size(n: Any) -> bool:
    return type(n) is int and -1 <= n < 2**40


def _flat(rows: list[list[int]]) -> list[int]:
    return [i for row in rows for i in row]


def how_it_ended(code: int | None) -> str:
    if code is None:
        return "closed its output"
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def end(program: Program, folder: Path) -> None:
    """Stop the program and delete what it wrote."""
    program.end()
    shutil.rmtree(folder, ignore_errors=True)
