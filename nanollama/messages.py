"""Chat messages as people write them -> checked ones: roles, texts, tool calls of Meta's and of OpenAI's shape.

from nanollama.messages import check_message
check_message({"role": "user", "content": "Hi"}, 0).text      # 'Hi'
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}  # role -> Llama 3 header
STOP_REASONS = (None, "end_of_turn", "end_of_message", "out_of_tokens")
MESSAGE_KEYS = {"role", "content", "tool_calls", "stop_reason"}
UNRENDERED_KEYS = {"name", "tool_call_id", "call_id"}  # no Llama format shows them
QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")


class ChatError(ValueError):
    """A message that is not one; the message is one line and names the index."""


class Message(NamedTuple):
    """A checked message. texts are encoded one by one, as Meta does with a list of content items."""

    role: str
    texts: list[str]
    tool_calls: list[tuple[str, Any]]  # (name, arguments)
    stop_reason: str | None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def check_message(message: Any, index: int) -> Message:
    """Raises ChatError naming the index."""
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise ChatError(f"{where}: expected a dict with role and content, got {type(message).__name__}")
    unknown = sorted(map(repr, message.keys() - MESSAGE_KEYS - UNRENDERED_KEYS))
    if unknown:
        raise ChatError(f"{where}: unknown key {unknown[0]:.40}; known are {', '.join(sorted(MESSAGE_KEYS))}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ChatError(f"{where}: role {role!r:.40}; expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise ChatError(f"{where}: tool_calls is no list")
    tool_calls = [check_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls or [])]
    stop_reason = message.get("stop_reason")
    if stop_reason not in STOP_REASONS:
        raise ChatError(f"{where}: stop_reason {stop_reason!r:.40}; expected one of {', '.join(STOP_REASONS[1:])}")
    if role != "assistant" and (tool_calls or stop_reason is not None):
        raise ChatError(f"{where}: tool_calls and stop_reason belong to the assistant, the role is {role}")
    return Message(role, texts_of(message.get("content"), where, optional=bool(tool_calls)), tool_calls, stop_reason)


def texts_of(content: Any, where: str, *, optional: bool) -> list[str]:
    if isinstance(content, str):
        return [content]
    if content is None and optional:
        return []
    if not isinstance(content, (list, tuple)):
        raise ChatError(f"{where}: content is {type(content).__name__}; expected a string or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f'{where}: content part {part!r:.60}; expected {{"type": "text", "text": "..."}}')
    return [part["text"] for part in content]


def check_tool_call(call: Any, where: str) -> tuple[str, Any]:
    """(name, arguments) of a tool call in Meta's or OpenAI's shape."""
    if not isinstance(call, Mapping):
        raise ChatError(f"{where}: expected a dict, got {type(call).__name__}")
    function = call.get("function")
    if isinstance(function, Mapping):
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(arguments, str):  # OpenAI's arguments are JSON in a string
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise ChatError(f"{where}: arguments are no JSON: {arguments!r:.60}") from None
    else:
        name, arguments = call.get("tool_name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, (str, Mapping)):
        raise ChatError(f"{where}: expected tool_name and arguments, got {sorted(map(str, call))}")
    needed = "query" if name in QUERY_TOOLS else "code" if name == "code_interpreter" else None
    if needed and not (isinstance(arguments, Mapping) and isinstance(arguments.get(needed), str)):
        raise ChatError(f"{where}: {name} needs a string {needed!r} in its arguments")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError, RecursionError):
        raise ChatError(f"{where}: arguments cannot be written as JSON") from None
    return name, arguments
