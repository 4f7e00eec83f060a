"""torch's pickle read opcode by opcode, and nothing in it run: only what builds a dict of plain tensors passes.

A stack machine of shapes and counts stands for the real one. What would allocate by a claim, hash for ever, or call
anything but torch's two builders of tensors is found here, before the unpickler sees it.

    python -c "from nanollama.gate.pickles import check; check(b'\\x80\\x02}.', {})"

Sources: pickletools for the opcodes, torch._weights_only_unpickler for what torch would take, torch._utils for the
arguments of the builders.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

MAX_OPCODES = 1_000_000  # Llama 3.1 405B needs 40,000
MAX_DEPTH = 24  # of containers within containers
MAX_VALUES = 4_000_000  # counted as often as they are shown: a memo doubles what it names
MAX_TEXT_BYTES = 1 << 16
# Bytes of a number, by the name of torch's storage.
STORAGES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
STORAGES = {f"torch {name}Storage": size for name, size in (STORAGES | {"Bool": 1}).items()}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
ORDERED, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
GLOBALS = frozenset((ORDERED, TENSOR, PARAMETER, *STORAGES, *(f"torch {name}" for name in DTYPES)))


class Refused(ValueError):
    """What was found, for the inside of a line."""


class Value(NamedTuple):
    """kind: text, number, none, flag, global, tuple, list, dict, ordered, storage or tensor; what: its content."""

    kind: str
    what: Any = None
    depth: int = 0
    values: int = 1


class Container:
    """A list or dict, which grows after it is made."""

    def __init__(self, kind: str) -> None:
        self.kind, self.depth, self.values = kind, 1, 1
        self.what: Any = None
        self.keys: set[Any] = set()

    def add(self, item: "Value | Container") -> None:
        self.depth, self.values = max(self.depth, item.depth + 1), self.values + item.values
        if self.depth > MAX_DEPTH:
            raise Refused(f"containers nested more than {MAX_DEPTH} deep")
        if self.values > MAX_VALUES:
            raise Refused(f"more than {MAX_VALUES:,} values, counted as often as they are named")


MARK = Value("mark")
FIXED = {"NONE": Value("none"), "NEWTRUE": Value("flag", True), "NEWFALSE": Value("flag", False)}
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
Item = Value | Container


def check(pickle: bytes, records: Mapping[str, int]) -> None:
    """Raises Refused unless the pickle builds plain values and tensors that lie within the records (key -> bytes)."""
    machine = _Machine(records)
    steps = machine.steps
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count > MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES:,} opcodes")
            step = steps.get(opcode.name)
            if step is None:
                raise Refused(f"the opcode {opcode.name}, which no state dict needs")
            step(argument)
    except (IndexError, KeyError):
        raise Refused("a damaged pickle: its stack or memo lacks what it takes from there") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"a damaged pickle: {str(error)[:80]}") from None
    if len(machine.stack) != 1:
        raise Refused(f"a damaged pickle: {len(machine.stack)} values at its end")


class _Machine:
    def __init__(self, records: Mapping[str, int]) -> None:
        self.stack: list[Item] = []
        self.memo: dict[int, Item] = {}
        self.records = records
        self.steps: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self.stack.append(MARK),
            "EMPTY_DICT": lambda _: self.stack.append(Container("dict")),
            "EMPTY_LIST": lambda _: self.stack.append(Container("list")),
            "EMPTY_TUPLE": lambda _: self.stack.append(_tuple([])),
            "TUPLE": lambda _: self.stack.append(_tuple(self.to_mark())),
            "TUPLE1": lambda _: self.stack.append(_tuple(self.take(1))),
            "TUPLE2": lambda _: self.stack.append(_tuple(self.take(2))),
            "TUPLE3": lambda _: self.stack.append(_tuple(self.take(3))),
            "APPEND": lambda _: self.extend(self.take(1)),
            "APPENDS": lambda _: self.extend(self.to_mark()),
            "SETITEM": lambda _: self.set_items(self.take(2)),
            "SETITEMS": lambda _: self.set_items(self.to_mark()),
            "BINUNICODE": self.text,
            "GLOBAL": self.named,
            "BINPERSID": lambda _: self.stack.append(self.storage(self.stack.pop())),
            "REDUCE": lambda _: self.reduce(),
            "BUILD": lambda _: self.build(),
            "PROTO": self.protocol,
            "STOP": lambda _: None,
        }
        self.steps |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), self.put)
        self.steps |= dict.fromkeys(("BINGET", "LONG_BINGET"), self.recall)
        self.steps |= dict.fromkeys(NUMBERS, self.number)
        for name, value in FIXED.items():
            self.steps[name] = partial(self.fixed, value)

    def fixed(self, value: Value, _: None) -> None:
        self.stack.append(value)

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def number(self, value: int | float) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise Refused("a number of more than 64 bits")
        self.stack.append(Value("number", value))

    def recall(self, place: int) -> None:
        item = self.memo[place]
        if isinstance(item, Container) or item is MARK:
            raise Refused(f"a {item.kind} named twice, which may hold itself")
        self.stack.append(item)

    def to_mark(self) -> list[Item]:
        place = len(self.stack) - 1
        while self.stack[place] is not MARK:
            place -= 1
            if place < 0:
                raise IndexError
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def take(self, count: int) -> list[Item]:
        if len(self.stack) < count or MARK in (items := self.stack[-count:]):
            raise IndexError
        del self.stack[-count:]
        return items

    def protocol(self, version: int) -> None:
        if version != 2:
            raise Refused(f"pickle protocol {version}: torch writes 2")

    def text(self, text: str) -> None:
        if len(text) > MAX_TEXT_BYTES:
            raise Refused(f"a text of {len(text):,} characters")
        self.stack.append(Value("text", text))

    def named(self, name: str) -> None:
        if name not in GLOBALS:
            raise Refused(f"it asks for {name[:80].replace(' ', '.')}, which no state dict needs")
        self.stack.append(Value("global", name))

    def extend(self, items: list[Item]) -> None:
        target = self.container("list")
        for item in items:
            target.add(item)

    def set_items(self, items: list[Item]) -> None:
        target = self.container("dict", "ordered")
        if len(items) % 2:
            raise Refused("a damaged pickle: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key.kind != "text" and not (key.kind == "number" and isinstance(key.what, int)):
                raise Refused(f"a {key.kind} as a key, where names are texts")
            if key.what in target.keys:
                raise Refused(f"the key {str(key.what)[:60]!r} twice")
            target.keys.add(key.what)
            target.add(value)

    def container(self, *kinds: str) -> Container:
        target = self.stack[-1]
        if not isinstance(target, Container) or target.kind not in kinds:
            raise Refused(f"a damaged pickle: items put into a {target.kind}")
        return target

    def reduce(self) -> None:
        function, arguments = self.take(2)
        if function.kind != "global" or arguments.kind != "tuple":
            raise Refused("a damaged pickle: a call of what is no function")
        items: list[Item] = arguments.what
        if function.what == ORDERED and not items:
            self.stack.append(Container("ordered"))
        elif function.what == PARAMETER and [item.kind for item in items[:2]] == ["tensor", "flag"] and len(items) == 3:
            self.stack.append(items[0])
        elif function.what == TENSOR:
            self.stack.append(self.tensor(items))
        else:
            raise Refused(f"a call of {function.what.replace(' ', '.')} with other arguments than torch's")

    def build(self) -> None:
        """Of an OrderedDict alone, whose one attribute is torch's _metadata; another would hide a method."""
        (state,) = self.take(1)
        self.container("ordered")
        if not isinstance(state, Container) or state.kind != "dict" or state.keys - {"_metadata"}:
            raise Refused("attributes set on what is no module's state")

    def storage(self, item: Item) -> Value:
        """The five values that torch writes of a storage: numbers in the record, not beyond."""
        kinds = ["text", "global", "text", "text", "number"]
        if item.kind != "tuple" or [part.kind for part in item.what] != kinds or item.what[0].what != "storage":
            raise Refused("a persistent id that is no storage of torch's")
        _, kind, key, _, count = (part.what for part in item.what)
        if kind not in STORAGES:
            raise Refused(f"a storage of {kind.replace(' ', '.')}")
        if key not in self.records:
            raise Refused(f"a storage in record {key[:60]!r}, which is not there")
        if not isinstance(count, int) or count < 0 or count * STORAGES[kind] != self.records[key]:
            have = self.records[key]
            raise Refused(f"a storage of {count:.6g} numbers of {STORAGES[kind]} bytes in a record of {have:,} bytes")
        return Value("storage", count)

    def tensor(self, items: list[Item]) -> Value:
        """storage, offset, size, stride, requires_grad, hooks: a window that lies in its storage."""
        kinds = ["storage", "number", "tuple", "tuple", "flag", "ordered"]
        if [item.kind for item in items] != kinds or items[5].values != 1:
            raise Refused("a tensor built of other things than torch's")
        count, offset, size, stride = (item.what for item in items[:4])
        dims, steps = [part.what for part in size], [part.what for part in stride]
        numbers = [offset, *dims, *steps]
        if not all(type(n) is int and n >= 0 for n in numbers) or len(dims) != len(steps) or len(dims) > 8:
            raise Refused(f"a tensor of size {str(dims)[:60]} and strides {str(steps)[:60]}")
        if math.prod(dims) >= 2**62:
            raise Refused(f"a tensor of size {str(dims)[:60]}")
        last = offset + sum((n - 1) * step for n, step in zip(dims, steps, strict=True))
        if 0 not in dims and last >= count:
            raise Refused(f"a tensor of size {str(dims)[:60]} that ends beyond the {count} numbers of its storage")
        return Value("tensor")


def _tuple(items: list[Item]) -> Value:
    values = depth = 0
    for item in items:
        values += item.values
        depth = max(depth, item.depth)
    if depth >= MAX_DEPTH or values >= MAX_VALUES:
        raise Refused(f"tuples nested more than {MAX_DEPTH} deep, or of more than {MAX_VALUES:,} values")
    return Value("tuple", items, depth + 1, values + 1)
