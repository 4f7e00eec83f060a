"""What a candidate says that it rounds beyond floating point: the oracle rounds in the same places, and judges by that.

class Port:
    integers = "int8/32"       # weights of the linear layers and the head: a scale for each 32 inputs
    activations = "int8/32"    # the inputs of these layers
    kv = "fp16"                # keys and values
    attention_dtype = "fp16"   # queries, and the attention weights
"""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from parity.contract import UsageError

INTEGERS = r"int[2-8](/[1-9]\d*)?"  # integers of so many bits, one scale for each row or for so many inputs of it
FLOATS = "fp16|bf16|fp8"
ALLOWED = {
    "integers": (INTEGERS, "int8, or int4/32 (a scale for 32 inputs)"),
    "activations": (f"{INTEGERS}|{FLOATS}", "int8, int8/32 (a scale for 32 inputs), fp16, bf16 or fp8"),
    "kv": (f"int8|{FLOATS}", "fp16, bf16, fp8 or int8"),
    "attention_dtype": ("fp16|bf16", "fp16 or bf16"),
}


@dataclass(frozen=True)
class Conditions:
    """None: as in floating point."""

    integers: str | None = None
    activations: str | None = None
    kv: str | None = None
    attention_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            pattern, expected = ALLOWED[name]
            if value is not None and not re.fullmatch(pattern, value):
                raise UsageError(f"the candidate's {name} are {value!r}: expected {expected}")

    @classmethod
    def of(cls, meta: dict[str, Any]) -> "Conditions":
        """From a candidate's trace.json."""
        return cls(**{field.name: meta.get(field.name) for field in fields(cls)})

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        """ "int8" of weights alone, else "int8/32, activations int8/32, kv fp16"."""
        others = [f"{name} {value}" for name, value in asdict(self).items() if value and name != "integers"]
        return ", ".join([*([self.integers] if self.integers else []), *others])

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the oracle."""
        return tuple(word for name, value in asdict(self).items() if value for word in (f"--{name}", value))

    @property
    def quantized(self) -> bool:
        """Whether anything is an integer, and not only a shorter float."""
        return any(value.startswith("int") for value in asdict(self).values() if value)
