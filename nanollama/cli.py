"""Command lines from typed functions, on fire: the signature is the interface; nothing runs before the line is valid.

    def train(data: str, *, lr: float = 3e-4, compile: bool = True): ...     python train.py DATA --lr 1e-3 --nocompile

A parameter without a default is required and may be given by place or as a flag; the others are flags: `--lr 1e-3`,
`--lr=1e-3`, `--compile`, `--nocompile`, `--compile=false`; dashes and underscores are the same. Types are read from the
annotations, so text stays the text that was typed. `list[str]` takes one item per flag, repeated; other lists are split
at commas. The comment behind a parameter or dataclass field is its line in `--help`. A parameter whose default is a
frozen dataclass stands for the fields of it: flags that several commands share are declared once.

Fire reads the line into the arguments of a function that only returns them; when it has, the command is called. Fire
guesses where a line leaves a choice (is `m` in `--stream m` a value?), so it is given the line spelled out.

What the user can mend is one line on stderr and exit code 2 (NANOLLAMA_DEBUG=1 shows the traceback instead).

    $ python -m nanollama generate --ckpt DIR --max_new_token 5
    error: unknown flag --max_new_token; did you mean --max_new_tokens? (see --help)
"""

import difflib
import errno
import inspect
import io
import os
import re
import sys
import tokenize
import types
import typing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, is_dataclass, replace
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from nanollama import __version__
from nanollama.mapped import said_when_cut
from nanollama.printable import complain, printed

WORDS_FOR_BOOL = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
NAMES_OF_TYPES = {int: "a whole number", float: "a number", bool: "true or false"}
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# What a disk or its mount refuses, for which Python has no class of its own: read-only, gone, full, a name too long.
DISK_WORDS = ("EROFS", "EIO", "ESTALE", "ENAMETOOLONG", "ELOOP", "ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "ENFILE")
OF_A_DISK = frozenset(getattr(errno, word) for word in DISK_WORDS if hasattr(errno, word))
NUL = "\0"  # stands before each text on its way through Fire: the one character that no process finds in an argument
T = TypeVar("T")


class UsageError(ValueError):
    """Unusable input: one line that says what, where and how to mend. Ends in exit code 2."""


def wrong_line(message: str) -> UsageError:
    """The command line itself is wrong: the error says where to look."""
    return UsageError(f"{message} (see --help)")


@dataclass(frozen=True)
class Command:
    """What to call, and the function or dataclass whose signature says with which flags."""

    call: Callable[..., object]
    spec: Callable[..., object]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # in place of those in the signature

    def parameters(self) -> dict[str, Parameter]:
        hints, groups = typing.get_type_hints(self.spec), self.groups()
        found: dict[str, Parameter] = {}
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

    def run(self, args: Sequence[str]) -> object:
        """Read the whole line, then call. Raises UsageError before anything has run."""
        values = parse(args, self.parameters())
        for name, default in self.groups().items():
            given = {field: values.pop(field) for field in vars(default) if field in values}
            values[name] = replace(default, **given)
        return self.call(**values)


Commands = Callable[..., object] | Command | Mapping[str, Callable[..., object]]


def run(commands: Commands, argv: Sequence[str] | None = None, *, prog: str = "", doc: str | None = None) -> NoReturn:
    """Run the function, or the one that the first argument names, and exit with the int that it returns, else 0."""
    sys.exit(execute(commands, argv, prog=prog, doc=doc))


def run_config(
    config_class: Callable[..., Any],
    main: Callable[[Any], object],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Flags from the fields of a frozen dataclass, then `main(config)`; `defaults` are this program's own."""
    run(from_config(config_class, main, defaults), argv, prog=prog)


def from_config(
    config_class: Callable[..., T], main: Callable[[T], object], defaults: Mapping[str, Any] | None = None
) -> Command:
    """The command that makes a config of the line and calls `main(config)`."""

    def call(**values: Any) -> object:
        return main(config_class(**{**(defaults or {}), **values}))

    return Command(call, config_class, defaults or {})


def read(spec: Callable[..., T], args: Sequence[str]) -> T:
    """The config that a line gives. Raises UsageError."""
    return typing.cast(T, Command(spec, spec).run(args))


def execute(
    commands: Commands,
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    doc: str | None = None,
    errors: tuple[type[Exception], ...] = USER_ERRORS,
) -> int:
    """`run`, which returns the exit code. doc: the text of --help; errors: those that the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    with user_errors(errors) as end:
        end.code = _dispatch(commands, args, prog or _program_name(), doc)
    return end.code


@dataclass
class End:
    """How a command ends: the exit code of its process."""

    code: int = 0


@contextmanager
def user_errors(errors: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[End]:
    """What the user can mend becomes one line and exit code 2; an interrupt and a reader that left are codes too."""
    end = End()
    kinds: tuple[type[Exception], ...] = (UsageError, *errors)
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        with said_when_cut(), printed():
            yield end
        sys.stdout.flush()
    except KeyboardInterrupt:
        end.code = 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Point stdout elsewhere, or Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end.code = 141
    except caught as error:
        mendable = isinstance(error, kinds) or getattr(error, "errno", None) in OF_A_DISK
        if os.environ.get("NANOLLAMA_DEBUG") == "1" or not mendable:
            raise
        complain(error)
        end.code = 2


def _dispatch(commands: Commands, args: list[str], prog: str, doc: str | None) -> int:
    if "--version" in args[:1]:
        print(f"{re.split('[ .]', prog.removeprefix('python -m '))[0]} {__version__}")
        return 0
    if isinstance(commands, Mapping):
        if not args or args[0] in ("--help", "-h", "help"):
            print(f"usage: {prog} COMMAND [--help] [--flag value ...]\n\ncommands:")
            print("\n".join(f"  {name:10} {_first_line(command)}" for name, command in commands.items()))
            return 0 if args else 2
        if args[0] not in commands:
            raise wrong_line(f"unknown command {args[0]}{_did_you_mean(args[0], commands)}")
        return _dispatch(commands[args[0]], args[1:], f"{prog} {args[0]}", doc)
    command = commands if isinstance(commands, Command) else Command(commands, commands)
    if "--help" in args or "-h" in args:
        print(help_text(command, prog, doc))
        return 0
    result = command.run(args)
    return result if type(result) is int else 0


# --- Reading a line --------------------------------------------------------------------------------------------------


def parse(args: Sequence[str], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """The values given on the command line, each of its parameter's type. Raises UsageError."""
    from fire import Fire  # half as long to import as --help may take
    from fire.decorators import SetParseFn, SetParseFns

    signature = _signature(parameters)

    def arguments(*placed: Any, **named: Any) -> dict[str, Any]:
        return signature.bind(*placed, **named).arguments

    arguments.__signature__ = signature  # type: ignore[attr-defined]
    SetParseFn(_texts)(arguments)
    SetParseFns(**{name: partial(_value, name, p.annotation) for name, p in parameters.items()})(arguments)
    values: dict[str, Any] = Fire(arguments, spell_out(args, parameters), serialize=lambda _: None)
    if unexpected := values.pop("unexpected", ()):
        raise wrong_line(f"unexpected argument {unexpected[0][0]!r}")
    for name, value in values.items():
        if value is MISSING:
            raise wrong_line(f"--{name} is missing")
    return values


def _signature(parameters: Mapping[str, Parameter]) -> inspect.Signature:
    """As Fire reads it: what is required may come by place, and what is too much is seen."""
    kinds = {True: Parameter.POSITIONAL_OR_KEYWORD, False: Parameter.KEYWORD_ONLY}
    read = [p.replace(kind=kinds[p.default is p.empty], default=MISSING) for p in parameters.values()]
    return inspect.Signature(sorted([*read, Parameter("unexpected", Parameter.VAR_POSITIONAL)], key=lambda p: p.kind))


def spell_out(args: Sequence[str], parameters: Mapping[str, Parameter]) -> list[str]:
    """The line in the one spelling that Fire cannot misread: what comes by place, then each flag once, as --name=TEXTS.

    A NUL before each text keeps Fire from taking it for a flag or for a separator of its own (`-`, `--`), and holds the
    texts of a repeated flag apart. Raises UsageError for a flag that is none and for one without its value.
    """
    placed: list[str] = []
    flags: dict[str, list[str]] = {}
    queue = deque(args)
    while queue:
        arg = queue.popleft()
        if arg == "--":
            placed += queue
            break
        if arg.startswith("--"):
            name, text = _take_flag(arg.removeprefix("--"), queue, parameters)
            flags.setdefault(name, []).append(text)
        else:
            placed.append(arg)
    return [NUL + text for text in placed] + [f"--{name}={NUL}{NUL.join(texts)}" for name, texts in flags.items()]


def _take_flag(arg: str, queue: deque[str], parameters: Mapping[str, Parameter]) -> tuple[str, str]:
    """(name of the parameter, its text), which may be the next argument of the queue."""
    typed, equals, text = arg.partition("=")
    name, negated = _find_flag(typed, parameters)
    if negated and equals:
        raise wrong_line(f"--{typed} takes no value")
    if equals:
        return name, text
    if negated:
        return name, "off"
    kind = _without_none(parameters[name].annotation)
    if kind is bool and (not queue or queue[0].lower() not in ("true", "false", "on", "off")):
        return name, "on"
    if _is_switch(kind) and (not queue or queue[0].startswith("--")):
        return name, "on"
    if not queue:
        raise wrong_line(f"--{name} needs a value: {_type_name(kind)}")
    return name, queue.popleft()


def _find_flag(typed: str, parameters: Mapping[str, Parameter]) -> tuple[str, bool]:
    """(name of the parameter, whether it was typed as --no...)."""
    name = typed.replace("-", "_")
    if name in parameters:
        return name, False
    positive = name.removeprefix("no").removeprefix("_")
    if name.startswith("no") and positive in parameters and _is_switch(parameters[positive].annotation):
        return positive, True
    raise wrong_line(f"unknown flag --{typed}{_did_you_mean(name, parameters, '--')}")


def _did_you_mean(name: str, known: Mapping[str, object], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _texts(spelled: str) -> list[str]:
    return spelled.split(NUL)[1:]


def _value(name: str, annotation: Any, spelled: str) -> Any:
    try:
        texts = _texts(spelled)
        return texts if _takes_one_item_per_flag(annotation) else read_value(texts[-1], annotation)
    except ValueError as error:
        raise wrong_line(f"--{name}: {error}") from None


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


def _is_switch(annotation: Any) -> bool:
    """Whether `--flag` and `--noflag` alone say something: of a bool, and of a choice of on and off."""
    kind = _without_none(annotation)
    return kind is bool or {"on", "off"} <= set(typing.get_args(kind))


def _takes_one_item_per_flag(annotation: Any) -> bool:
    return _without_none(annotation) == list[str]


def _without_none(annotation: Any) -> Any:
    """T of `T | None`; other annotations as they are."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    assert len(kinds) == 1, f"a flag has one type, not {annotation}"
    return kinds[0]


# --- Help ------------------------------------------------------------------------------------------------------------


def help_text(command: Command, prog: str, doc: str | None = None) -> str:
    parameters, comments = command.parameters(), _comments(command.spec)
    for group in command.groups().values():
        comments = _comments(type(group)) | comments
    required = [name.upper() for name, p in parameters.items() if p.default is p.empty]
    about = inspect.cleandoc(doc or inspect.getdoc(command.spec) or "")
    lines = [" ".join(["usage:", prog, *required, "[--flag value ...]"]), "", about, ""]
    for name, parameter in parameters.items():
        kind = _without_none(parameter.annotation)
        flag = f"--[no]{name}" if kind is bool else f"--{name} {_type_name(kind)}"
        comment = comments.get(name, "")
        lines.append(" ".join(filter(None, [f"  {flag:34}", comment, _default_note(parameter, comment)])))
    return "\n".join([*lines, f"  {'--help, --version':34} print and stop"])


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        item = _type_name(typing.get_args(kind)[0])
        return item if _takes_one_item_per_flag(kind) else f"{item},..."
    return kind.__name__.upper()


def _default_note(parameter: Parameter, comment: str) -> str:
    """In words that can be typed; "" where the comment says what happens without the flag."""
    value = parameter.default
    if value is parameter.empty:
        return "(required)"
    if "default:" in comment:
        return ""
    # A dataclass field with a default_factory has no value to show here.
    if value is None or type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "(default: none)"
    shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"(default: {shown or 'empty'})"


def _comments(spec: Callable[..., object]) -> dict[str, str]:
    """The comment at the end of each line of the source -> {first word of the line: comment}."""
    found: dict[str, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(spec)).readline):
        if token.type == tokenize.COMMENT:
            name = token.line.strip().partition(":")[0]
            found.setdefault(name, token.string.lstrip("# "))
    return found


def _first_line(spec: Callable[..., object]) -> str:
    return (inspect.getdoc(spec) or "").partition("\n")[0]


def _program_name() -> str:
    """`python -m package` as it was typed, or the name of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
