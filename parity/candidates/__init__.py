"""Candidates by name: `nanollama`, `module:attr`, `file.py:attr`, `torch:file.py:Class`, `hf:FOLDER`,
`env:PYTHON file.py:attr`, `cmd:PROGRAM ...`, `http://host:port/v1`.

`resolve` turns a name into the paths to check: {path: load}, where load(checkpoint, dtype, device) gives a candidate
(see parity/contract.py). What knows `nanollama` lives in nano/.
"""

from collections.abc import Callable
from typing import Any

import torch

from parity.candidates.limits import split_limits
from parity.contract import UsageError

Load = Callable[[str, torch.dtype, str], Any]


def labels(name: str) -> list[str | None]:
    """The labels of the candidate's paths. A user's code is not imported for it."""
    return list(resolve(name)) if name == "nanollama" else [None]


def is_python(name: str) -> bool:
    """Whether resolving the name imports code of the user's."""
    return ":" in name and not name.startswith(("limits:", "cmd:", "hf:", "env:", "http://", "https://"))


def resolve(name: str) -> dict[str | None, Load]:
    """The candidate's paths by label (None: its only one). Raises UsageError for a name that leads nowhere."""
    limits, name = split_limits(name)
    if name == "nanollama":
        from parity.candidates.nano.model import PATHS

        paths: dict[str | None, Load] = {label: load for label, load in PATHS.items()}  # noqa: C416 (widens the key)
        return paths
    if name.startswith("cmd:"):
        from parity.candidates.command import command_loader

        return {None: command_loader(name.removeprefix("cmd:"), limits)}
    if name.startswith("torch:"):
        from parity.candidates.module.loading import module_loader

        return {None: module_loader(name.removeprefix("torch:"))}
    if name.startswith("hf:"):
        from parity.candidates.module.loading import transformers_loader

        return {None: transformers_loader(name.removeprefix("hf:"))}
    if name.startswith("env:"):
        from parity.candidates.environment import environment_loader

        return {None: environment_loader(name.removeprefix("env:"), limits)}
    if name.startswith(("http://", "https://")):
        from parity.candidates.server.endpoint import endpoint_loader

        return {None: endpoint_loader(name, limits)}
    if ":" not in name:
        known = (
            "nanollama, module:attr, file.py:attr, torch:file.py:Class, hf:FOLDER, cmd:PROGRAM or http://host:port/v1"
        )
        raise UsageError(f"candidate {name!r} is unknown: expected {known}")
    from parity.candidates.python import load_attribute

    return {None: load_attribute(name)}
