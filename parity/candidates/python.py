"""A candidate from the user's own Python: `module:attr` or `file.py:attr`, attr being load(ckpt, dtype, device)."""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from parity.contract import UsageError
from parity.crash import Crashed


def load_attribute(name: str) -> Any:
    """The callable that `name` points to. Raises UsageError (one line) when there is none."""
    where, _, attribute = name.rpartition(":")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    load = getattr(module, attribute, None)
    if not callable(load):
        names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(names[:12]) or 'none'}"
        raise UsageError(f"candidate {name!r}: {where} has no callable {attribute!r}; {hint}")
    _require_three(name, load)
    return load


def _require_three(name: str, load: Any) -> None:
    """Raises UsageError for a callable that does not take (checkpoint, dtype, device)."""
    try:
        signature = inspect.signature(load)
    except (TypeError, ValueError):
        return  # written in C: it is tried
    try:
        signature.bind("checkpoint", "dtype", "device")
    except TypeError:
        expected = "a function of (checkpoint, dtype, device) that returns the model"
        raise UsageError(f"candidate {name!r} takes {signature}: expected {expected}") from None


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"candidate file {path} does not exist")
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # the file's own neighbours can be imported
    sys.modules[name] = module  # dataclasses, pickle and torch.compile look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"candidate file {path} fails when imported: {_said(error, path)}") from error
    return module


def _module_name(path: Path) -> str:
    """The file's own, so that its neighbours that import it get the same module; another where that is taken."""
    taken = path.stem in sys.modules or importlib.util.find_spec(path.stem.replace(".", "_")) is not None
    plain = re.sub(r"\W", "_", path.stem)
    return f"candidate_{plain}" if taken or plain != path.stem else plain


def _said(error: BaseException, path: Path) -> str:
    """The first line of what it raised, and the file's own line."""
    crash = Crashed.of(error, "import", str(path))
    return crash.reason.removeprefix("import raised ") + (f" ({crash.where})" if crash.where else "")


def _from_module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        said = str(error) if isinstance(error, ImportError) else Crashed.of(error, "import", None).reason
        raise UsageError(f"candidate module {name!r} cannot be imported: {said}") from error
