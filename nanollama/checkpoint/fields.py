"""Typed, strict reading of params.json and config.json: every key is asked for by name, what is left over is an error.

python -c "from nanollama.checkpoint.fields import read_json; print(read_json('DIR/params.json')['dim'])"
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanollama import gate
from nanollama.checkpoint.weights import CheckpointError
from nanollama.gate.documents import read_json

__all__ = ["REQUIRED", "Fields", "read_json"]
REQUIRED: Any = object()


class Fields:
    """One JSON object whose keys are taken one by one; `finish` refuses the rest by name."""

    def __init__(self, path: Path, found: dict[str, Any], inside: str = "") -> None:
        self.path, self._left, self._inside = path, dict(found), inside

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def raw(self, key: str) -> Any:
        """The value of a key that is not taken yet, and stays; None where there is none."""
        return self._left.get(key)

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The raw value; null counts as absent."""
        value = self._left.pop(key, None)
        if value is None and default is REQUIRED:
            raise self.error(key, "is missing: the architecture cannot be known without it")
        return default if value is None else value

    def checked(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        """A value that fits; the error names what was expected."""
        value = self.take(key, default)
        if value is not default and not fits(value):
            raise self.error(key, f"is {gate.shown(value)}: expected {expected}")
        return value

    def integer(self, key: str, default: Any = REQUIRED, alias: int | None = None) -> Any:
        """An integer from 1 on; `alias` is one other value that is allowed too."""
        fits = lambda value: type(value) is int and (1 <= value < 2**31 or value == alias)
        return self.checked(key, default, fits, "an integer from 1 to 2^31")

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A positive finite number, as a float."""
        fits = lambda value: type(value) in (int, float) and 0 < value < 1e30
        value = self.checked(key, default, fits, "a positive number")
        return value if value is default else float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        return self.checked(key, default, lambda value: type(value) is bool, "true or false")

    def section(self, key: str) -> "Fields | None":
        """A nested object, None when absent."""
        found = self.checked(key, None, lambda value: type(value) is dict, "an object {...} or null")
        return None if found is None else Fields(self.path, found, f"{self._inside}{key}.")

    def left(self) -> list[tuple[str, Any]]:
        """The keys that were not taken."""
        return list(self._left.items())

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse every key that was not taken, is not `harmless`, and is not switched off (null or false)."""
        for key, value in self._left.items():
            if key not in harmless and value is not None and value is not False:
                raise self.error(
                    key, f"is {gate.shown(value)}, which this implementation does not know: it may change the model"
                )

    def error(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(self.path, f"{self._inside}{key[:60]} {what}")
