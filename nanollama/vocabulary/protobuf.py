"""The part of protobuf that a sentencepiece model needs: reading and writing its fields.

python -c "from nanollama.vocabulary.protobuf import fields, field; print(list(fields(field(3, 300))))"   # [(3, 300)]

Source: protobuf.dev, encoding.
"""

from collections.abc import Iterator

from nanollama.vocabulary.value import TokenizerError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) of each field of a message; raises TokenizerError where it is broken."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _read_varint(data, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire == LENGTH:
            size, at = _read_varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise TokenizerError(f"unknown wire type {wire} at byte {at}")
        if number == 0 or size > len(data) - at:
            raise TokenizerError(f"field {number} at byte {at} needs {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it)."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise TokenizerError("a number is cut off or too long")


def number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TokenizerError("a number was expected, found bytes")
    return value


def raw(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TokenizerError("bytes were expected, found a number")
    return value


def field(number: int, value: int | bytes) -> bytes:
    """One field of a message, as bytes."""
    if isinstance(value, bytes):
        return key(number, LENGTH) + _varint(len(value)) + value
    return key(number, VARINT) + _varint(value & (1 << 64) - 1)


def key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
