"""How long a program or a server may take to answer, and how much it may say.

    python -m parity.check --candidate "cmd:./my_port {ckpt}" --answer_s 7200

A name that stands for other limits than the usual carries them in front: `limits:1800:7200:67108864 cmd:./my_port`.
"""

import math
from dataclasses import dataclass

from parity.contract import UsageError

PREFIX = "limits:"
MIB = 1 << 20
OUTSIDE = ("cmd:", "env:", "http://", "https://")  # what answers over a pipe or a socket


@dataclass(frozen=True)
class Limits:
    """Of one answer: seconds to its first byte and to its last, and bytes."""

    first_byte_s: float
    answer_s: float
    answer_bytes: int = 64 * MIB  # a thousand positions with twenty log-probabilities each are 2 MiB

    def __str__(self) -> str:
        return f"{self.first_byte_s:g}:{self.answer_s:g}:{self.answer_bytes}"


PROGRAM = Limits(1800, 3600)  # its first answer waits for the checkpoint to be read, by a port that may be a slow one
SERVER = Limits(300, 600)


def usual(name: str) -> Limits:
    return SERVER if name.startswith(("http://", "https://")) else PROGRAM


def limited(name: str, first_byte_s: float | None, answer_s: float | None, answer_mb: float | None) -> str:
    """The name of a candidate with these limits; None: as usual. Raises UsageError."""
    given = {"first_byte_s": first_byte_s, "answer_s": answer_s, "answer_mb": answer_mb}
    for flag, value in given.items():
        if value is None:
            continue
        if not name.startswith(OUTSIDE):
            raise UsageError(f"--{flag} is a program's or a server's: --candidate {name} is neither")
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{flag} {value:g}: expected more than 0")
    if all(value is None for value in given.values()):
        return name
    standard = usual(name)
    whole = answer_s or max(standard.answer_s, first_byte_s or 0)
    first = first_byte_s or min(standard.first_byte_s, whole)
    if first > whole:
        raise UsageError(f"--first_byte_s {first:g}: expected at most --answer_s, which is {whole:g}")
    return f"{PREFIX}{Limits(first, whole, int(answer_mb * MIB) if answer_mb else standard.answer_bytes)} {name}"


def split_limits(name: str) -> tuple[Limits, str]:
    """The limits of a candidate and its name without them. Raises UsageError."""
    if not name.startswith(PREFIX):
        return usual(name), name
    numbers, _, rest = name.removeprefix(PREFIX).partition(" ")
    try:
        first, whole, most = numbers.split(":")
        return Limits(float(first), float(whole), int(most)), rest
    except ValueError:
        raise UsageError(f"candidate {name}: expected {PREFIX}FIRST_BYTE_S:ANSWER_S:BYTES and a name") from None
