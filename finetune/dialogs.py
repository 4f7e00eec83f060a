"""Dialogues in JSONL -> documents with a mask of what the assistant says, in memory.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

A dialogue is one document and is never cut: what does not fit a row is refused. The ids and the mask are
`nanollama.chat`'s, the same ids that the chat in the terminal sends.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data import Bools, Ints
from finetune.prepare.corpus import HOLD_OUT_EACH
from nanollama.chat import ChatError, encode_chat
from nanollama.tokenizer import Tokenizer


@dataclass
class Dialogs:
    """`finetune.data.MaskedDocuments`: dialogue i is ids[starts[i] : starts[i + 1]]."""

    bos_id: int
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


def read_dialogs(path: Path, tokenizer: Tokenizer, seq_len: int) -> tuple[Dialogs, Dialogs]:
    """(training, held out): each 20th dialogue is held out; fewer than 20 stand on both sides.

    Raises ValueError that names the line: not JSON, no messages, a wrong role, nothing that the assistant says, more
    than `seq_len` tokens.
    """
    encoded = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                encoded.append(_encode(f"--data {path} line {number}", line, tokenizer, seq_len))
    if not encoded:
        raise ValueError(f"--data {path}: holds no dialogue: one JSON object with messages a line")
    small = len(encoded) < HOLD_OUT_EACH
    is_held = [i % HOLD_OUT_EACH == HOLD_OUT_EACH - 1 for i in range(len(encoded))]
    train = [e for e, held in zip(encoded, is_held, strict=True) if not held]
    val = encoded if small else [e for e, held in zip(encoded, is_held, strict=True) if held]
    return _joined(train, tokenizer.bos_id), _joined(val, tokenizer.bos_id)


def _encode(where: str, line: bytes, tokenizer: Tokenizer, seq_len: int) -> tuple[Ints, Bools]:
    try:
        entry = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{where}: not JSON: {error}") from None
    messages: Any = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: expected an object with a list of "messages"')
    try:
        chat = encode_chat(messages, tokenizer, add_generation_prompt=False, require_assistant=True)
    except ChatError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(chat.ids) > seq_len:
        raise ValueError(
            f"{where}: {len(chat.ids)} tokens do not fit --seq_len {seq_len}: raise it, or split the dialogue"
        )
    return np.array(chat.ids, dtype=np.int64), np.array(chat.loss_mask, dtype=np.bool_)


def _joined(encoded: list[tuple[Ints, Bools]], bos_id: int) -> Dialogs:
    starts = np.cumsum([0, *(len(ids) for ids, _ in encoded)])
    return Dialogs(bos_id, np.concatenate([i for i, _ in encoded]), np.concatenate([m for _, m in encoded]), starts)
