"""Command lines from typed functions: the signature is the interface, and nothing runs before the whole line is valid.

    def train(data: str, *, lr: float = 3e-4, compile: bool = True): ...     python train.py DATA --lr 1e-3 --nocompile

A parameter without a default is required and may be given by place or as a flag; the others are flags: `--lr 1e-3`,
`--lr=1e-3`, `--compile`, `--nocompile`, `--compile=false`; dashes and underscores are the same. Types are read from the
annotations, so text stays the text that was typed. `list[str]` takes one item per flag, repeated; other lists are split
at commas. The comment behind a parameter or dataclass field is its line in `--help`. A parameter whose default is a
frozen dataclass stands for the fields of it: flags that several commands share are declared once.

Fire calls the function before it has read the whole line and turns `--prompt 123` into a number; argparse knows no
parameter that may come by place or by name. What both miss is the one loop in `parse`.

What the user can mend is one line on stderr and exit code 2 (NANOLLAMA_DEBUG=1 shows the traceback instead).

    $ python -m nanollama generate --ckpt DIR --max_new_token 5
    error: unknown flag --max_new_token; did you mean --max_new_tokens? (see --help)
"""

import difflib
import inspect
import io
import os
import sys
import tokenize
import types
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from nanollama import __version__

WORDS_FOR_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NAMES_OF_TYPES = {int: "a whole number", float: "a number", bool: "true or false"}
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class UsageError(ValueError):
    """The command line itself is wrong; the message ends in where to look."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} (see --help)")


@dataclass(frozen=True)
class Command:
    """What to call, and the function or dataclass whose signature says with which flags."""

    call: Callable[..., object]
    spec: Callable[..., object]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # in place of those in the signature

    def parameters(self) -> dict[str, inspect.Parameter]:
        hints, groups = typing.get_type_hints(self.spec), self.groups()
        found: dict[str, inspect.Parameter] = {}
        for name, parameter in inspect.signature(self.spec).parameters.items():
            if name in groups:
                found |= Command(self.call, type(groups[name]), vars(groups[name])).parameters()
                continue
            default = self.defaults.get(name, parameter.default)
            found[name] = parameter.replace(annotation=hints[name], default=default)
        return found

    def groups(self) -> dict[str, Any]:
        """The parameters that are dataclasses, each by its default: their fields are flags like the others."""
        parameters = inspect.signature(self.spec).parameters
        return {name: p.default for name, p in parameters.items() if is_dataclass(p.default)}

    def run(self, values: dict[str, Any]) -> object:
        for name, default in self.groups().items():
            given = {field: values.pop(field) for field in vars(default) if field in values}
            values[name] = replace(default, **given)
        return self.call(**values)


def run(
    commands: Callable[..., object] | Mapping[str, Callable[..., object]],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
) -> NoReturn:
    """Run the function, or the one that the first argument names, and exit with the int that it returns, else 0."""
    if callable(commands):
        _exit_with(Command(commands, commands), argv, prog)
    table = {name: Command(function, function) for name, function in commands.items()}
    _exit_with(table, argv, prog)


def run_config(
    config_class: Callable[..., Any],
    main: Callable[[Any], object],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Flags from the fields of a frozen dataclass, then `main(config)`; `defaults` are this program's own."""

    def call(**values: Any) -> object:
        return main(config_class(**{**(defaults or {}), **values}))

    _exit_with(Command(call, config_class, defaults or {}), argv, prog)


def _exit_with(target: Command | dict[str, Command], argv: Sequence[str] | None, prog: str) -> NoReturn:
    args = list(sys.argv[1:] if argv is None else argv)
    prog = prog or _program_name()
    debug = os.environ.get("NANOLLAMA_DEBUG") == "1"
    try:
        code = _dispatch(target, args, prog)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Point stdout elsewhere, or Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _dispatch(target: Command | dict[str, Command], args: list[str], prog: str) -> int:
    if "--version" in args[:1]:
        print(f"nanollama {__version__}")
        return 0
    if isinstance(target, Command):
        return _run_command(target, args, prog)
    if not args or args[0] in ("--help", "-h", "help"):
        print(f"usage: {prog} COMMAND [--help] [--flag value ...]\n\ncommands:")
        for name, command in target.items():
            print(f"  {name:10} {_first_line(command.spec)}")
        return 0 if args else 2
    if args[0] not in target:
        raise UsageError(f"unknown command {args[0]}{_did_you_mean(args[0], target)}")
    return _run_command(target[args[0]], args[1:], f"{prog} {args[0]}")


def _run_command(command: Command, args: list[str], prog: str) -> int:
    if "--help" in args or "-h" in args:
        print(help_text(command, prog))
        return 0
    result = command.run(parse(args, command.parameters()))
    return result if type(result) is int else 0


def parse(args: list[str], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The values given on the command line, each of its parameter's type. Raises UsageError."""
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    queue = deque(args)
    while queue:
        arg = queue.popleft()
        if arg == "--":
            loose += queue
            break
        if not arg.startswith("--"):
            loose.append(arg)
            continue
        typed, equals, text = arg[2:].partition("=")
        name, negated = _find_flag(typed, parameters)
        if negated and equals:
            raise UsageError(f"--{typed} takes no value")
        if not equals and _is_bool(parameters[name]):
            says = queue and queue[0].lower() in ("true", "false")
            text = "false" if negated else queue.popleft() if says else "true"
        elif not equals:
            if not queue:
                raise UsageError(f"--{name} needs a value: {_type_name(parameters[name].annotation)}")
            text = queue.popleft()
        given.setdefault(name, []).append(text)

    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if len(loose) > len(missing):
        raise UsageError(f"unexpected argument {loose[len(missing)]!r}")
    if len(loose) < len(missing):
        raise UsageError(f"--{missing[len(loose)]} is missing")
    given.update((name, [text]) for name, text in zip(missing, loose, strict=True))
    return {name: _value(name, texts, parameters[name].annotation) for name, texts in given.items()}


def _find_flag(typed: str, parameters: Mapping[str, inspect.Parameter]) -> tuple[str, bool]:
    """(name of the parameter, whether it was typed as --no...)."""
    name = typed.replace("-", "_")
    if name in parameters:
        return name, False
    positive = name.removeprefix("no").removeprefix("_")
    if name.startswith("no") and positive in parameters and _is_bool(parameters[positive]):
        return positive, True
    raise UsageError(f"unknown flag --{typed}{_did_you_mean(name, parameters, '--')}")


def _value(name: str, texts: list[str], annotation: Any) -> Any:
    try:
        if _takes_one_item_per_flag(annotation):
            return texts
        return read_value(texts[-1], annotation)
    except ValueError as error:
        raise UsageError(f"--{name}: {error}") from None


def read_value(text: str, annotation: Any) -> Any:
    """Text as the annotated type; the ValueErrors that it raises say what was expected."""
    kind = _without_none(annotation)
    if kind is not annotation and kind is not str and text.lower() == "none":
        return None
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):  # `list[T]` and `tuple[T, ...]` of any length, `tuple[T, T]` of just that many
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if len(inner) > 1 and inner[-1] is not Ellipsis and len(parts) != len(inner):
            raise ValueError(f"expected {len(inner)} values with commas between, not {text!r}")
        return origin(read_value(part, inner[0]) for part in parts)
    assert origin is Literal or kind in (str, int, float, bool, Path), f"no way to read a flag of type {annotation}"
    try:
        if origin is Literal:
            return {str(choice): choice for choice in inner}[text]
        return WORDS_FOR_BOOL[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = NAMES_OF_TYPES.get(kind) or f"one of {', '.join(map(str, inner))}"
        raise ValueError(f"expected {expected}, not {text!r}") from None


def _is_bool(parameter: inspect.Parameter) -> bool:
    return _without_none(parameter.annotation) is bool


def _takes_one_item_per_flag(annotation: Any) -> bool:
    return _without_none(annotation) == list[str]


def _without_none(annotation: Any) -> Any:
    """T of `T | None`; other annotations as they are."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    assert len(kinds) == 1, f"a flag has one type, not {annotation}"
    return kinds[0]


def _type_name(annotation: Any) -> str:
    kind = _without_none(annotation)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        item = _type_name(typing.get_args(kind)[0])
        return item if _takes_one_item_per_flag(kind) else f"{item},..."
    return kind.__name__.upper()


def help_text(command: Command, prog: str) -> str:
    parameters, comments = command.parameters(), _comments(command.spec)
    for group in command.groups().values():
        comments |= _comments(type(group))
    required = [name.upper() for name, p in parameters.items() if p.default is p.empty]
    lines = [" ".join(["usage:", prog, *required, "[--flag value ...]"]), "", inspect.getdoc(command.spec) or "", ""]
    for name, parameter in parameters.items():
        flag = f"--[no]{name}" if _is_bool(parameter) else f"--{name} {_type_name(parameter.annotation)}"
        lines.append(" ".join(filter(None, [f"  {flag:34}", comments.get(name), _default_note(parameter)])).rstrip())
    return "\n".join(lines)


def _default_note(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "(required)"
    # A dataclass field with a default_factory has no value to show here.
    shown = parameter.default is not None and type(parameter.default).__name__ != "_HAS_DEFAULT_FACTORY_CLASS"
    return f"(default: {parameter.default})" if shown else ""


def _comments(spec: Callable[..., object]) -> dict[str, str]:
    """The comment at the end of each line of the source -> {first word of the line: comment}."""
    found: dict[str, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(spec)).readline):
        if token.type == tokenize.COMMENT:
            name = token.line.strip().partition(":")[0]
            found.setdefault(name, token.string.lstrip("# "))
    return found


def _did_you_mean(name: str, known: Mapping[str, object], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _first_line(spec: Callable[..., object]) -> str:
    return (inspect.getdoc(spec) or "").partition("\n")[0]


def _program_name() -> str:
    """`python -m package` as it was typed, or the name of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
