"""A candidate from the user's own Python: `module:attr` or `file.py:attr`, attr being load(ckpt, dtype, device)."""

from typing import Any

from parity import outside
from parity.contract import UsageError


def load_attribute(name: str) -> Any:
    """The callable that `name` points to. Raises UsageError (one line) when there is none."""
    try:
        return outside.load_attribute(name)
    except outside.Unusable as error:
        raise UsageError(str(error)) from error
