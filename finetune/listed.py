"""What a state in shards holds: .metadata is a pickle, which is read here opcode by opcode; nothing in it is run.

    metadata = read_list(Path("OUT/checkpoints/step_00000100/shards"))      # the library's Metadata, all claims checked

Unpickling would be a hole: of the library's own modules, `Path.write_text` and `FileSystem.rm_file` can be asked for by
name. Here a closed list of names stands for values, dicts stay pairs (a key is never hashed), and what comes out is
built anew: each tensor's chunks fill it and do not overlap, each chunk lies in a file of this folder.

Source: torch.distributed.checkpoint.metadata and .filesystem for what the library writes.
"""

import math
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from finetune.errors import UserError
from nanollama import gate

LIST = ".metadata"
MAX_BYTES = 1 << 28  # 405B with three tensors a weight on 128 ranks: 40 MB
FILE = re.compile(r"\w+\.distcp")
LIBRARY = "torch.distributed.checkpoint"
RECORDS = (
    *("metadata Metadata", "metadata TensorStorageMetadata", "metadata BytesStorageMetadata"),
    *("metadata ChunkStorageMetadata", "metadata TensorProperties", "metadata MetadataIndex"),
    *("metadata StorageMeta", "metadata _MEM_FORMAT_ENCODING", "filesystem _StorageInfo"),
)
DTYPES = {f"torch {str(d).removeprefix('torch.')}": d for d in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES |= {f"torch {str(d).removeprefix('torch.')}": d for d in (torch.float64, torch.int8, torch.uint8, torch.int64)}
SIZE = "torch Size"
PLAIN = {SIZE, *DTYPES, "torch device", "torch.serialization _get_layout", "torch._C _get_layout"}
PLAIN |= {"pathlib PosixPath", "pathlib._local PosixPath", "collections OrderedDict"}
GLOBALS = PLAIN | {f"{LIBRARY}.{name}" for name in RECORDS}
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
GIVEN = ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE")  # the value is the argument


class Refused(ValueError):
    """What was found, for the inside of a line."""


@dataclass(frozen=True, eq=False)
class Name:
    """A global, by module and name; it is never looked up."""

    text: str


@dataclass(eq=False)
class Made:
    """What a call of a global would have made. state: pairs or a tuple that it would have been given."""

    name: str
    arguments: Any
    state: Any = None


@dataclass(eq=False)
class Pairs:
    """A dict, whose keys are not hashed."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


def read_list(folder: Path) -> Metadata:
    """What the shards in `folder` hold. Raises UserError, one line."""
    path = folder / LIST
    try:
        gate.require_file(path)
        gate.require_inside(path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise Refused(f"more than {MAX_BYTES:,} bytes")
        return _metadata(_values(data), folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): it is not as a run wrote it") from None
    except gate.CheckpointError as error:
        raise UserError(str(error)) from None
    except (ValueError, IndexError, KeyError) as error:
        what = str(error) if isinstance(error, Refused) else f"a damaged pickle: {gate.reason(error)}"
        raise UserError(f"{path}: {what}: it is not as a run wrote it") from None


# --- The pickle ------------------------------------------------------------------------------------------------------


def _values(data: bytes) -> Any:
    """Of a pickle its value, made of plain ones, Name, Made and Pairs."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        kind = opcode.name
        if kind in VALUES:
            stack.append(VALUES[kind])
        elif kind in GIVEN:
            stack.append(argument)
        elif kind in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind not in ("PROTO", "FRAME", "STOP"):
            step = STEPS.get(kind)
            if step is None:
                raise Refused(f"the opcode {kind}, which no such list needs")
            step(stack, marks, argument)
    if len(stack) != 1 or marks:
        raise Refused("a damaged pickle: no one value at its end")
    return stack[0]


def _taken(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("nothing on its stack")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _named(stack: list[Any], text: str) -> None:
    if text not in GLOBALS:
        raise Refused(f"it asks for {gate.shown(text.replace(' ', '.'))}, which no such list needs")
    stack.append(Name(text))


def _stack_global(stack: list[Any], marks: list[int], _: Any) -> None:
    module, name = _taken(stack, 2)
    _named(stack, f"{module} {name}" if type(module) is type(name) is str else "")


def _made(stack: list[Any], marks: list[int], _: Any) -> None:
    function, arguments = _taken(stack, 2)
    if type(function) is not Name or type(arguments) is not tuple:
        raise Refused("a damaged pickle: a call of what is no function")
    stack.append(Made(function.text, arguments))


def _build(stack: list[Any], marks: list[int], _: Any) -> None:
    (state,) = _taken(stack, 1)
    if type(stack[-1]) is not Made:
        raise Refused("a damaged pickle: a state of what has none")
    stack[-1].state = state


def _extend(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise Refused("a damaged pickle: items put into what is no list")
    stack[-1].extend(items)


def _set(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not Pairs or len(items) % 2:
        raise Refused("a damaged pickle: items put into what is no dict")
    stack[-1].items.extend(zip(items[::2], items[1::2], strict=True))


def _to_mark(stack: list[Any], marks: list[int]) -> list[Any]:
    return _taken(stack, len(stack) - marks.pop())


STEPS: dict[str, Any] = {
    "EMPTY_DICT": lambda stack, marks, _: stack.append(Pairs()),
    "EMPTY_LIST": lambda stack, marks, _: stack.append([]),
    "EMPTY_TUPLE": lambda stack, marks, _: stack.append(()),
    "TUPLE": lambda stack, marks, _: stack.append(tuple(_to_mark(stack, marks))),
    "TUPLE1": lambda stack, marks, _: stack.append(tuple(_taken(stack, 1))),
    "TUPLE2": lambda stack, marks, _: stack.append(tuple(_taken(stack, 2))),
    "TUPLE3": lambda stack, marks, _: stack.append(tuple(_taken(stack, 3))),
    "APPEND": lambda stack, marks, _: _extend(stack, _taken(stack, 1)),
    "APPENDS": lambda stack, marks, _: _extend(stack, _to_mark(stack, marks)),
    "SETITEM": lambda stack, marks, _: _set(stack, _taken(stack, 2)),
    "SETITEMS": lambda stack, marks, _: _set(stack, _to_mark(stack, marks)),
    "GLOBAL": lambda stack, marks, text: _named(stack, text),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _made,
    "NEWOBJ": _made,
    "BUILD": _build,
}


# --- What it says ----------------------------------------------------------------------------------------------------


def _metadata(value: Any, folder: Path) -> Metadata:
    said = _fields(value, "metadata Metadata")
    tensors = {name: _tensor(name, entry) for name, entry in _items(said, "state_dict_metadata")}
    files: dict[str, int] = {}
    places = {}
    for index, place in _items(said, "storage_data"):
        at = _fields(index, "metadata MetadataIndex")
        name, info = _text(at, "fqn"), _fields(place, "filesystem _StorageInfo")
        places[MetadataIndex(name, _size(at.get("offset")))] = _place(info, folder, files)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in places:
                raise Refused(f"{gate.shown(name)} has a part that lies in no file")
    return Metadata(dict(tensors), None, places)


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of one of the library's records."""
    if type(value) is not Made or value.name != f"{LIBRARY}.{name}" or type(value.state) is not Pairs:
        raise Refused(f"it lacks a record of the kind {name.partition(' ')[2]}")
    if value.arguments or not all(type(key) is str for key, _ in value.state.items):
        raise Refused(f"a record of the kind {name.partition(' ')[2]} with other fields")
    return dict(value.state.items)


def _items(said: dict[str, Any], key: str) -> Iterator[tuple[Any, Any]]:
    if type(said.get(key)) is not Pairs:
        raise Refused(f"{key} is no dict")
    yield from said[key].items


def _text(said: dict[str, Any], key: str) -> str:
    if type(said.get(key)) is not str:
        raise Refused(f"{key} is no text")
    return said[key]


def _size(value: Any) -> torch.Size:
    numbers = value.arguments[0] if type(value) is Made and value.name == SIZE and len(value.arguments) == 1 else None
    if type(numbers) is not tuple or len(numbers) > 8 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise Refused("a size that is none")
    if math.prod(numbers) >= 2**62:
        raise Refused(f"a size of {gate.shown(numbers)}")
    return torch.Size(numbers)


def _tensor(name: Any, value: Any) -> TensorStorageMetadata:
    if type(name) is not str:
        raise Refused("a name that is no text")
    said = _fields(value, "metadata TensorStorageMetadata")
    kind, size, parts = said.get("properties"), _size(said.get("size")), said.get("chunks")
    given = kind.state if type(kind) is Made and kind.name == f"{LIBRARY}.metadata TensorProperties" else None
    if type(given) is not tuple or not given or type(given[0]) is not Name or given[0].text not in DTYPES:
        raise Refused(f"{gate.shown(name)} is of no type of numbers that a run keeps")
    if type(parts) is not list:
        raise Refused(f"{gate.shown(name)} has no parts")
    read = [_fields(part, "metadata ChunkStorageMetadata") for part in parts]
    chunks = [ChunkStorageMetadata(_size(part.get("offsets")), _size(part.get("sizes"))) for part in read]
    if not _tiles(chunks, size):
        raise Refused(f"{gate.shown(name)}: its parts leave numbers of it out, or overlap")
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[given[0].text]), size, chunks)


def _tiles(chunks: list[ChunkStorageMetadata], size: torch.Size) -> bool:
    """Whether the parts fill the tensor as a grid does, which is how every mesh cuts one."""
    parts = [(tuple(c.offsets), tuple(c.sizes)) for c in chunks]
    if any(len(offsets) != len(size) or len(sizes) != len(size) for offsets, sizes in parts):
        return False
    parts = [part for part in parts if math.prod(part[1])]
    if not parts:
        return not math.prod(size)
    starts = [sorted({offsets[d] for offsets, _ in parts}) for d in range(len(size))]
    if any(at[0] for at in starts) or len({offsets for offsets, _ in parts}) < len(parts):
        return False
    # Of each dimension: where a part begins -> where it has to end.
    ends = [dict(zip(at, [*at[1:], n], strict=True)) for at, n in zip(starts, size, strict=True)]
    fits = (o + n == end[o] for offsets, sizes in parts for o, n, end in zip(offsets, sizes, ends, strict=True))
    return len(parts) == math.prod(map(len, starts)) and all(fits)


def _place(info: dict[str, Any], folder: Path, files: dict[str, int]) -> _StorageInfo:
    """files: the bytes of those that were seen."""
    name = _text(info, "relative_path")
    offset: Any = info.get("offset")
    length: Any = info.get("length")
    if not FILE.fullmatch(name):
        raise Refused(f"{gate.shown(name)} is no name of a file beside it")
    if name not in files:
        gate.require_file(folder / name)
        gate.require_inside(folder / name)
        if not (folder / name).is_file():
            raise Refused(f"{name} is missing")
        files[name] = (folder / name).stat().st_size
    are_numbers = type(offset) is int and type(length) is int  # a bool is none
    if not are_numbers or info.get("transform_descriptors") or not 0 <= offset < offset + length <= files[name]:
        raise Refused(
            f"it asks for bytes {gate.shown(offset)} + {gate.shown(length)} of {name}, which has {files[name]:,}"
        )
    return _StorageInfo(name, offset, length)
