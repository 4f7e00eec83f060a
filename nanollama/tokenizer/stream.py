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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanollama.vocabulary import TokenizerError, Vocabulary
from nanollama.vocabulary.value import SPACE, TokenType


class ByteStream:
    """Joins bytes; a byte sequence that is not UTF-8 gives U+FFFD where bytes.decode(errors="replace") does."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self.token_bytes = token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self.decoder.decode(self.token_bytes(token_id))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Pieces:
    """A sentencepiece vocabulary as decode sees it.

    texts: id -> text, "▁" already a space, "" for control pieces; bytes_: id -> one byte, for the byte pieces.
    strip_leading_space: encode puts a space before the text, so decode takes one away;
    strip_all_leading_spaces: the same until a piece shows text (sentencepiece's remove_extra_whitespaces);
    unknown_id: the piece whose text, " ⁇ ", keeps its space even in front.
    """

    texts: Sequence[str]
    bytes_: Mapping[int, bytes]
    strip_leading_space: bool = True
    strip_all_leading_spaces: bool = False
    unknown_id: int | None = None


def pieces_of(vocabulary: Vocabulary, rows: int) -> Pieces:
    """The vocabulary as decode sees it; control pieces and rows without a token show nothing."""
    hidden: dict[int, str] = {
        TokenType.CONTROL: "",
        TokenType.UNKNOWN: " \u2047 ",
    }  # sentencepiece's default unk_surface
    kinds = dict(enumerate(vocabulary.types))
    texts = [hidden.get(kinds[i], token.decode().replace(SPACE, " ")) for i, token in enumerate(vocabulary.tokens)]
    return Pieces(
        texts=texts + [""] * (rows - len(texts)),
        bytes_={i: bytes([int(vocabulary.tokens[i][3:5], 16)]) for i, kind in kinds.items() if kind == TokenType.BYTE},
        strip_leading_space=vocabulary.add_dummy_prefix,
        strip_all_leading_spaces=vocabulary.remove_extra_whitespaces,
        unknown_id=vocabulary.unknown_id,
    )


class PieceStream:
    """Follows sentencepiece's own decoder (SentencePieceProcessor::Decode): every byte that is part of no character
    becomes one U+FFFD, and a character's bytes must be neighbours."""

    def __init__(self, pieces: Pieces):
        self.pieces = pieces
        self._restart()

    def _restart(self) -> None:
        # surrogateescape gives one mark for each bad byte, where "replace" gives one for several.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.at_start = self.pieces.strip_leading_space or self.pieces.strip_all_leading_spaces

    def push(self, token_id: int) -> str:
        if not 0 <= token_id < len(self.pieces.texts):
            raise TokenizerError(f"token id {token_id} is outside of the tokenizer's 0..{len(self.pieces.texts) - 1}")
        byte = self.pieces.bytes_.get(token_id)
        if byte is not None:
            self.at_start = False  # even while its character is incomplete: it will show something
            return _mark_bad_bytes(self.decoder.decode(byte))
        unfinished = _mark_bad_bytes(self.decoder.decode(b"", final=True))
        return unfinished + self._text(token_id)

    def _text(self, token_id: int) -> str:
        text = self.pieces.texts[token_id]
        if token_id == self.pieces.unknown_id:
            self.at_start = False
        if self.at_start and text:
            stripped = text.removeprefix(" ")
            took_space = len(stripped) < len(text) and not self.pieces.strip_all_leading_spaces
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
