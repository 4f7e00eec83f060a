"""A candidate from the user's own Python: `module:attr` or `file.py:attr`, attr being load(ckpt, dtype, device)."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from parity.contract import UsageError


def load_attribute(name: str) -> Any:
    """The callable that `name` points to. Raises UsageError (one line) when there is none."""
    where, _, attribute = name.rpartition(":")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    load = getattr(module, attribute, None)
    if not callable(load):
        names = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise UsageError(f"candidate {name!r}: {where} has no callable {attribute!r}; it has: {names or 'none'}")
    return load


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"candidate file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # the file's own neighbours can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"candidate file {path} fails when imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"candidate module {name!r} cannot be imported: {error}") from error
