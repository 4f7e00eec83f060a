"""Preference pairs in files -> two sequences a pair, packed so that both are in one row and neither sees the other.

| shape            | keys                                                                                  |
| ---------------- | ------------------------------------------------------------------------------------- |
| texts            | prompt (or question, instruction and input), chosen, rejected (or chosen_response and  |
|                  | rejected_response); system beside them                                                 |
| messages         | prompt (or messages, conversations): messages; chosen, rejected: those that answer     |
| implicit prompt  | chosen, rejected: whole dialogues, as messages or as "Human: ... Assistant: ..." text  |

    {"prompt": "Capital of Peru?", "chosen": "Lima.", "rejected": "Cusco."}

Of either dialogue what the assistant says behind the part that both share is judged; the rest is its prompt.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from finetune.data.dialogs import Dialogs, encode_dialogue, joined, read_usable
from finetune.data.documents import Bools, Documents, Ints, is_held_out
from finetune.data.files import Say, silent
from finetune.data.packing import Batch, Cursor, Packer
from finetune.data.shapes import INPUTS, LISTS, as_dialogue, refuse_meant
from finetune.errors import UserError
from nanollama.tokenizer import Tokenizer

PROMPTS = ("prompt", "question", "instruction", "input")
SIDES = ("chosen", "rejected")
KEPT = ("system", "system_prompt", "tools", "functions")  # beside a pair, read as beside a dialogue
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # as the texts of Anthropic's hh-rlhf are divided
RESPONSES = ("chosen_response", "rejected_response")  # as Argilla and axolotl name them
EXPECTED = 'expected an object with "chosen" and "rejected", and a "prompt" unless both begin with it'


@dataclass(frozen=True)
class Pairs:
    """Documents of which each is a pair: sequence 2i, the chosen one, and after it 2i + 1, the rejected one."""

    sequences: Dialogs
    reference: Tensor | None = None  # (pairs, 2) float64: what a reference says of each sequence, log-probabilities

    @property
    def bos_id(self) -> int | None:
        return self.sequences.bos_id

    @property
    def lengths(self) -> Ints:
        return self.sequences.lengths.reshape(-1, 2).sum(1)

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        begin = int(self.sequences.starts[2 * document])
        return self.sequences.ids[begin + start : begin + stop]

    def mask(self, document: int, start: int, stop: int) -> Bools:
        """As a text a pair is its chosen answer: what bits per byte and the bigram model are counted on."""
        begin, rejected, end = self.sequences.starts[2 * document : 2 * document + 3].tolist()
        chosen = np.append(self.sequences.said[begin:rejected], np.zeros(end - rejected, dtype=np.bool_))
        return chosen[start:stop]

    def fingerprint(self) -> str:
        return hashlib.sha256(b"pairs" + self.sequences.fingerprint().encode()).hexdigest()


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_pairs(
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    on_bad: Literal["skip", "stop"] = "stop",
    say: Say = silent,
) -> tuple[Pairs, Pairs]:
    """(training, held out): each 20th pair is held out; fewer than 20 stand on both sides.

    Raises UserError for pairs that cannot be used, unless they are to be skipped, and for data without any.
    """

    def take(row: Any) -> tuple[list[tuple[Ints, Bools]], list[str]]:
        sides, keys = as_pair(row)
        return _encode(sides, tokenizer, seq_len), keys

    encoded = read_usable(path, take, "pairs", on_bad=on_bad, say=say)
    if not encoded:
        raise UserError(f"--data {path}: holds no pair: {EXPECTED}")
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    train = [pair for i, pair in enumerate(encoded) if not is_held_out(i)]
    val = [pair for i, pair in enumerate(encoded) if is_held_out(i)] or encoded
    return tuple(Pairs(joined([side for pair in part for side in pair], bos_id)) for part in (train, val))  # type: ignore[return-value]


def as_pair(row: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of the chosen and the rejected dialogue, as `as_dialogue` reads them; keys that are left unread).

    Raises UserError, without the place.
    """
    if not isinstance(row, Mapping):
        raise UserError(EXPECTED)
    rest = {key: value for key, value in row.items() if value is not None}
    names = next((found for found in (SIDES, RESPONSES) if all(name in rest for name in found)), None)
    if names is None:
        raise UserError(EXPECTED)
    chosen, rejected = ([side] if isinstance(side, Mapping) else side for side in map(rest.pop, names))
    refuse_meant({key: value for key, value in rest.items() if key != "label"})
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise UserError('"chosen" and "rejected" are not alike: expected two texts or two lists of messages')
    if chosen == rejected:
        raise UserError('"chosen" and "rejected" are the same: nothing to prefer')
    name = next((name for name in PROMPTS if name in rest), "")
    prompt = rest.pop(name) if name else None
    if name == "instruction" and isinstance(prompt, str):
        more = next((key for key in INPUTS if isinstance(rest.get(key), str)), "")
        prompt = "\n\n".join(part for part in (prompt, rest.pop(more, "")) if part.strip())
    kept = {key: rest.pop(key) for key in KEPT if key in rest}
    before = next((rest.pop(name) for name in LISTS if isinstance(rest.get(name), list)), None)
    prompt, answers = _divided(prompt, before, chosen, rejected)
    made = [{**kept, "prompt": prompt, "completion": answer} for answer in answers]
    return made, sorted(key for key in rest if key not in ("messages", "label"))


def _divided(prompt: Any, before: list[Any] | None, chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """(prompt, the two answers): texts, or lists of messages. before: messages beside the pair, which are the prompt
    where nothing else is. Raises UserError.
    """
    shared = 0
    if isinstance(chosen, list):
        sides = zip(chosen, rejected, strict=False)
        shared = next((i for i, (a, b) in enumerate(sides) if a != b), min(len(chosen), len(rejected)))
    if prompt is None and not shared and before is not None:
        prompt = before
    if isinstance(prompt, str) and any(_says(message, prompt) for message in chosen[:shared] if shared):
        prompt = None  # whole dialogues beside it, perhaps with a system message
    if prompt is None:
        if isinstance(chosen, str):
            chosen, rejected = _turns(chosen), _turns(rejected)
            return _divided(None, None, chosen, rejected)
        if not shared:
            raise UserError('there is no "prompt", and "chosen" and "rejected" do not begin with the same message')
        return chosen[:shared], [side[shared:] for side in (chosen, rejected)]
    if isinstance(prompt, str) and isinstance(chosen, str):
        return prompt, [chosen, rejected]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(asked, list):
        raise UserError(f'"prompt" is {type(prompt).__name__}: expected a text or a list of messages')
    answers = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in (chosen, rejected)]
    if all(answer[: len(asked)] == asked for answer in answers):  # whole dialogues beside their prompt
        answers = [answer[len(asked) :] for answer in answers]
    return asked, answers


def _says(message: Any, text: str) -> bool:
    return isinstance(message, Mapping) and text in (message.get("content"), message.get("value"))


def _turns(text: str) -> list[dict[str, str]]:
    """Messages of a text divided by "Human:" and "Assistant:". Raises UserError."""
    before, *parts = TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise UserError('there is no "prompt", and the texts are not divided by "Human:" and "Assistant:"')
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[name], "content": content.strip()} for name, content in pairs]


def _encode(sides: Sequence[dict[str, Any]], tokenizer: Tokenizer, seq_len: int) -> list[tuple[Ints, Bools]]:
    """Ids and judged tokens of both sequences. Raises UserError."""
    found = []
    for name, side in zip(SIDES, sides, strict=True):
        try:
            found.append(encode_dialogue(as_dialogue(side), tokenizer, seq_len))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    size = sum(len(ids) for ids, _ in found)
    if size > seq_len:
        raise UserError(f"the pair's {size} tokens, both with the prompt, do not fit --seq_len {seq_len}: raise it")
    if np.array_equal(found[0][0], found[1][0]):
        raise UserError('"chosen" and "rejected" are the same tokens: nothing to prefer')
    return found


# --- Packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch:
    """Rows of whole pairs: in each row sequence 0 is chosen, 1 its rejected one, 2 the next chosen one, and so on."""

    batch: Batch
    sequence: Tensor  # (B, T) int64: the sequence that a token belongs to, counted over all rows
    reference: Tensor | None  # (P, 2) float64
    pairs: tuple[int, ...]  # their numbers among the documents, P of them

    @property
    def valid(self) -> int:
        return self.batch.valid

    @property
    def count(self) -> int:
        return len(self.pairs)

    def inputs(self) -> tuple[Any, ...]:
        return *self.batch.inputs(), self.sequence, len(self.pairs), self.reference

    def to(self, device: torch.device) -> "PairBatch":
        wide = torch.float32 if device.type == "mps" else torch.float64  # it has no float64

        def move(t: Tensor) -> Tensor:
            return t.to(device, wide if t.is_floating_point() else None, non_blocking=True)

        return self._each(self.batch.to(device), move)

    def pinned(self) -> "PairBatch":
        return self._each(self.batch.pinned(), Tensor.pin_memory)

    def _each(self, batch: Batch, move: Callable[[Tensor], Tensor]) -> "PairBatch":
        reference = None if self.reference is None else move(self.reference)
        return PairBatch(batch, move(self.sequence), reference, self.pairs)


class PairPacker:
    """Rows of pairs: packed and ordered as documents of the pair's length, laid out as two documents each."""

    def __init__(self, pairs: Pairs, seq_len: int, *, seed: int = 0) -> None:
        self.documents, self.order = pairs, Packer(pairs, seq_len, seed=seed)
        self.sequences = Packer(pairs.sequences, seq_len)

    def holds(self, cursor: Cursor) -> bool:
        return self.order.holds(cursor)

    def take(self, cursor: Cursor, count: int) -> tuple[list[list[int]], Cursor]:
        return self.order.take(cursor, count)

    def rows_an_epoch(self) -> int:
        return self.order.rows_an_epoch()

    def in_order(self, documents: int) -> list[list[int]]:
        return self.order.in_order(documents)

    def documents_in(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return self.order.documents_in(rows)

    def batch(self, rows: Sequence[Sequence[int]]) -> PairBatch:
        """No pair is ever cut, so a piece's number is that of its pair."""
        batch = self.sequences.batch([[side for pair in row for side in (2 * pair, 2 * pair + 1)] for row in rows])
        assert batch.doc_ids is not None
        pairs = tuple(pair for row in rows for pair in row)
        before = torch.tensor(np.cumsum([0, *(2 * len(row) for row in rows)])[:-1]).unsqueeze(1)  # (B, 1)
        reference = self.documents.reference
        known = None if reference is None else reference[list(pairs)]
        return PairBatch(batch, batch.doc_ids + before, known, pairs)


def pair_packer(documents: Documents, seq_len: int, seed: int) -> PairPacker:
    assert isinstance(documents, Pairs)
    return PairPacker(documents, seq_len, seed=seed)
