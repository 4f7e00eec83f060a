"""Dialogues in files -> documents with a mask of what the assistant says, in memory.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

`finetune.data.shapes` lists the other shapes. A dialogue is one document and is never cut: what does not fit a row
cannot be used, and `--on_bad` says what becomes of it. The ids and the mask are `nanollama.chat`'s, the same ids that
the chat in the terminal sends.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from finetune.data.documents import Bools, Ints, is_held_out
from finetune.data.files import Say, find_files, silent
from finetune.data.left_out import LeftOut, OnBad
from finetune.data.rows import ROW_SUFFIXES, Row, hub_rows, read_rows
from finetune.data.shapes import Dialogue, as_dialogue
from finetune.errors import UserError
from nanollama.chat import encode_chat, template_of, template_source
from nanollama.printable import printable
from nanollama.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass
class Dialogs:
    """`finetune.data.documents.MaskedDocuments`: dialogue i is ids[starts[i] : starts[i + 1]]."""

    bos_id: int | None
    ids: Ints
    said: Bools  # of each id: whether it is one that the assistant says
    starts: Ints

    @property
    def lengths(self) -> Ints:
        return np.diff(self.starts)

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        begin = int(self.starts[document])
        return self.ids[begin + start : begin + stop]

    def mask(self, document: int, start: int, stop: int) -> Bools:
        begin = int(self.starts[document])
        return self.said[begin + start : begin + stop]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.ids.tobytes() + self.said.tobytes() + self.starts.tobytes()).hexdigest()


def read_dialogs(
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    on_bad: OnBad = "stop",
    say: Say = silent,
    hold_out: bool = True,
    out: Path | None = None,
) -> tuple[Dialogs, Dialogs]:
    """(training, held out): each 20th dialogue is held out; fewer than 20 stand on both sides; without hold_out all do.

    Says which keys were left unread and which dialogues cannot be used: not JSON, no messages, a wrong role, nothing
    that the assistant says, an empty answer, more than `seq_len` tokens. Raises UserError for those unless they are to
    be skipped; then `out`, a folder, gets a list of all of them.
    """

    def take(row: Any) -> tuple[tuple[Ints, Bools], list[str]]:
        dialogue = as_dialogue(row)
        return encode_dialogue(dialogue, tokenizer, seq_len), dialogue.unread

    encoded = read_usable(path, take, "dialogues", on_bad=on_bad, say=say, out=out)
    if not encoded:
        raise UserError(f"--data {path}: holds no dialogue: one JSON object with messages a line")
    train = [dialogue for i, dialogue in enumerate(encoded) if not (hold_out and is_held_out(i))]
    val = [dialogue for i, dialogue in enumerate(encoded) if hold_out and is_held_out(i)] or encoded
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    return joined(train, bos_id), joined(val, bos_id)


def read_usable(
    path: Path,
    take: Callable[[Any], tuple[T, list[str]]],
    kind: str,
    *,
    on_bad: OnBad,
    say: Say,
    out: Path | None = None,
) -> list[T]:
    """What `take` makes of each row, which returns it with the keys that it left unread; kind: "dialogues".

    Says which keys those were and which rows cannot be used. Raises UserError for those unless they are to be skipped;
    then `out`, a folder, gets a list of all of them.
    """
    found: list[T] = []
    left_out = LeftOut()
    unread: Counter[str] = Counter()
    for row in named_rows(path, say):
        try:
            if row.trouble:
                raise UserError(row.trouble)
            made, keys = take(row.value)
            found.append(made)
            unread.update(keys)
            left_out.seen += 1
        except ValueError as error:  # ChatError is one
            left_out.add(f"{row.where}: {error}")
    listed_in = left_out.write(out) if out and left_out.count and on_bad == "skip" else None
    left_out.report(kind, on_bad, say, listed_in)
    if unread:
        counted = [f"{key} ({count:,})" for key, count in unread.most_common()]
        say(f"data: keys beside the {kind} that are left unread: {printable(', '.join(counted))}")
    return found


def named_rows(path: Path, say: Say) -> Iterator[Row]:
    """Of a file, a folder of them, or a data set of the hub."""
    if not path.exists():
        yield from hub_rows(str(path))
        return
    files, title = find_files(path, ROW_SUFFIXES, say)
    if title != path.stem:
        say(f"data: {title} ({', '.join(ROW_SUFFIXES)} are read)")
    for file in files:
        yield from read_rows(file)


def encode_dialogue(dialogue: Dialogue, tokenizer: Tokenizer, seq_len: int) -> tuple[Ints, Bools]:
    """Ids, and which of them are learned. Raises UserError."""
    if dialogue.tools and "tools" not in (template_of(tokenizer, True) or ""):
        raise UserError(
            f'"tools": {template_source(tokenizer)} shows no definitions of tools: write them into the system message, '
            "or drop the key"
        )
    _refuse_empty_answers(dialogue)
    chat = encode_chat(
        dialogue.messages,
        tokenizer,
        add_generation_prompt=False,
        require_assistant=True,
        tools=dialogue.tools or None,
    )
    if len(chat.ids) > seq_len:
        raise UserError(f"{len(chat.ids)} tokens do not fit --seq_len {seq_len}: raise it, or split the dialogue")
    mask = np.array(chat.loss_mask, dtype=np.bool_)
    learned = [is_learned for m, is_learned in zip(dialogue.messages, dialogue.learned, strict=True) if _is_said(m)]
    return np.array(chat.ids, dtype=np.int64), mask if all(learned) else _only(learned, mask)


def _is_said(message: Any) -> bool:
    return message["role"] == "assistant"


def _refuse_empty_answers(dialogue: Dialogue) -> None:
    """Training on one teaches to end the turn at once. Raises UserError; what is no message is left to encode_chat."""
    for i, (message, is_learned) in enumerate(zip(dialogue.messages, dialogue.learned, strict=True)):
        if not is_learned or not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        content = message.get("content", "")
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not message.get("tool_calls") and all(isinstance(text, str) and not text.strip() for text in texts):
            raise UserError(f"message {i}: the assistant's answer is empty: write it, or give the message weight 0")


def _only(learned: Sequence[bool], mask: Bools) -> Bools:
    """The mask without the assistant's messages that have weight 0: each message is one run of it."""
    begins = mask & ~np.append(False, mask[:-1])
    if int(begins.sum()) != len(learned):
        raise UserError("weight 0: this chat format does not keep the assistant's messages apart; drop the weights")
    if not any(learned):
        raise UserError("each of the assistant's messages has weight 0: nothing to train on")
    return mask & np.append(False, learned)[np.cumsum(begins)]


def joined(encoded: list[tuple[Ints, Bools]], bos_id: int | None) -> Dialogs:
    starts = np.cumsum([0, *(len(ids) for ids, _ in encoded)])
    return Dialogs(bos_id, np.concatenate([i for i, _ in encoded]), np.concatenate([m for _, m in encoded]), starts)
