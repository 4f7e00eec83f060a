"""The Tokenizer that every kind of file makes, and how text is prepared for its encoder.

python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.model').kind)"
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from typing import Literal

from nanollama.tokenizer.stream import ByteStream, PieceStream, decode_all, shown_pieces
from nanollama.vocabulary import TokenizerError, Vocabulary

AllowedSpecial = Literal["all"] | Collection[str]
Encoder = Callable[[str, Set[str]], list[int]]  # (text, special tokens that may be read out of it) -> ids, no BOS
KINDS = {"ranks": "llama3", "sentencepiece": "llama2", "llama2c": "llama2c", "json": "hf", "gguf": "gguf"}


class Tokenizer:
    """A text <-> token ids map. Text that looks like a special token is text, unless allowed_special names it.

    kind is "llama3", "llama2", "llama2c", "hf" or "gguf"; bos_id, eos_id and pad_id are None where the vocabulary has
    no such token, and pad_id is never the eos id; stop_ids are the ids that end generation, from all files that name
    any. add_bos: whether a text begins with BOS. rows: ids from vocab_size up to it decode to nothing.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder, rows: int = 0) -> None:
        self.vocabulary, self._encoder = vocabulary, encoder
        self.kind = KINDS[vocabulary.format]
        self.vocab_size = len(vocabulary.tokens)
        self.rows = max(rows, self.vocab_size)
        self.bos_id, self.eos_id, self.pad_id = vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id
        self.stop_ids = frozenset(vocabulary.stop_ids)
        self.special_ids = vocabulary.special_ids
        self.add_bos, self.chat_template = vocabulary.add_bos, vocabulary.chat_template
        self.shown = None if vocabulary.kind == "bpe" else shown_pieces(vocabulary, self.rows)

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: AllowedSpecial = ()) -> list[int]:
        """bos: begin as this tokenizer begins a text, with BOS unless add_bos is false; eos: end with EOS, if any."""
        ids = self._encoder(well_formed(text), allowed_names(self.special_ids, allowed_special))
        begin = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        return [*begin, *ids, *([self.eos_id] if eos and self.eos_id is not None else [])]

    def decode(self, ids: Sequence[int]) -> str:
        return decode_all(self.stream(), ids)

    def stream(self) -> ByteStream | PieceStream:
        """Decodes ids as they come: the joined results of push, then flush, equal decode of the same ids.

        push(id) gives the whole characters that the id completes, "" while one is still short of bytes; flush() what is
        left of an unfinished character, as U+FFFD, and the stream is then as new.
        """
        return ByteStream(self.token_bytes) if self.shown is None else PieceStream(self.vocabulary, self.shown)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.rows:
            raise TokenizerError(f"token id {token_id} is outside of the tokenizer's 0..{self.rows - 1}")
        return self.vocabulary.tokens[token_id] if token_id < self.vocab_size else b""


def well_formed(text: str) -> str:
    """Text that UTF-8 can carry: pairs of surrogates joined, lone ones replaced by U+FFFD (as tiktoken does)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def allowed_names(special_ids: dict[str, int], allowed_special: AllowedSpecial) -> Set[str]:
    """The special tokens that encode may read out of text; raises TokenizerError on a name that does not exist."""
    if isinstance(allowed_special, str):
        if allowed_special != "all":
            raise TokenizerError(f'allowed_special is {allowed_special!r}: expected "all" or a set of special tokens')
        return special_ids.keys()
    unknown = sorted(set(allowed_special) - special_ids.keys())
    if unknown:
        raise TokenizerError(f"allowed_special names {unknown[0]!r}, which is no special token of this tokenizer")
    return set(allowed_special)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def split_special(text: str, names: Set[str]) -> Iterator[tuple[str, bool]]:
    """Cuts text at the named special tokens: (part, whether the part is one of them); no empty parts."""
    if not names:
        parts = [text]
    else:
        # Longest first: where one name starts with another, the longer one is meant.
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
    for i, part in enumerate(parts):
        if part:
            yield part, i % 2 == 1


def by_parts(encode: Callable[[str], list[int]], special_ids: dict[str, int]) -> Encoder:
    """An encoder for a library that reads no special tokens: the text between them, part by part."""

    def encoder(text: str, allowed: Set[str]) -> list[int]:
        ids: list[int] = []
        for part, is_special in split_special(text, allowed):
            ids += [special_ids[part]] if is_special else encode(part)
        return ids

    return encoder
