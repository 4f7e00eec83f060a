"""A Python candidate in an environment of its own: loads FILE.py:load there and answers the requests of `cmd:`.

    VENV/bin/python serve.py my_port.py:load CKPT fp32 cpu TABLE    # requests on stdin, answers on stdout

Runs under the other environment's Python: the standard library, and torch or numpy where they are found. With torch,
`load` gets a torch.dtype and the model Tensors; without it the dtype's name, and int64 arrays or, without numpy, lists.
TABLE says which methods and attributes count (parity/candidates/environment.py makes it), docs/parity.md what the
requests are. Whatever the user's code prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if not __package__:  # run as a file
    sys.path.insert(0, ROOT)

from parity.outside import OURS, Unusable, kind_of, load_attribute, misfit, told  # noqa: E402

# Request -> the candidate's method that answers it.
REQUESTS = {"logits": "__call__", "batch": "__call__", "grads": "loss_and_grads"}
REQUESTS |= {name: name for name in ("taps", "prefill", "decode", "packed", "compiled", "rope", "next_tokens")}
REQUESTS |= {name: name for name in ("config", "weights", "encode", "encode_plain", "encode_chat", "use_tokenizer")}
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


class Wrong(Exception):
    """An answer that is none: of another type, shape or dtype than the interface's."""


# --- Arrays of whatever library is here ------------------------------------------------------------------------------


def optional(name: str) -> Any:
    """The library; None where it is not installed or cannot be imported."""
    with contextlib.suppress(ImportError, OSError):
        return importlib.import_module(name)
    return None


class Arrays:
    """Tokens in, numbers out, by torch, numpy or neither."""

    def __init__(self, device: str) -> None:
        self.torch, self.numpy, self.device = optional("torch"), optional("numpy"), device

    def dtype(self, name: str) -> Any:
        kinds = {kind: key.removeprefix("torch.") for key, kind in DTYPES.items()}
        return getattr(self.torch, kinds[name]) if self.torch else name

    def integers(self, values: Any) -> Any:
        """A list of numbers, or of rows of them."""
        if self.torch:
            return self.torch.tensor(values, dtype=self.torch.long, device=self.device)
        return self.numpy.array(values, dtype="int64") if self.numpy else values

    def no_grad(self) -> Any:
        return self.torch.no_grad() if self.torch else contextlib.nullcontext()

    def floats(self, value: Any, asked: str) -> tuple[list[int], bytes]:
        """Shape, and float32 in little-endian bytes. Raises Wrong where these are no floating-point numbers."""
        if self.torch and isinstance(value, self.torch.Tensor):
            if not value.is_floating_point():
                raise Wrong(f"{asked} returned {value.dtype}: expected floating-point numbers")
            value = value.detach().float().cpu().contiguous()
            return list(value.shape), little(value.numpy() if self.numpy else value.flatten().tolist())
        if self.numpy and not isinstance(value, (list, tuple)):
            found = self.numpy.asarray(value)
            if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
                raise Wrong(f"{asked} returned {kind_of(value)} of {found.dtype}: expected floating-point numbers")
            return list(found.shape), found.astype("<f4").tobytes()
        shape, flat = _flattened(value, asked)
        return shape, little(flat)


def little(numbers: Any) -> bytes:
    """float32, lowest byte first: of an array of them, or a list."""
    found = array("f", numbers.tobytes() if hasattr(numbers, "tobytes") else numbers)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def _flattened(value: Any, asked: str) -> tuple[list[int], list[float]]:
    """Shape and numbers of nested lists, all of one depth and width."""
    if isinstance(value, float):
        return [], [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise Wrong(f"{asked} returned {kind_of(value)}: expected floating-point numbers")
    parts = [_flattened(part, asked) for part in value]
    if any(shape != parts[0][0] for shape, _ in parts):
        raise Wrong(f"{asked} returned lists of several lengths: expected an array")
    return [len(parts), *parts[0][0]], [x for _, flat in parts for x in flat]


# --- Requests --------------------------------------------------------------------------------------------------------


class Server:
    """A loaded candidate that answers requests, each a line of words; see docs/parity.md.

    table: {"methods": {name: [[parameter names], ...]}, "signatures": {name: text}, "attributes": [name, ...]}.
    """

    def __init__(self, name: str, checkpoint: str, dtype: str, device: str, table: dict[str, Any]) -> None:
        load = load_attribute(name)
        self.file = inspect.getsourcefile(inspect.unwrap(load)) if inspect.isfunction(load) else None
        self.arrays, self.table = Arrays(device), table
        self.load = lambda: load(checkpoint, self.arrays.dtype(dtype), device)
        self.declares, self.model, self.has, self.notices = [load], None, dict[str, Any](), list[str]()

    def answer(self, line: str) -> str:
        """One answer: `ok ...`; `no ...` of what it cannot do; `wrong ...` or `error ...`."""
        word, *words = line.split()
        try:
            if self.model is None:
                self._open()
            with contextlib.nullcontext() if word == "grads" else self.arrays.no_grad():
                return f"ok {getattr(self, f'_{word}')(*words)}".strip()
        except NotImplementedError as error:
            return f"no {' '.join(str(error).split())}"
        except Wrong as error:
            return f"wrong {' '.join(str(error).split())}"
        except (Exception, SystemExit) as error:
            return f"error {' '.join(told(error, self.file).split())}"

    def _open(self) -> None:
        self.model = self.load()
        self.declares.insert(0, self.model)
        for name, takes in self.table["methods"].items():
            value = getattr(self.model, name, None)
            why = None if value is None else misfit(value, name, takes)
            if why is not None:
                signature = self.table["signatures"][name]
                self.notices.append(f"the candidate's {name} is ignored: {why}, the interface has {signature}")
            elif value is not None:
                self.has[name] = value
        unasked = [name for name in self.has if name not in REQUESTS.values()]
        if unasked:
            self.notices.append(f"{', '.join(unasked)}: not asked of a candidate in an environment of its own")

    def _can(self) -> str:
        return " ".join(["declare", *(request for request, method in REQUESTS.items() if method in self.has)])

    def _declare(self) -> str:
        found: dict[str, Any] = {}
        for name in self.table["attributes"]:
            value = next((v for v in (getattr(x, name, None) for x in self.declares) if v is not None), None)
            if isinstance(value, (list, tuple, set, frozenset)):
                value = [DTYPES.get(str(x), str(x)) for x in value]
            if isinstance(value, (str, int, float, list)):
                found[name] = value
        return json.dumps(found | {"notices": [*found.get("notices", []), *self.notices]})

    def _ask(self, method: str, *args: Any) -> Any:
        return self.has[method](*args)

    def _write(self, file: str, value: Any, method: str) -> str:
        shape, content = self.arrays.floats(getattr(value, "logits", value), self.table["signatures"][method])
        Path(file).write_bytes(content)
        return json.dumps(shape)

    def _each(self, folder: str, values: Any, method: str) -> str:
        """Arrays by name, a file each; answers their shapes."""
        asked = self.table["signatures"][method]
        if not isinstance(values, dict) or any("/" in str(name) for name in values):
            raise Wrong(f"{asked} returned {kind_of(values)}: expected a dict of arrays by name")
        shapes = {}
        for name, value in values.items():
            shapes[str(name)], content = self.arrays.floats(value, f"{asked}[{str(name)!r}]")
            (Path(folder) / f"{name}.f32").write_bytes(content)
        return json.dumps(shapes)

    def _row(self, words: Sequence[str]) -> Any:
        return self.arrays.integers([[int(w) for w in words]])

    def _logits(self, file: str, *ids: str) -> str:
        return self._write(file, self._ask("__call__", self._row(ids)), "__call__")

    def _batch(self, file: str, rows: str, *ids: str) -> str:
        return self._write(file, self._ask("__call__", self.arrays.integers(_rows(rows, ids))), "__call__")

    def _prefill(self, file: str, *ids: str) -> str:
        return self._write(file, self._ask("prefill", self._row(ids)), "prefill")

    def _decode(self, file: str, *ids: str) -> str:
        return self._write(file, self._ask("decode", self._row(ids)), "decode")

    def _compiled(self, file: str, *ids: str) -> str:
        return self._write(file, self._ask("compiled", self._row(ids)), "compiled")

    def _packed(self, file: str, *words: str) -> str:
        half = len(words) // 2
        return self._write(file, self._ask("packed", self._row(words[:half]), self._row(words[half:])), "packed")

    def _taps(self, folder: str, *ids: str) -> str:
        return self._each(folder, self._ask("taps", self._row(ids)), "taps")

    def _rope(self, folder: str, *positions: str) -> str:
        found = self._ask("rope", self.arrays.integers([int(p) for p in positions]))
        tables = dict(zip(("cos", "sin"), found)) if isinstance(found, (list, tuple)) else found  # noqa: B905
        return self._each(folder, tables, "rope")

    def _grads(self, folder: str, rows: str, *words: str) -> str:
        half = len(words) // 2
        tokens, targets = (self.arrays.integers(_rows(rows, part)) for part in (words[:half], words[half:]))
        loss, grads = self._ask("loss_and_grads", tokens, targets)
        self._each(folder, grads, "loss_and_grads")
        return repr(float(loss))

    def _next_tokens(self, count: str, *ids: str) -> str:
        return _ids(self._ask("next_tokens", [int(i) for i in ids], int(count)), "next_tokens(ids, n)")

    def _encode(self, file: str) -> str:
        return _ids(self._ask("encode", _text(file)), "encode(text)")

    def _encode_plain(self, file: str) -> str:
        return _ids(self._ask("encode_plain", _text(file)), "encode_plain(text)")

    def _encode_chat(self, file: str) -> str:
        found = self._ask("encode_chat", json.loads(_text(file)))
        return "none" if found is None else _ids(found, "encode_chat(dialog)")

    def _use_tokenizer(self, *path: str) -> str:
        self._ask("use_tokenizer", " ".join(path))
        return ""

    def _config(self) -> str:
        return json.dumps(self._ask("config"), default=str)

    def _weights(self) -> str:
        return json.dumps(self._ask("weights"), default=lambda x: x.item() if hasattr(x, "item") else list(x))


def _rows(rows: str, words: Sequence[str]) -> list[list[int]]:
    width = len(words) // int(rows)
    return [[int(w) for w in words[i : i + width]] for i in range(0, len(words), width)]


def _text(file: str) -> str:
    return Path(file).read_bytes().decode("utf-8")  # line ends as they are


def _ids(found: Any, asked: str) -> str:
    flat = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(flat, (list, tuple)):
        raise Wrong(f"{asked} returned {kind_of(found)}: expected a list of token ids")
    return " ".join(str(int(i)) for i in flat)


def serve(answer: Callable[[str], str]) -> None:
    """Answer each line of standard input. Its streams are set aside first: libraries print, from C too, and read."""
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for line in requests:
        print(answer(line.rstrip("\n")), file=replies, flush=True)


def main(argv: list[str]) -> int:
    name, checkpoint, dtype, device, table = argv
    sys.path[:] = [p for p in sys.path if str(Path(p or ".").resolve()) not in (OURS, ROOT)]  # ours are not the user's
    server: Server | None = None

    def answer(line: str) -> str:
        nonlocal server
        if server is None:
            server = Server(name, checkpoint, dtype, device, json.loads(table))
        return server.answer(line)

    try:
        serve(answer)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
