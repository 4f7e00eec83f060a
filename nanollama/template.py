"""Chat templates of checkpoints, rendered as transformers renders them, in Jinja's sandbox: programs of strangers.

A template may take SECONDS and make MAX_CHARS; what would go beyond (endless loops, doubled texts, huge widths) is
stopped, and it sees nothing but the messages.

    from nanollama.template import render
    render("{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}", [{"role": "user", "content": "Hi"}])
    # 'user: Hi\\n'

Source: transformers' chat_template_utils.py for the environment (trim_blocks, tojson, strftime_now, generation).
"""

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
MAX_CHARS = 4 * 2**20
MAX_NUMBER = 100_000  # of a width, a count, a factor


class TemplateProblem(ValueError):
    """A template that cannot be rendered; the message is one line."""


class Generation(Extension):
    """{% generation %}: marks what the assistant says; what it says is found otherwise (see nanollama.chat)."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JoinsAsSums(NodeTransformer):
    """a ~ b as a + b of texts: sums pass the sandbox."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        options = {"lineno": node.lineno, "environment": node.environment}
        parts = [nodes.Filter(self.visit(part), "string", [], [], None, None, **options) for part in node.nodes]
        joined: nodes.Expr = parts[0]
        for part in parts[1:]:
            joined = nodes.Add(joined, part, **options)
        return joined


class Sandbox(ImmutableSandboxedEnvironment):
    """Everything that a template computes passes through here."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    deadline = 0.0

    def __init__(self) -> None:
        loop = "jinja2.ext.loopcontrols"
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loop])
        self.filters = {name: self._bounded(f) for name, f in (self.filters | {"tojson": to_json}).items()}
        self.filters["format"] = self._format
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "joiner", "cycler")}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}

    def _format(self, text: str, *args: Any, **named: Any) -> Any:
        """Jinja's filter, within the limits of the operator."""
        return self.call_binop(None, "%", str(text), named or args)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return JoinsAsSums().visit(super()._parse(source, name, filename))

    def _bounded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            return self._checked(
                call(*self._small(args), **dict(zip(kwargs, self._small(kwargs.values()), strict=True)))
            )

        return bounded

    def _small(self, values: Any) -> list[Any]:
        for value in values:
            if type(value) is int and abs(value) > MAX_NUMBER:
                raise TemplateProblem(f"it computes with {value}: more than {MAX_NUMBER:,} is refused")
        return list(values)

    def _checked(self, value: Any) -> Any:
        if time.monotonic() > self.deadline:
            raise TemplateProblem(f"it takes more than {SECONDS:g} s")
        if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARS:
            raise TemplateProblem(f"it makes more than {MAX_CHARS:,} characters")
        return value

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._small([*args, *kwargs.values()])
        return self._checked(super().call(context, obj, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._checked(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._checked(super().getitem(obj, argument))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and not isinstance(left, float):
            sized = [len(side) if isinstance(side, (str, list, tuple)) else abs(int(side)) for side in (left, right)]
            if max(sized) > MAX_NUMBER or (operator == "**" and max(sized) > 64) or sized[0] * sized[1] > MAX_CHARS:
                raise TemplateProblem(f"it computes {sized[0]} {operator} {sized[1]}: too much")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{6}|\*", left):
            raise TemplateProblem("it formats with a huge width")
        return self._checked(super().call_binop(context, operator, left, right))


def _raise(message: str) -> None:
    raise TemplateProblem(str(message))


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as transformers writes it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> tuple[Sandbox, jinja2.Template]:
    environment = Sandbox()
    return environment, environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """The text of a chat. values: add_generation_prompt, bos_token, eos_token, tools, ... as transformers passes them.

    Raises TemplateProblem, also where the template itself refuses the messages.
    """
    try:
        environment, program = compiled(template)
        environment.deadline = time.monotonic() + SECONDS
        pieces: list[str] = []
        size = 0
        for piece in program.generate(messages=messages, **values):
            pieces.append(environment._checked(piece))
            size += len(piece)
            if size > MAX_CHARS:
                raise TemplateProblem(f"it makes more than {MAX_CHARS:,} characters")
        return "".join(pieces)
    except TemplateProblem:
        raise
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise TemplateProblem(" ".join(str(error).split())[:200] or type(error).__name__) from None
    except (RecursionError, MemoryError) as error:
        raise TemplateProblem(f"it is too large ({type(error).__name__})") from None
