"""Chat messages -> token ids and loss mask: Llama 3's headers and Llama 2's [INST] form.

Ids equal those of Meta's llama_models.llama3.chat_format.ChatFormat (encode_dialog_prompt) for Llama 3, and of
chat_completion in Meta's llama repository (llama/generation.py) for Llama 2. Content is never read for special tokens.

    from nanollama.chat import encode_chat, render_chat
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    print(render_chat(messages))
    # <|begin_of_text|><|start_header_id|>user<|end_header_id|>
    #
    # Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>
    #
    # Hello<|eot_id|>
    encode_chat(messages, tokenizer, add_generation_prompt=False).loss_mask  # True on Hello and its <|eot_id|>
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from nanollama.tokenizer import Tokenizer

Style = Literal["llama3", "llama2"]

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}  # role -> Llama 3 header
STOP_REASONS = (None, "end_of_turn", "end_of_message", "out_of_tokens")
MESSAGE_KEYS = {"role", "content", "tool_calls", "stop_reason"}
UNRENDERED_KEYS = {"name", "tool_call_id", "call_id"}  # no Llama format shows them
QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class ChatError(ValueError):
    """A message that is not one; the message is one line and names the index."""


@dataclass(frozen=True)
class ChatTokens:
    """loss_mask[i]: whether ids[i] is one that the assistant says (its content, tool calls and end of turn)."""

    ids: list[int]
    loss_mask: list[bool]


class Segment(NamedTuple):
    """A part of a rendered chat: a special token by its name, or text that is encoded by itself."""

    text: str
    special: bool = False
    trained: bool = False


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool,
    date: str | None = None,
    require_assistant: bool = False,
    tools: Sequence[Any] | None = None,
) -> ChatTokens:
    """The ids of a chat, in the style that the tokenizer's vocabulary calls for, and the mask for training.

    messages: {"role", "content", "tool_calls"?, "stop_reason"?}; content is a str or a list of {"type": "text",
    "text": str}; a tool call is {"tool_name", "arguments"} or OpenAI's {"function": {"name", "arguments"}}.
    add_generation_prompt ends with the header of the assistant's next turn. date, such as "26 Jul 2024", adds Llama
    3.1's date lines. Raises ChatError; with require_assistant also where nothing could be trained on.
    """
    if tools:
        raise ChatError(f"{template_source(tokenizer)} shows no definitions of tools")
    if style_of(tokenizer) == "llama3":
        tokens = _encode_llama3(_llama3_segments(messages, add_generation_prompt, date), tokenizer)
    else:
        tokens = _encode_llama2(_llama2_turns(messages, add_generation_prompt, date), tokenizer)
    if require_assistant and not any(tokens.loss_mask):
        raise ChatError(f"none of the {len(messages)} messages is the assistant's: nothing to train on")
    return tokens


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    style: Style = "llama3",
    add_generation_prompt: bool = False,
    date: str | None = None,
) -> str:
    """The chat as text, to show, or to compare with a chat template. Not to encode: content that spells a special
    token cannot be told from one. Raises ChatError."""
    if style == "llama3":
        return "".join(segment.text for segment in _llama3_segments(messages, add_generation_prompt, date))
    if style != "llama2":
        raise ChatError(f'style {style!r}: expected "llama3" or "llama2"')
    turns = _llama2_turns(messages, add_generation_prompt, date)
    return "".join(f"<s>{prompt}" + ("" if answer is None else f"{answer}</s>") for prompt, answer in turns)


def template_source(tokenizer: Tokenizer) -> str:
    """Which chat format is used, for people."""
    return "Llama 3's chat format" if style_of(tokenizer) == "llama3" else "Llama 2's chat format"


def style_of(tokenizer: Tokenizer) -> Style:
    return "llama3" if "<|start_header_id|>" in tokenizer.special_ids else "llama2"


# --- Llama 3 ---------------------------------------------------------------------------------------------------------


def _llama3_segments(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, date: str | None
) -> Iterator[Segment]:
    yield Segment("<|begin_of_text|>", special=True)
    checked = [_check(message, i) for i, message in enumerate(messages)]
    if date is not None:
        checked = _with_date(checked, date)
    for message in checked:
        yield from _header(message.role)
        yield from _body(message)
    if add_generation_prompt:
        yield from _header("assistant")


def _header(role: str) -> list[Segment]:
    return [
        Segment("<|start_header_id|>", special=True),
        Segment(ROLES[role]),
        Segment("<|end_header_id|>", special=True),
        Segment("\n\n"),  # by itself: it must not merge with line ends of the content
    ]


def _body(message: "_Message") -> Iterator[Segment]:
    trained = message.role == "assistant"
    if message.tool_calls and message.tool_calls[0][0] == "code_interpreter":
        yield Segment("<|python_tag|>", special=True, trained=trained)
    for text in message.texts:
        yield Segment(text, trained=trained)
    for name, arguments in message.tool_calls:
        yield Segment(_tool_call_text(name, arguments), trained=trained)
    end = "<|eom_id|>" if message.stop_reason == "end_of_message" else "<|eot_id|>"
    yield Segment(end, special=True, trained=trained)


def _tool_call_text(name: str, arguments: Any) -> str:
    """As Meta's ToolUtils.encode_tool_call with the json prompt format."""
    if name in QUERY_TOOLS:
        return f'{name}.call(query="{arguments["query"]}")'
    if name == "code_interpreter":
        return arguments["code"]
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def _with_date(messages: "list[_Message]", date: str) -> "list[_Message]":
    """Puts the date lines before the system message's content, in a system message of their own where there is none.

    The bytes are those of the chat template in Llama-3.1-8B-Instruct's tokenizer_config.json, and of
    llama_models/llama3_1/prompt_format.md; the day the model's knowledge ends is the same in 3.1, 3.2 and 3.3.
    """
    lines = f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    if messages and messages[0].role == "system":
        first, *rest = messages
        texts = [lines + "".join(first.texts[:1]), *first.texts[1:]]
        return [first._replace(texts=texts), *rest]
    return [_Message("system", [lines], [], None), *messages]


def _encode_llama3(segments: Iterator[Segment], tokenizer: Tokenizer) -> ChatTokens:
    ids: list[int] = []
    mask: list[bool] = []
    for segment in segments:
        if segment.special:
            new = [tokenizer.special_ids[segment.text]]
        else:
            new = tokenizer.encode(segment.text, bos=False)
        ids += new
        mask += [segment.trained] * len(new)
    return ChatTokens(ids, mask)


# --- Llama 2 ---------------------------------------------------------------------------------------------------------


def _llama2_turns(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, date: str | None
) -> list[tuple[str, str | None]]:
    """(prompt, answer) a turn; each turn stands between BOS and EOS, and the last one's answer may be None."""
    if date is not None:
        raise ChatError("Llama 2's chat has no date lines: leave date out")
    checked = [_check(message, i) for i, message in enumerate(messages)]
    for i, message in enumerate(checked):
        _check_llama2(message, i, has_system=checked[0].role == "system")
    system = ""
    offset = 0
    if checked and checked[0].role == "system":
        system = f"<<SYS>>\n{checked[0].text}\n<</SYS>>\n\n"
        offset = 1
    if len(checked) == offset:
        raise ChatError(f"message {offset}: expected the user's, found the end of the chat")
    if add_generation_prompt and checked[-1].role != "user":
        raise ChatError(f"message {len(checked) - 1}: an answer can follow the user only, this is the assistant's")
    turns: list[tuple[str, str | None]] = []
    for i in range(offset, len(checked), 2):
        prompt = f"[INST] {((system if i == offset else '') + checked[i].text).strip()} [/INST]"
        turns.append((prompt, f" {checked[i + 1].text.strip()} " if i + 1 < len(checked) else None))
    return turns


def _check_llama2(message: "_Message", index: int, *, has_system: bool) -> None:
    """Raises ChatError unless the message can stand where it is: [system], then user and assistant in turn."""
    expected = ("user", "assistant")[(index - has_system) % 2] if index or not has_system else "system"
    if message.role != expected:
        raise ChatError(f"message {index}: role {message.role!r}, Llama 2's chat expects {expected!r} here")
    if message.tool_calls or message.stop_reason == "end_of_message":
        raise ChatError(f"message {index}: Llama 2's chat has no tool calls")
    for tag in LLAMA2_TAGS:
        if tag in message.text:  # the tags are plain text: the content could end its own turn (Meta refuses it, too)
            raise ChatError(f"message {index}: the content holds {tag}, which Llama 2 would read as the chat's own")


def _encode_llama2(turns: list[tuple[str, str | None]], tokenizer: Tokenizer) -> ChatTokens:
    ids: list[int] = []
    mask: list[bool] = []
    for prompt, answer in turns:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        if answer is None:
            ids += prompt_ids
            mask += [False] * len(prompt_ids)
            continue
        # Prompt and answer are one text to sentencepiece. The answer starts where the ids stop to be the prompt's;
        # its last space is part of what the model has to say before it may end.
        turn_ids = tokenizer.encode(prompt + answer, bos=True, eos=True)
        start = 0
        while start < len(prompt_ids) and prompt_ids[start] == turn_ids[start]:
            start += 1
        ids += turn_ids
        mask += [False] * start + [True] * (len(turn_ids) - start)
    return ChatTokens(ids, mask)


# --- Messages --------------------------------------------------------------------------------------------------------


class _Message(NamedTuple):
    """A checked message. texts are encoded one by one, as Meta does with a list of content items."""

    role: str
    texts: list[str]
    tool_calls: list[tuple[str, Any]]  # (name, arguments)
    stop_reason: str | None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def _check(message: Any, index: int) -> _Message:
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
    tool_calls = [_check_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls or [])]
    stop_reason = message.get("stop_reason")
    if stop_reason not in STOP_REASONS:
        raise ChatError(f"{where}: stop_reason {stop_reason!r:.40}; expected one of {', '.join(STOP_REASONS[1:])}")
    if role != "assistant" and (tool_calls or stop_reason is not None):
        raise ChatError(f"{where}: tool_calls and stop_reason belong to the assistant, the role is {role}")
    return _Message(role, _texts(message.get("content"), where, optional=bool(tool_calls)), tool_calls, stop_reason)


def _texts(content: Any, where: str, *, optional: bool) -> list[str]:
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


def _check_tool_call(call: Any, where: str) -> tuple[str, Any]:
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
