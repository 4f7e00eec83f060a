"""Chat messages -> token ids and loss mask: by the checkpoint's own chat template, else Llama 3's headers or [INST].

With a template the ids are those of transformers' apply_chat_template; without one those of Meta's
llama_models.llama3.chat_format.ChatFormat (encode_dialog_prompt) for Llama 3, and of chat_completion in Meta's llama
repository (llama/generation.py) for Llama 2. Content is never read for special tokens, not even by a template.

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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from nanollama.messages import (
    QUERY_TOOLS,
    ROLES,
    UNRENDERED_KEYS,
    ChatError,
    Message,
    check_message,
    check_tool_call,
    texts_of,
)
from nanollama.template import TemplateProblem, render
from nanollama.tokenizer import Tokenizer
from nanollama.tokenizer.base import common_length, split_special

Style = Literal["llama3", "llama2"]

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@dataclass(frozen=True)
class ChatTokens:
    """loss_mask[i]: whether ids[i] is one that the assistant says (its content, tool calls and end of turn).

    By a template, all False where a generation prompt follows: such ids are for an answer, not for training.
    """

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
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> ChatTokens:
    """The ids of a chat, as the checkpoint's template or the vocabulary's style has it, and the mask for training.

    messages: {"role", "content", "tool_calls"?, "stop_reason"?}; content is a str or a list of {"type": "text",
    "text": str}; a tool call is {"tool_name", "arguments"} or OpenAI's {"function": {"name", "arguments"}}.
    add_generation_prompt ends with the header of the assistant's next turn. date, such as "26 Jul 2024", adds Llama
    3.1's date lines. tools: definitions of functions, for templates that show them. Raises ChatError; with
    require_assistant also where nothing could be trained on.
    """
    template = template_of(tokenizer, bool(tools))
    if tools and "tools" not in (template or ""):
        raise ChatError(f"tools: {template_source(tokenizer)} has no place for them; leave them out")
    if template:
        tokens = _encode_template(template, messages, tokenizer, add_generation_prompt, date, tools)
    elif style_of(tokenizer) == "llama3":
        tokens = _joined(_encode_llama3(_llama3_segments(messages, add_generation_prompt, date), tokenizer))
    else:
        tokens = _joined(_encode_llama2(_llama2_turns(messages, add_generation_prompt, date), tokenizer))
    if require_assistant and not any(tokens.loss_mask):
        raise ChatError(f"none of the {len(messages)} messages is the assistant's: nothing to train on")
    return tokens


def _joined(parts: Iterable[tuple[list[int], bool]]) -> ChatTokens:
    """Of (ids, whether the assistant says them)."""
    ids: list[int] = []
    mask: list[bool] = []
    for new, trained in parts:
        ids += new
        mask += [trained] * len(new)
    return ChatTokens(ids, mask)


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


def style_of(tokenizer: Tokenizer) -> Style:
    return "llama3" if "<|start_header_id|>" in tokenizer.special_ids else "llama2"


def template_of(tokenizer: Tokenizer, with_tools: bool) -> str | None:
    """The checkpoint's template for such a chat, as transformers chooses it. Raises ChatError where none is chosen."""
    named = tokenizer.vocabulary.named_templates
    if with_tools and "tool_use" in named:
        return named["tool_use"]
    if named and not tokenizer.chat_template:
        raise ChatError(
            f"the checkpoint has chat templates named {', '.join(sorted(named))[:200]} and none named default: "
            "write the one to use into chat_template.jinja beside its tokenizer"
        )
    return tokenizer.chat_template


def template_source(tokenizer: Tokenizer) -> str:
    """Which chat format is used, for people."""
    if tokenizer.chat_template or tokenizer.vocabulary.named_templates:
        return "the checkpoint's own chat template"
    return {"llama3": "Llama 3's chat format", "llama2": "Llama 2's chat format"}[style_of(tokenizer)]


# --- The checkpoint's template ---------------------------------------------------------------------------------------

# A template that tells texts from lists of parts is given the parts, as transformers does.
READS_PARTS = re.compile(r"content['\"\])]*\s+is\s+(?:not\s+)?(?:string|iterable|sequence|mapping)")
MARK = "\ufdd0"  # no character: put inside names of special tokens in contents, so that they stay text


def _encode_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    date: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> ChatTokens:
    names = "|".join(map(re.escape, sorted(tokenizer.special_ids, key=len, reverse=True)))
    given = [_for_template(message, i, template, names) for i, message in enumerate(messages)]
    values: dict[str, Any] = {
        **tokenizer.vocabulary.named_tokens,
        "tools": list(tools) if tools else None,
        "documents": None,
    }
    values |= {f"{role}_token": _text_of(tokenizer, token_id) for role, token_id in _roles(tokenizer).items()}
    values |= {"date_string": date} if date is not None else {}

    def encode(part: Sequence[Mapping[str, Any]], prompt: bool) -> list[int]:
        try:
            text = render(template, part, add_generation_prompt=prompt, **values)
        except TemplateProblem as error:
            raise ChatError(f"the checkpoint's chat template cannot render these messages: {error}") from None
        return _encode_marked(text, tokenizer)

    ids = encode(given, add_generation_prompt)
    # Before an answer nothing is trained on, and templates may show what was said otherwise later (no old reasoning).
    mask = [False] * len(ids) if add_generation_prompt else _said(given, ids, encode, tokenizer.stop_ids)
    return ChatTokens(ids, mask)


def _roles(tokenizer: Tokenizer) -> dict[str, int | None]:
    unknown = tokenizer.vocabulary.unknown_id
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": unknown}


def _text_of(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.vocabulary.tokens[token_id].decode("utf-8", "replace")


def _encode_marked(text: str, tokenizer: Tokenizer) -> list[int]:
    if MARK not in text:
        return tokenizer.encode(text, bos=False, allowed_special="all")
    ids: list[int] = []
    for part, is_special in split_special(text, tokenizer.special_ids.keys()):
        ids += [tokenizer.special_ids[part]] if is_special else tokenizer.encode(part.replace(MARK, ""), bos=False)
    return ids


def _said(
    messages: list[dict[str, Any]],
    ids: list[int],
    encode: Callable[[Sequence[Mapping[str, Any]], bool], list[int]],
    stop_ids: frozenset[int],
) -> list[bool]:
    """Which ids the assistant says: from where its header ends to the id that ends its turn."""
    mask = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = encode(messages[:i], False) if i else []
        if common_length(before, ids) < len(before) - 1:  # the last one may merge with what follows
            raise ChatError(f"message {i}: the chat template changes what comes before it, so what is said is unknown")
        start = common_length(encode(messages[:i], True), ids) if i else 0
        said = encode(messages[: i + 1], False)
        end = common_length(said, ids)
        if end < len(said) - 2:  # its end may be written otherwise
            raise ChatError(f"message {i}: the chat template changes it when others follow, so what is said is unknown")
        ends = [at for at in range(start, end) if ids[at] in stop_ids]
        mask[start : ends[-1] + 1 if ends else end] = [True] * ((ends[-1] + 1 if ends else end) - start)
    return mask


def _for_template(message: Any, index: int, template: str, names: str) -> dict[str, Any]:
    """A message as templates expect it, special tokens in its texts marked. Raises ChatError."""
    where = f"message {index}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatError(f"{where}: expected a dict with role and content, got {message!r:.60}")
    found = {key: value for key, value in message.items() if value is not None and key != "stop_reason"}
    for key in found.keys() - {"role", "content", "tool_calls"} - UNRENDERED_KEYS:
        if key not in template:
            raise ChatError(f"{where}: unknown key {key!r:.40}, which the checkpoint's chat template does not read")
    calls = [check_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(found.pop("tool_calls", []))]
    if calls and "tool_calls" not in template:
        raise ChatError(f"{where}: tool_calls, which the checkpoint's chat template does not show")
    texts = texts_of(message.get("content"), where, optional=bool(calls))
    if not READS_PARTS.search(template) or not isinstance(message.get("content"), (list, tuple)):
        found["content"] = "".join(texts)
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    found |= {"tool_calls": [{"type": "function", "function": f} for f in functions]} if calls else {}
    return _marked(found, names)


def _marked(value: Any, names: str) -> Any:
    if isinstance(value, str):
        return re.sub(names, lambda match: match[0][0] + MARK + match[0][1:], value) if names else value
    if isinstance(value, Mapping):
        return {key: _marked(item, names) for key, item in value.items()}
    return [_marked(item, names) for item in value] if isinstance(value, (list, tuple)) else value


# --- Llama 3 ---------------------------------------------------------------------------------------------------------


def _llama3_segments(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, date: str | None
) -> Iterator[Segment]:
    yield Segment("<|begin_of_text|>", special=True)
    checked = [check_message(message, i) for i, message in enumerate(messages)]
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


def _body(message: "Message") -> Iterator[Segment]:
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


def _with_date(messages: "list[Message]", date: str) -> "list[Message]":
    """Puts the date lines before the system message's content, in a system message of their own where there is none.

    The bytes are those of the chat template in Llama-3.1-8B-Instruct's tokenizer_config.json, and of
    llama_models/llama3_1/prompt_format.md; the day the model's knowledge ends is the same in 3.1, 3.2 and 3.3.
    """
    lines = f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    if messages and messages[0].role == "system":
        first, *rest = messages
        texts = [lines + "".join(first.texts[:1]), *first.texts[1:]]
        return [first._replace(texts=texts), *rest]
    return [Message("system", [lines], [], None), *messages]


def _encode_llama3(segments: Iterator[Segment], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    for segment in segments:
        if not segment.special:
            yield tokenizer.encode(segment.text, bos=False), segment.trained
        elif segment.text in tokenizer.special_ids:
            yield [tokenizer.special_ids[segment.text]], segment.trained
        else:  # a vocabulary that names its tokens otherwise
            raise ChatError(f"the checkpoint has no chat template, and no {segment.text} for Llama 3's chat format")


# --- Llama 2 ---------------------------------------------------------------------------------------------------------


def _llama2_turns(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, date: str | None
) -> list[tuple[str, str | None]]:
    """(prompt, answer) a turn; each turn stands between BOS and EOS, and the last one's answer may be None."""
    if date is not None:
        raise ChatError("Llama 2's chat has no date lines: leave date out")
    checked = [check_message(message, i) for i, message in enumerate(messages)]
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


def _check_llama2(message: "Message", index: int, *, has_system: bool) -> None:
    """Raises ChatError unless the message can stand where it is: [system], then user and assistant in turn."""
    expected = ("user", "assistant")[(index - has_system) % 2] if index or not has_system else "system"
    if message.role != expected:
        raise ChatError(f"message {index}: role {message.role!r}, Llama 2's chat expects {expected!r} here")
    if message.tool_calls or message.stop_reason == "end_of_message":
        raise ChatError(f"message {index}: Llama 2's chat has no tool calls")
    for tag in LLAMA2_TAGS:
        if tag in message.text:  # the tags are plain text: the content could end its own turn (Meta refuses it, too)
            raise ChatError(f"message {index}: the content holds {tag}, which Llama 2 would read as the chat's own")


def _encode_llama2(turns: list[tuple[str, str | None]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    for prompt, answer in turns:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        if answer is None:
            yield prompt_ids, False
            continue
        # Prompt and answer are one text to sentencepiece. The answer starts where the ids stop to be the prompt's;
        # its last space is part of what the model has to say before it may end.
        turn_ids = tokenizer.encode(prompt + answer, bos=True, eos=True)
        start = common_length(prompt_ids, turn_ids)
        yield turn_ids[:start], False
        yield turn_ids[start:], True
