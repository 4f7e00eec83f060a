"""Decoding one id at a time, so that generated text can be shown as it comes and never shows half a character.

A Thai letter is three bytes and an emoji four, and a token can end within one. Two ways of decoding exist:
ByteStream joins the tokens' bytes (Llama 3); PieceStream joins sentencepiece's text pieces and byte pieces (Llama 2).

    from nanollama.tokenizer import open_tokenizer
    stream = open_tokenizer("tokenizer.model").stream()
    for token_id in prompt_ids: stream.push(token_id)      # so that the first word keeps its leading space
    for token_id in generated: print(stream.push(token_id), end="")
"""

import codecs
import re
from collections.abc import Callable, Sequence

from nanollama.vocabulary import TokenizerError, Vocabulary
from nanollama.vocabulary.value import BYTE_PIECES, SPACE, TokenType


class ByteStream:
    """Joins bytes; a byte sequence that is not UTF-8 gives U+FFFD where bytes.decode(errors="replace") does."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self.token_bytes = token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self.decoder.decode(self.token_bytes(token_id))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def shown_pieces(vocabulary: Vocabulary, rows: int) -> list[str | bytes]:
    """By id what a sentencepiece token shows: text, "▁" already a space, or one byte of a character.

    Control pieces, and rows without a token, show nothing.
    """
    found: list[str | bytes] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        hidden = {TokenType.CONTROL: "", TokenType.UNKNOWN: " \u2047 "}.get(TokenType(kind))  # the default unk_surface
        shown = token.decode().replace(SPACE, " ") if hidden is None else hidden
        found.append(BYTE_PIECES[token] if kind == TokenType.BYTE else shown)
    return found + [""] * (rows - len(found))


class PieceStream:
    """Follows sentencepiece's own decoder (SentencePieceProcessor::Decode): every byte that is part of no character
    becomes one U+FFFD, and a character's bytes must be neighbours."""

    def __init__(self, vocabulary: Vocabulary, shown: Sequence[str | bytes]):
        self.vocabulary, self.shown = vocabulary, shown
        self._restart()

    def _restart(self) -> None:
        # surrogateescape gives one mark for each bad byte, where "replace" gives one for several.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        # Encoding puts a space before the text, or takes all of them away: decoding does the same.
        self.at_start = self.vocabulary.add_dummy_prefix or self.vocabulary.remove_extra_whitespaces

    def push(self, token_id: int) -> str:
        if not 0 <= token_id < len(self.shown):
            raise TokenizerError(f"token id {token_id} is outside of the tokenizer's 0..{len(self.shown) - 1}")
        shown = self.shown[token_id]
        if isinstance(shown, bytes):
            self.at_start = False  # even while its character is incomplete: it will show something
            return _mark_bad_bytes(self.decoder.decode(shown))
        unfinished = _mark_bad_bytes(self.decoder.decode(b"", final=True))
        if token_id == self.vocabulary.unknown_id:  # whose text keeps its space even in front
            self.at_start = False
        return unfinished + self._text(shown)

    def _text(self, text: str) -> str:
        if self.at_start and text:
            stripped = text.removeprefix(" ")
            took_space = len(stripped) < len(text) and not self.vocabulary.remove_extra_whitespaces
            self.at_start = not stripped and not took_space
            return stripped
        return text

    def flush(self) -> str:
        unfinished = _mark_bad_bytes(self.decoder.decode(b"", final=True))
        self._restart()
        return unfinished


def _mark_bad_bytes(text: str) -> str:
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


def decode_all(stream: ByteStream | PieceStream, ids: Sequence[int]) -> str:
    """decode in terms of the stream, so that the two cannot differ."""
    return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()
