"""Candidates by name: `nanollama`, `module:attr`, `file.py:attr`, `cmd:PROGRAM ...`, `http://host:port/v1`.

`resolve` turns a name into the paths to check: {path: load}, where load(checkpoint, dtype, device) gives a candidate
(see parity/contract.py). Everything that knows `nanollama` lives in this package.
"""

from collections.abc import Callable
from typing import Any

import torch

from parity.contract import UsageError

Load = Callable[[str, torch.dtype, str], Any]


def resolve(name: str) -> dict[str | None, Load]:
    """The candidate's paths by label (None: its only one). Raises UsageError for a name that leads nowhere."""
    if name == "nanollama":
        from parity.candidates.nano import PATHS

        paths: dict[str | None, Load] = {label: load for label, load in PATHS.items()}  # noqa: C416 (widens the key)
        return paths
    if name.startswith(("cmd:", "http://", "https://")):
        raise UsageError(f"candidate {name!r}: programs and endpoints cannot be checked yet; wrap it as file.py:load")
    if ":" not in name:
        raise UsageError(f"candidate {name!r} is unknown: expected nanollama, module:attr or file.py:attr")
    from parity.candidates.python import load_attribute

    return {None: load_attribute(name)}
