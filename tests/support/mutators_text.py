"""Structure-aware changes of vocabulary files and of llama2.c's checkpoints; see mutators.py.

mutate_protobuf(Path("tokenizer.model").read_bytes(), random.Random(7))
"""

import base64
import struct
from typing import Any

from mutators import BYTES, FLOATS, INTS, Rng, other_number, pack

NESTED = (1, 2, 3, 4, 5)  # messages of a sentencepiece model: pieces, trainer, normalizer, test, denormalizer


def varint(value: int) -> bytes:
    out, value = b"", value % 2**70
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def fields(data: bytes) -> list[list[Any]]:
    """[number, wire type, value] of each field."""
    at, found = 0, []
    while at < len(data):
        key, at = read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: Any
            value, at = read_varint(data, at)
        elif wire == 2:
            size, at = read_varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[wire]
            value, at = data[at : at + size], at + size
        found.append([number, wire, value])
    return found


def joined(found: list[list[Any]], rng: Rng) -> bytes:
    out = b""
    for number, wire, value in found:
        out += varint(number << 3 | wire)
        if wire == 0:
            out += varint(value)
        elif wire == 2:
            size = len(value) if rng.random() < 0.999 else rng.choice(INTS)
            out += varint(size) + value
        else:
            out += value
    return out


def mutate_fields(data: bytes, rng: Rng, depth: int = 0) -> bytes:
    found = fields(data)
    if not found:
        return rng.choice(BYTES)
    at, action = rng.randrange(len(found)), rng.randrange(8)
    field = found[at]
    if depth == 0 and field[0] in NESTED and field[1] == 2 and rng.random() < 0.8:
        if rng.random() < 0.3:  # the few that are not pieces
            field = rng.choice([f for f in found if f[0] != 1 and f[1] == 2] or [field])
        if field[2]:
            field[2] = mutate_fields(field[2], rng, 1)
    elif action == 0:
        del found[at]
    elif action == 1:
        found[at:at] = [list(field)] * rng.choice((1, 2, 500))
    elif action == 2:
        field[0] = rng.choice((1, 2, 3, 4, 5, 24, 40, 999))
    elif field[1] == 0:
        field[2] = other_number(field[2], rng)
    elif field[1] == 2:
        field[2] = rng.choice((field[2] + b"x", field[2][:-1], field[2] * 2, *BYTES))
    elif field[1] == 5:
        field[2] = struct.pack(
            "<f", rng.choice([x for x in FLOATS if abs(x) < 3.5e38 or x != x or abs(x) == float("inf")])
        )
    return joined(found, rng)


def mutate_protobuf(data: bytes, rng: Rng) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = mutate_fields(data, rng)
        except (IndexError, KeyError):  # a length that was changed
            return data
    return data


def mutate_ranks(data: bytes, rng: Rng) -> bytes:
    """tiktoken's lines: base64 of a token, its rank."""
    lines = [line.split(b" ") for line in data.splitlines()]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        line, action = rng.choice(lines), rng.randrange(8)
        if action == 0:
            lines.remove(line)
        elif action == 1:
            lines.insert(rng.randrange(len(lines)), list(rng.choice(lines)))
        elif action == 2:
            line[0] = base64.b64encode(rng.choice(BYTES))
        elif action == 3:
            line[0] = rng.choice((line[0][:-1], line[0] + b"=", b"", b"\xff", b"!" * 8))
        elif action == 4:
            line += [b"7"]
        elif action == 5:
            rng.shuffle(lines)
        else:
            rank = int(line[1]) if len(line) > 1 and line[1].isdigit() else 0
            line[1:] = [rng.choice((b"", b"x", b"1e3", b"-0", str(other_number(rank, rng)).encode()))]
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n")).join(b" ".join(line) for line in lines) + b"\n"


def mutate_bin_tokens(data: bytes, rng: Rng) -> bytes:
    """llama2.c's tokenizer.bin: the longest token's length, then a score, a length and a text for each token."""
    longest, at, entries = data[:4], 4, []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        entries.append([score, size, data[at + 8 : at + 8 + size]])
        at += 8 + size
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        entry, action = rng.choice(entries), rng.randrange(7)
        if action == 0:
            entry[0] = rng.choice(FLOATS)
        elif action == 1:
            entry[1] = rng.choice(INTS)
        elif action == 2:
            entry[2] = rng.choice((entry[2] + b"x", entry[2][:-1], *BYTES))
            entry[1] = len(entry[2])
        elif action == 3:
            entries.remove(entry)
        elif action == 4:
            entries.insert(rng.randrange(len(entries)), list(rng.choice(entries)))
        elif action == 5:
            longest = pack("<I", rng.choice(INTS))
        else:
            entries = entries[: rng.randrange(1, len(entries) + 1)]
    return longest + b"".join(pack("<f", s) + pack("<i", n) + text for s, n, text in entries)


def mutate_bin(data: bytes, rng: Rng, at: int = 0) -> bytes:
    """llama2.c's checkpoint: seven numbers, behind a magic number and a version in later ones, then floats."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        action, place = rng.randrange(8), at + 4 * rng.randrange(7 if at == 0 else 9)
        (value,) = struct.unpack_from("<i", out, place)
        if action <= 4:
            out[place : place + 4] = pack("<i", other_number(value, rng))
        elif action == 5:
            del out[-rng.choice((1, 4, len(out) // 2)) :]
        elif action == 6:
            out += b"\0" * rng.choice((1, 4, 64))
        else:
            end = min(256, len(out) - 4)
            out[end : end + 4] = struct.pack("<f", rng.choice((0.0, 1.0, float("nan"), float("inf"))))
        if len(out) < 64:
            break
    return bytes(out)
