"""Structure-aware changes of .parquet files: the numbers, texts and lists of the footer and of the pages' headers,
which are written in Thrift's compact protocol.

mutate_parquet(Path("rows.parquet").read_bytes(), random.Random(7))
"""

from typing import NamedTuple

from mutators import BYTES, INTS, Rng
from mutators_text import read_varint, varint

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12


class Leaf(NamedTuple):
    """Where a value lies: data[start:end]. kind: number, text, byte, count (of a list) or double."""

    kind: str
    start: int
    end: int
    value: int = 0


def leaves(data: bytes, at: int) -> tuple[list[Leaf], int]:
    """Of the struct at this place, and where it ends."""
    found: list[Leaf] = []
    while True:
        head = data[at]
        at += 1
        if head == 0:
            return found, at
        if head >> 4 == 0:
            _, at = read_varint(data, at)
        more, at = values(data, at, head & 15)
        found += more


def values(data: bytes, at: int, kind: int, within: bool = False) -> tuple[list[Leaf], int]:
    if kind in (TRUE, FALSE):
        return [Leaf("byte", at - 1, at, data[at - 1])], at + within
    if kind == BYTE:
        return [Leaf("byte", at, at + 1, data[at])], at + 1
    if kind == DOUBLE:
        return [Leaf("double", at, at + 8)], at + 8
    if kind == BINARY:
        size, start = read_varint(data, at)
        return [Leaf("text", at, start + size, start)], start + size
    if kind == STRUCT:
        return leaves(data, at)
    if kind in (LIST, SET):
        head, start = data[at], at
        size, at = (head >> 4, at + 1) if head >> 4 != 15 else read_varint(data, at + 1)
        found = [Leaf("count", start, at, head & 15)]
        for _ in range(size):
            more, at = values(data, at, head & 15, True)
            found += more
        return found, at
    value, end = read_varint(data, at)
    return [Leaf("number", at, end, value)], end


def other(leaf: Leaf, data: bytes, rng: Rng) -> bytes:
    if leaf.kind == "number":
        number = leaf.value >> 1 ^ -(leaf.value & 1)  # zigzag
        number = rng.choice((number + 1, number - 1, number * 2, -number, *INTS))
        return varint((number << 1) ^ (number >> 63))
    if leaf.kind == "text":
        text = data[leaf.value : leaf.end]
        text = rng.choice((text + b"x", text[:-1], *BYTES))
        size = len(text) if rng.random() < 0.9 else rng.choice(INTS)
        return varint(size) + text
    if leaf.kind == "count":
        return rng.choice((b"\xfc" + varint(rng.choice(INTS)), bytes([rng.randrange(256)])))
    return bytes(rng.randrange(256) for _ in range(leaf.end - leaf.start))


def changed(data: bytes, at: int, rng: Rng) -> tuple[bytes, int]:
    """Other bytes, of which the struct at this place differs; and how many more they are."""
    found, _ = leaves(data, at)
    leaf = rng.choice(found)
    new = other(leaf, data, rng)
    return data[: leaf.start] + new + data[leaf.end :], len(new) - (leaf.end - leaf.start)


def mutate_parquet(data: bytes, rng: Rng) -> bytes:
    size = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - size], data[-8 - size : -8]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        action = rng.randrange(10)
        try:
            if action <= 6:
                footer, _ = changed(footer, 0, rng)
            elif action == 7:  # the first page's header; what follows keeps its place
                new, more = changed(body, 4, rng)
                body = new if more == 0 else new[: len(body)]
            elif action == 8 and len(body) > 8:
                at = rng.randrange(4, len(body))
                body = body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1 :]
            else:
                body = rng.choice((body[: len(body) // 2], body + b"\0" * 64, body[:4]))
        except IndexError:  # it is none any more
            break
    length = len(footer) if rng.random() < 0.97 else rng.choice(INTS) % 2**32
    return body + footer + length.to_bytes(4, "little") + b"PAR1"
