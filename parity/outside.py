"""The user's own Python, looked at from outside: a file imported, a line found in a traceback, a signature read.

The standard library alone, and old Pythons: parity/serve.py takes this into the candidate's own environment.

    load = load_attribute("my_port.py:load")
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

OURS = str(Path(__file__).resolve().parent)
LIBRARIES = tuple(dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib")))


class Unusable(ValueError):
    """What the user named is not there or cannot be imported; one line."""


# --- The user's own file ---------------------------------------------------------------------------------------------


def load_attribute(name: str) -> Any:
    """The callable that `module:attr` or `file.py:attr` names, load(checkpoint, dtype, device). Raises Unusable."""
    where, attribute, module = _module(name)
    load = _attribute(name, where, attribute, module)
    _require_three(name, load)
    return load


def _module(name: str) -> tuple[str, str, ModuleType]:
    where, _, attribute = name.rpartition(":")
    return where, attribute, _from_file(Path(where)) if where.endswith(".py") else _from_module(where)


def _attribute(name: str, where: str, attribute: str, module: ModuleType) -> Any:
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(names[:12]) or 'none'}"
        raise Unusable(f"candidate {name!r}: {where} has no callable {attribute!r}; {hint}")
    return found


def imported(name: str) -> Any:
    """Whatever callable `name` points to, of any signature. Raises Unusable."""
    return _attribute(name, *_module(name))


def _require_three(name: str, load: Any) -> None:
    """Raises Unusable for a callable that does not take (checkpoint, dtype, device)."""
    try:
        signature = inspect.signature(load)
    except (TypeError, ValueError):
        return  # written in C: it is tried
    try:
        signature.bind("checkpoint", "dtype", "device")
    except TypeError:
        expected = "a function of (checkpoint, dtype, device) that returns the model"
        raise Unusable(f"candidate {name!r} takes {signature}: expected {expected}") from None


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Unusable(f"candidate file {path} does not exist")
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path[:0] = [str(path.parent.resolve()), ""]  # its neighbours can be imported, and packages of this folder
    sys.modules[name] = module  # dataclasses, pickle and torch.compile look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise Unusable(f"candidate file {path} fails when imported: {told(error, str(path))}") from error
    return module


def _module_name(path: Path) -> str:
    """The file's own, so that its neighbours that import it get the same module; another where that is taken."""
    taken = path.stem in sys.modules or importlib.util.find_spec(path.stem.replace(".", "_")) is not None
    plain = re.sub(r"\W", "_", path.stem)
    return f"candidate_{plain}" if taken or plain != path.stem else plain


def _from_module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        said = str(error) if isinstance(error, ImportError) else what(error)
        raise Unusable(f"candidate module {name!r} cannot be imported: {said}") from error


# --- What went wrong in it -------------------------------------------------------------------------------------------


def what(error: BaseException) -> str:
    """Type and first line of an exception."""
    said = str(error).strip().splitlines()
    return type(error).__name__ + (f": {said[0].strip()}" if said else "")


def told(error: BaseException, file: str | None) -> str:
    """The same with the user's own line: "ValueError: no kernel (my_port.py:17)"."""
    where = own_frame(error.__traceback__, file)
    return what(error) + (f" ({where})" if where else "")


def own_frame(tb: TracebackType | None, file: str | None) -> str | None:
    """The innermost line of the candidate's own file; else of any that is neither a library's nor the harness's."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(tb)]
    mine = [f for f in frames if file is not None and Path(f[0]).resolve() == Path(file).resolve()]
    others = [f for f in frames if not f[0].startswith((OURS, *LIBRARIES, sys.prefix, "<"))]
    chosen = (mine or others)[-1:]
    return f"{Path(chosen[0][0]).name}:{chosen[0][1]}" if chosen else None


# --- Its methods -----------------------------------------------------------------------------------------------------


def misfit(value: Any, name: str, takes: Sequence[Sequence[str]]) -> str | None:
    """Why `value` is not the interface's method `name`; None where it is. `takes`: the names of each parameter."""
    if not callable(value):
        return f"it is {kind_of(value)}"
    if name == "__call__":
        return None
    routine = inspect.isroutine(value) or hasattr(value, "__wrapped__") or hasattr(value, "func")
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return "its signature cannot be read"
    said = f"it takes ({', '.join(str(p).split(':')[0].split('=')[0].strip() for p in parameters)})"
    if not routine:
        return f"it is {kind_of(value)}"
    if parameters and parameters[0].kind is parameters[0].VAR_POSITIONAL:
        return None  # says nothing against it
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    extra = [p for p in parameters if p not in positional[: len(takes)] and p.default is p.empty]
    if len(positional) < len(takes) or any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in extra):
        return said
    fits = all(p.kind is p.POSITIONAL_ONLY or p.name.strip("_") in names for p, names in zip(positional, takes))  # noqa: B905
    return None if fits else said


def kind_of(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
