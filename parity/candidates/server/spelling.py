"""Ids as text and back by the checkpoint's tokenizer, for servers that take or give text alone.

A prompt is sent as text only where the tokenizer makes the same ids of that text again. A token's text names an id only
where no other can be shown as it: a vocabulary may have "1" and the byte of it. What is left is not judged.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from parity.candidates.nano.model import opened_tokenizer


class Spelling:
    """The texts of one tokenizer's tokens."""

    def __init__(self, file: Path, rows: int) -> None:
        self.tokenizer = opened_tokenizer(file)
        self.rows = rows
        self._tokens: dict[str, int] | None = None  # by text

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

    def token(self, text: str) -> int | None:
        """The one token that is shown as this text; None where there are several, or none."""
        if self._tokens is None:
            texts = [self._shown(i) for i in range(min(self.rows, self.tokenizer.vocab_size))]
            times = Counter(texts)
            self._tokens = {shown: i for i, shown in enumerate(texts) if shown and times[shown] == 1}
        return self._tokens.get(text)

    def _shown(self, token: int) -> str:
        """A token whose bytes are no text is shown as what is text in them."""
        pieces = self.tokenizer.shown
        found = self.tokenizer.token_bytes(token) if pieces is None else pieces[token]
        return found.decode("utf-8", "ignore") if isinstance(found, bytes) else found
