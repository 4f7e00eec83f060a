"""Valid files taken apart by their structure, one to three fields given a value from the edge of their type, and put
together again, so that what reads them gets behind its first check.

    mutate_gguf(data, random.Random(7))        # other bytes
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Rng = random.Random
INTS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53)
INTS += (2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-300, 1e300, 3.4e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "a" * 300,
    "a" * 70_000,
    "\x00",
    "\x1b[2J",
    "\ud800",
    "../x",
    "/dev/zero",
    "é",
    "▁",
    "\u202e",
    "9" * 400,
)
BYTES = (b"", b"x", b"\0" * 9, b"\xff" * 300, b"a" * 70_000, b"\x80\x80\x80", "é▁".encode(), b"../x")


def times(rng: Rng, data: Any, change: Callable[[Any, Rng], Any]) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = change(data, rng)
    return data


def near(value: Any, rng: Rng) -> Any:
    """Another value, mostly of the same type."""
    if rng.random() < 0.15:
        return rng.choice((None, True, False, 0, -1, 0.5, "x", [], {}, [1], {"a": 1}))
    if isinstance(value, bool):
        return rng.choice((not value, 1, "true"))
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, float(value), value + 0.5, *INTS))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, *FLOATS))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value * 2, value.upper(), *TEXTS))
    return rng.choice((None, 0, "x"))


# --- JSON ------------------------------------------------------------------------------------------------------------


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in it."""
    found, queue = [], [tree]
    while queue:
        part = queue.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        found += [(part, key) for key in keys]
        queue += [part[key] for key in keys]
    return found


def change_tree(tree: Any, rng: Rng) -> Any:
    places = nodes(tree)
    if not places or rng.random() < 0.02:
        return rng.choice((None, [], {}, 0, "x", [tree], {"a": tree}))
    part, key = rng.choice(places)
    action = rng.randrange(10)
    if action == 0:
        del part[key]
    elif action == 1:  # the value of another place
        other, at = rng.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            part[key] = json.loads(json.dumps(other[at]))
    elif action == 2:  # deep, or in a list
        deep: Any = part[key]
        for _ in range(rng.choice((1, 1, 2, 70, 400))):
            deep = rng.choice(([deep], {"a": deep}))
        part[key] = deep
    elif action == 3 and isinstance(part, dict):
        part[rng.choice((str(key) + "x", *TEXTS))] = near(part[key], rng)
    elif action == 4 and isinstance(part, list):
        part += part[:1] * rng.choice((1, 2, 1000))
    elif action == 5 and isinstance(part[key], list) and part[key]:
        rng.shuffle(part[key])
    else:
        part[key] = near(part[key], rng)
    return tree


def mutate_json(data: bytes, rng: Rng) -> bytes:
    tree = times(rng, json.loads(data), change_tree)
    text = json.dumps(tree)
    if rng.random() < 0.1:  # a fault of its spelling
        at = rng.randrange(len(text) + 1)
        faults = (text[:at], text + "}", text[:at] + rng.choice('{}[]",:0\\') + text[at:], text.replace(": ", ": 0", 1))
        text = rng.choice((*faults, text.replace("{", '{"a": 1, "a": 2, ', 1), "[" * 5000 + text))
    return text.encode()


def mutate_lines(data: bytes, rng: Rng) -> bytes:
    """JSON, a value a line."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((mutate_json, mutate_json, mutate_json, lambda *_: b"", lambda *_: b"\xff\xfe"))(
        lines[at], rng
    )
    return b"\n".join(lines) + b"\n"


# --- Safetensors -----------------------------------------------------------------------------------------------------


def mutate_safetensors(data: bytes, rng: Rng) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    header = mutate_json(header, rng)
    if rng.random() < 0.2:
        body = rng.choice((body[:-1], body + b"\0", body * 2, b"", body[: len(body) // 2]))
    length = len(header) if rng.random() < 0.9 else rng.choice(INTS) % 2**64
    return length.to_bytes(8, "little") + header + body


# --- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> bytes:
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("<I"), self.take("<Q")
            return [inner, [self.value(inner) for _ in range(count)]]
        return self.take(GGUF_FORMS[kind])


def pack(form: str, value: Any) -> bytes:
    """As near as the form can hold it."""
    if form in ("<f", "<d"):
        try:
            return struct.pack(form, float(value))
        except OverflowError:
            return struct.pack(form, float("inf"))
    size = struct.calcsize(form)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def gguf_text(value: bytes, rng: Rng) -> bytes:
    size = len(value) if rng.random() < 0.998 else rng.choice(INTS)
    return pack("<Q", size) + value


def gguf_value(kind: int, value: Any, rng: Rng) -> bytes:
    if kind == 8:
        return gguf_text(value, rng)
    if kind == 9:
        inner, items = value
        return pack("<I", inner) + pack("<Q", len(items)) + b"".join(gguf_value(inner, item, rng) for item in items)
    return pack(GGUF_FORMS.get(kind, "<I"), value)


def other_number(value: Any, rng: Rng) -> Any:
    return rng.choice((value + 1, value - 1, *FLOATS) if isinstance(value, float) else (value + 1, value * 2, *INTS))


def other_value(kind: int, value: Any, rng: Rng) -> Any:
    if kind == 8:
        return rng.choice((value + b"x", value[:-1], *BYTES))
    if kind == 9 and value[1] and value[0] != 9:
        inner, items = value
        action = rng.randrange(4)
        if action == 0:
            return [inner, items[: rng.randrange(len(items))]]
        if action == 1:
            return [inner, items + items[:1] * rng.choice((1, 100))]
        at = rng.randrange(len(items))
        return [inner, [*items[:at], other_value(inner, items[at], rng), *items[at + 1 :]]]
    return value if kind == 9 else other_number(value, rng)


def mutate_gguf(data: bytes, rng: Rng) -> bytes:
    r = Reader(data)
    r.at = 4
    version, n_tensors, n_keys = r.take("<I"), r.take("<Q"), r.take("<Q")
    keys = [[r.text(), kind := r.take("<I"), r.value(kind)] for _ in range(n_keys)]
    infos = [
        [r.text(), [r.take("<Q") for _ in range(r.take("<I"))], r.take("<I"), r.take("<Q")] for _ in range(n_tensors)
    ]
    body = data[r.at + -r.at % 32 :]
    counts = [version, n_tensors, n_keys]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        action, key, info = rng.randrange(12), rng.choice(keys), rng.choice(infos)
        if action <= 4:
            key[2] = other_value(key[1], key[2], rng)
        elif action == 5:
            key[0] = rng.choice((key[0] + b"x", rng.choice(keys)[0], *BYTES))
        elif action == 6 and len(keys) > 1:
            keys.remove(key)
            counts[2] = len(keys)
        elif action == 7:
            counts[rng.randrange(3)] = rng.choice(INTS)
        elif action == 8:
            info[0] = rng.choice((info[0] + b"x", rng.choice(infos)[0], *BYTES))
        elif action == 9:
            info[1] = rng.choice((info[1][::-1], info[1] * 2, [], [other_number(n, rng) for n in info[1]]))
        elif action == 10:
            info[2 + rng.randrange(2)] = rng.choice(INTS)
        else:
            body = rng.choice((body[:-1], body[: len(body) // 2], b"", body + b"\0" * 64))
    head = b"GGUF" + pack("<I", counts[0]) + pack("<Q", counts[1]) + pack("<Q", counts[2])
    head += b"".join(
        gguf_text(name, rng) + pack("<I", kind) + gguf_value(kind, value, rng) for name, kind, value in keys
    )
    for name, dims, kind, offset in infos:
        head += gguf_text(name, rng) + pack("<I", len(dims)) + b"".join(pack("<Q", n) for n in dims)
        head += pack("<I", kind) + pack("<Q", offset)
    return head + b"\0" * (-len(head) % 32) + body
