"""Ids as text and back by the checkpoint's tokenizer, for servers that take or give text alone.

A prompt is sent as text only where the tokenizer makes the same ids of that text again, and a token's text names an id
only where no other token has it: what is left is not asked, and never guessed.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from parity.candidates.nano import opened_tokenizer


class Spelling:
    """The texts of one tokenizer's tokens."""

    def __init__(self, file: Path, rows: int) -> None:
        self.tokenizer = opened_tokenizer(file)
        self._ids: dict[str, int] | None = None
        self.rows = rows

    def example(self) -> list[int]:
        """Ids of a short text, BOS included."""
        return self.tokenizer.encode("The quick brown fox", bos=True)

    def text(self, ids: Sequence[int], spell_bos: bool) -> str | None:
        """The text whose ids, after BOS where a text begins with it, are these; None where there is none."""
        t = self.tokenizer
        begins = bool(ids) and ids[0] == t.bos_id
        found = t.decode(ids[1:] if begins else ids)
        if t.encode(found, bos=begins) != list(ids):
            return None
        return t.vocabulary.tokens[t.bos_id].decode() + found if begins and spell_bos else found

    def id_of(self, text: str) -> int | None:
        """The one token of this text; None where there are several, or none."""
        if self._ids is None:
            self._ids = self._unique()
        return self._ids.get(text)

    def _unique(self) -> dict[str, int]:
        """A token whose bytes are no text of their own shares its text with others, once these bytes are left out."""
        count = min(self.rows, self.tokenizer.vocab_size)
        texts = [self._piece(i) for i in range(count)]
        times = Counter(texts)
        return {text: i for i, text in enumerate(texts) if text and times[text] == 1 and "�" not in text}

    def _piece(self, token: int) -> str:
        pieces = self.tokenizer.pieces
        if pieces is not None and token not in pieces.bytes_:
            return pieces.texts[token]
        raw = self.tokenizer.token_bytes(token) if pieces is None else pieces.bytes_[token]
        return raw.decode("utf-8", "ignore")
