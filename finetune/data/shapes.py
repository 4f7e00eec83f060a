"""Dialogues in the shapes that people keep them in -> messages, as `nanollama.chat` reads them.

| shape         | keys                                                                                  |
| ------------- | ------------------------------------------------------------------------------------- |
| OpenAI        | messages: role, content, tool_calls, weight; beside them tools, functions              |
| ShareGPT      | conversations: from (human, gpt, system, function_call, observation, tool), value      |
| a list        | of messages in either of these forms, or of turns {"human": ..., "assistant": ...}     |
| alpaca        | instruction, input, output; history: pairs that came before                            |
| pairs         | prompt and completion, question and answer, query and response, input and output ...   |
| Gemini        | contents (or messages): role, parts; texts in turn (LIMA); Bedrock's parts             |

    as_dialogue({"instruction": "Translate.", "input": "Hallo", "output": "Hello"}).messages[0]["content"]
    # 'Translate.\n\nHallo'

What could change training is done or refused by name; other keys beside the dialogue are left unread, and returned.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.errors import UserError

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue")
OTHERS = ("contents", "chat", "turns", "items")  # lists of messages, where nothing else is
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("input", "output"),
    ("instruction", "target"),
    ("input", "target"),
    ("input_text", "output_text"),
)
TURNS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("input", "output"), ("question", "answer"))
INPUTS = ("input", "context")  # of an instruction; a question has a context
SYSTEMS = ("system", "system_prompt", "systemInstruction", "system_instruction")
TEXTS = ("text", "parts")  # Gemini's and others' names of a content
SPOKEN = ("text", "input_text", "output_text")  # types of parts that are text
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "prompter": "user",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
# Of a message: 0 or false, and it is read but not learned.
LEARNED = ("weight", "train", "training", "loss", "loss_mask", "trainable")
# Of messages; no chat format shows them.
NOTES = frozenset(
    ("id", "uuid", "message_id", "parent_id", "turn", "turn_identifier", "timestamp", "create_time", "created", "date")
    + ("created_at", "lang", "language", "source", "country", "state", "hashed_ip", "header", "toxic", "redacted")
    + ("metadata",)
)
PREFERENCES = "python -m finetune.preference trains on pairs of a better and a worse answer"
MEANT = {  # beside a dialogue: what training on it would have to know
    "images": "pictures are not read",
    "image": "pictures are not read",
    "videos": "films are not read",
    "audios": "sounds are not read",
    "documents": "documents for the template are not rendered",
    "chat_template_kwargs": "settings of a template are not read",
    "chosen": PREFERENCES,
    "rejected": PREFERENCES,
    "loss_mask": "a list for a whole dialogue is not read: give each message its own loss_mask, or weight",
}
EXPECTED = (
    'expected an object with a list of "messages" (or conversations, instruction and output, prompt and completion)'
)


class Dialogue(NamedTuple):
    """What one row says."""

    messages: list[Any]
    learned: list[bool]  # of each message: whether it is learned, where it is the assistant's
    tools: list[Any]
    unread: list[str]  # keys beside the dialogue


def as_dialogue(row: Any) -> Dialogue:
    """A row of any shape. Raises UserError, or ChatError, without the place."""
    if isinstance(row, list) and row and all(isinstance(turn, Mapping) for turn in row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise UserError(f"{EXPECTED}, got a {'list' if isinstance(row, list) else type(row).__name__}, not an object")
    rest = {key: value for key, value in row.items() if value is not None and value == value}  # pandas writes NaN
    tools = _tools(rest)
    refuse_meant(rest)
    system: Any = next((rest.pop(key) for key in SYSTEMS if key in rest), "")
    system = system.get("parts", system) if isinstance(system, Mapping) else system
    system = "".join(_text_part(part)["text"] for part in system) if _are_texts(system) else system
    turns = _turns(rest)
    read = [_message(turn, index) for index, turn in enumerate(turns)]
    messages, learned = [message for message, _ in read], [is_learned for _, is_learned in read]
    _expect_text("system", system)
    if system and not _says_system(messages, system):
        messages, learned = [{"role": "system", "content": system}, *messages], [False, *learned]
    notes = {f"{key} of messages" for turn in turns if isinstance(turn, Mapping) for key in NOTES & turn.keys()}
    return Dialogue(messages, learned, tools, sorted({*map(str, rest), *notes}))


def _turns(rest: dict[str, Any]) -> list[Any]:
    """Takes the messages out of the row's keys."""
    for name in LISTS:
        if name in rest:
            turns = rest.pop(name)
            turns = _from_json(turns, f'"{name}"') if isinstance(turns, str) else turns  # of a cell of a table
            if not isinstance(turns, list) or not turns:
                raise UserError(f"{EXPECTED}; {name!r} is {'empty' if turns == [] else 'no list'}")
            return _all_messages(turns)
    for asked, answered in PAIRS:
        if asked in rest and answered in rest:
            return _pair(rest, asked, answered)
    for name in OTHERS:
        if isinstance(rest.get(name), list) and rest[name]:
            return _all_messages(rest.pop(name))
    if rest.keys() >= {"role", "content"} or rest.keys() >= {"from", "value"}:
        raise UserError("is one message and no dialogue: put the messages of a dialogue into one list")
    hint = ': python -m finetune.text trains on plain "text"' if "text" in rest else ""
    raise UserError(f"{EXPECTED}, got {', '.join(map(repr, sorted(map(str, rest)))) or 'none'}"[:300] + hint)


def _all_messages(turns: list[Any]) -> list[Any]:
    if all(isinstance(turn, str) for turn in turns):  # of LIMA: the two take turns
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [message for turn in turns for message in _messages_of(turn)]


def _messages_of(turn: Any) -> list[Any]:
    """A message; of a turn that holds question and answer, those two, and the system message before them."""
    if not isinstance(turn, Mapping) or turn.keys() & {"role", "from"}:
        return [turn]
    names = next(((asked, answered) for asked, answered in TURNS if asked in turn and answered in turn), None)
    if names is None or turn.keys() - {*names, "system"} - NOTES:
        keys = ", ".join(map(repr, sorted(map(str, turn)))) or "none"
        raise UserError(f'a message has neither "role" and "content" nor "from" and "value", but {keys}'[:300])
    said = [("system", turn.get("system")), ("user", turn[names[0]]), ("assistant", turn[names[1]])]
    return [{"role": role, "content": text} for role, text in said if text or role != "system"]


def _pair(rest: dict[str, Any], asked: str, answered: str) -> list[Any]:
    """One question and its answer; what came before them stands in alpaca's `history`."""
    question, answer = rest.pop(asked), rest.pop(answered)
    if _are_messages(question) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if _are_messages(question) and _are_messages(answer):  # trl's, of which the second list is learned
        return [_with_weight(turn, 0) for turn in question] + answer
    inputs = INPUTS if asked == "instruction" else INPUTS[1:] if asked == "question" else ()
    name = next((name for name in inputs if name in rest), "")
    if asked == "question" and not isinstance(rest.get(name), str):
        name = ""  # passages in a list, of which the question needs some: left unread, and said
    parts = [question, rest.pop(name)] if name else [question]
    for key, text in zip((asked, name), parts, strict=False):
        _expect_text(key, text)
    _expect_text(answered, answer)
    turns: list[Any] = []
    history = rest.pop("history", None) or []
    for before in history if isinstance(history, list) else [history]:
        if not isinstance(before, list) or len(before) != 2:
            raise UserError('"history": expected pairs of a question and its answer')
        turns += [{"role": "user", "content": before[0]}, {"role": "assistant", "content": before[1]}]
    content = "\n\n".join(part for part in parts if part.strip())
    if not content:
        raise UserError(f'"{asked}" is empty')
    return [*turns, {"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_text_part(part) is not part for part in value)


def _text_part(part: Any) -> Any:
    """A part of a content that is text, in whatever form, in OpenAI's; another as it is."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.keys() <= {"type", "text"}
    return {"type": "text", "text": part["text"]} if is_text and part.get("type", "text") in SPOKEN else part


def _with_weight(turn: Any, weight: int) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = turn.get("role", turn.get("from"))
    is_said = role == "function_call" or (isinstance(role, str) and ROLES.get(role, role) == "assistant")
    return {**turn, "weight": weight} if is_said else turn


def _expect_text(key: str, text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f'"{key}" is {type(text).__name__}: expected a text')


def _tools(rest: dict[str, Any]) -> list[Any]:
    """Definitions of tools: a list, or JSON in a text; `functions` are OpenAI's older ones."""
    found: list[Any] = []
    for key in ("tools", "functions"):
        given = rest.pop(key, None) or []
        if isinstance(given, str):
            given = _from_json(given, f'"{key}"') or []
        if not isinstance(given, list):
            raise UserError(f'"{key}" is {type(given).__name__}: expected a list of definitions')
        found += [{"type": "function", "function": f} for f in given] if key == "functions" else given
    return found


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON: {text!r:.60}") from None


def _says_system(messages: Sequence[Any], system: str) -> bool:
    """Whether the first message is this system message. Raises UserError where it is another one."""
    first = messages[0]
    if not isinstance(first, dict) or first.get("role") != "system":
        return False
    if first.get("content") != system:
        raise UserError('"system" and a system message in the dialogue differ: keep one of them')
    return True


def refuse_meant(rest: Mapping[str, Any]) -> None:
    """Raises UserError for keys without which training would be another one."""
    for key, why in MEANT.items():
        if rest.get(key):
            raise UserError(f'"{key}": {why}')
    if rest.get("weight", 1) != 1:
        raise UserError('"weight": a whole dialogue cannot be weighted: give weight 0 or 1 to its messages')
    for key in ("label", "kto_tag"):
        if isinstance(rest.get(key), bool):
            raise UserError(
                f'"{key}": answers that are right or wrong are not what this trains on: keep the right ones'
            )


def _message(turn: Any, index: int) -> tuple[Any, bool]:
    """(message, whether it is learned); what is no message is left to `encode_chat` to refuse."""
    if not isinstance(turn, Mapping):
        return turn, True
    where = f"message {index}"
    message = {key: value for key, value in turn.items() if value is not None and key not in NOTES}
    for old, new in (("from", "role"), ("value", "content")):
        if old in message and new not in message:
            message[new] = message.pop(old)
    for name in TEXTS:
        if name in message and "content" not in message:
            message["content"] = message.pop(name)
    if isinstance(message.get("content"), list):
        message["content"] = [_text_part(part) for part in message["content"]]
    if message.get("role") in ("function_call", "tool_call"):  # ShareGPT's
        call = message.pop("content", "")
        call = _from_json(call, f"{where}: function_call") if isinstance(call, str) else call
        message |= {"role": "assistant", "function_call": call}
    if "function_call" in message and "tool_calls" not in message:
        calls = message.pop("function_call")
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    role = message.setdefault("role", None)
    if isinstance(role, str) and role.lower() in {*ROLES, *ROLES.values()}:
        message["role"] = ROLES.get(role.lower(), role.lower())
    return message, _is_learned(message, where)


def _is_learned(message: dict[str, Any], where: str) -> bool:
    """Takes `weight`, `train` out of the message. Raises UserError for what they cannot say here."""
    given = {key: message.pop(key) for key in LEARNED if key in message}
    for key, value in given.items():
        if value not in (0, 1):
            raise UserError(f"{where}: {key} {value!r:.40}: expected 0 or 1")
        if value and message["role"] != "assistant":
            raise UserError(
                f"{where}: {key} {value!r}: only what the assistant says is learned, this is {message['role']}"
            )
    if "train_detail" in message:
        raise UserError(f"{where}: train_detail: parts of a message cannot be chosen; weight takes all of it")
    return all(given.values())
