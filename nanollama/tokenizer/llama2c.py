"""llama2.c's tokenizer.bin: a sentencepiece BPE vocabulary with scores, as run.c reads it.

The file, little-endian: uint32 max_token_length; then for each token float32 score, int32 length, the bytes.
Spaces are spaces (not "▁"); token 0 is <unk>, 1 BOS, 2 EOS, 3 to 258 are the bytes <0x00> to <0xFF>.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tok512.bin').encode('Once', bos=True))"
    [1, 403]
"""  # noqa: E501

import heapq
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from nanollama.tokenizer.base import (
    AllowedSpecial,
    TokenizerError,
    allowed_names,
    check_count,
    split_special,
    well_formed,
)
from nanollama.tokenizer.stream import Pieces, PieceStream, decode_all

UNK_ID, BOS_ID, EOS_ID, FIRST_BYTE_ID, FIRST_TEXT_ID = 0, 1, 2, 3, 259
MAX_TOKEN_BYTES = 65_535  # Llama 2's longest is 27


def looks_like_bin(data: bytes) -> bool:
    """A small max_token_length; a sentencepiece model, which also may start with 0x0A, has no zeros there."""
    return len(data) >= 4 and 0 < int.from_bytes(data[:4], "little") <= MAX_TOKEN_BYTES


def parse_bin(data: bytes) -> tuple[list[str], list[float]]:
    """(tokens, scores) by id; raises TokenizerError where the file is broken."""
    max_token_bytes = int.from_bytes(data[:4], "little")
    tokens: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        check_count(len(tokens))
        if len(data) - at < 8:
            raise TokenizerError(f"cut off within token {len(tokens)}")
        score, size = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= size <= min(max_token_bytes, len(data) - at):
            raise TokenizerError(
                f"token {len(tokens)} is said to have {size} bytes; the header allows {max_token_bytes}, "
                f"{len(data) - at} are left"
            )
        if not math.isfinite(score):
            raise TokenizerError(f"token {len(tokens)} has score {score}")
        try:
            tokens.append(data[at : at + size].decode("utf-8"))
        except UnicodeDecodeError:
            raise TokenizerError(f"token {len(tokens)} is not UTF-8") from None
        scores.append(score)
        at += size
    return tokens, scores


def check_tokens(tokens: list[str]) -> None:
    for byte in range(256):
        i = FIRST_BYTE_ID + byte
        if i >= len(tokens) or tokens[i] != f"<0x{byte:02X}>":
            found = repr(tokens[i]) if i < len(tokens) else "the end of the file"
            raise TokenizerError(f"token {i} should be the byte <0x{byte:02X}>, found {found:.40}")
    seen: set[str] = set()
    for i, token in enumerate(tokens[FIRST_TEXT_ID:], start=FIRST_TEXT_ID):
        if token in seen:
            raise TokenizerError(f"token {i}, {token!r:.40}, is there twice")
        seen.add(token)
    if " " not in seen:
        raise TokenizerError("the space, which encoding puts before the text, has no token")


class Llama2cTokenizer:
    """See base.Tokenizer. decode shows nothing for BOS and EOS, and takes away the space that encode put in front."""

    kind = "llama2c"
    add_bos: bool = True
    chat_template: str | None = None

    def __init__(self, tokens: list[str], scores: list[float]):
        self.tokens = tokens
        self.scores = scores
        # Bytes and special tokens are not found by their spelling: "<0x41>" in a text stays text.
        self.ids = {token: i for i, token in enumerate(tokens) if i >= FIRST_TEXT_ID}
        self.vocab_size = len(tokens)
        self.special_ids = {"<unk>": UNK_ID, "<s>": BOS_ID, "</s>": EOS_ID}
        self.bos_id, self.eos_id, self.pad_id = BOS_ID, EOS_ID, None
        self.stop_ids = frozenset({EOS_ID})
        self.pieces = Pieces(
            texts=["<unk>", "", ""] + tokens[FIRST_BYTE_ID:],
            bytes_={FIRST_BYTE_ID + byte: bytes([byte]) for byte in range(256)},
        )

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: AllowedSpecial = ()) -> list[int]:
        ids = [self.bos_id] if bos else []
        for part, is_special in split_special(well_formed(text), allowed_names(self.special_ids, allowed_special)):
            ids += [self.special_ids[part]] if is_special else self._merge(self._characters(" " + part))
        return ids + [self.eos_id] if eos else ids

    def _characters(self, text: str) -> list[int]:
        """One id a character, or its bytes where the vocabulary lacks it (byte fallback)."""
        ids: list[int] = []
        for character in text:
            token_id = self.ids.get(character)
            ids += [token_id] if token_id is not None else [FIRST_BYTE_ID + b for b in character.encode("utf-8")]
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        """run.c's encode: merge the neighbours whose joined text has the best score, the leftmost of equals, until
        none is a token. A heap in place of run.c's scan: n log n, not n squared."""
        ids = list(ids)
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap: list[tuple[float, int, int, int, int]] = []  # (-score, left, its id, the right one's id, merged id)

        def offer(left: int) -> None:
            right = after[left]
            if right >= len(ids) or self._is_byte(ids[left]) or self._is_byte(ids[right]):
                return
            merged = self.ids.get(self.tokens[ids[left]] + self.tokens[ids[right]])
            if merged is not None:
                heapq.heappush(heap, (-self.scores[merged], left, ids[left], ids[right], merged))

        for left in range(len(ids) - 1):
            offer(left)
        while heap:
            _, left, left_id, right_id, merged = heapq.heappop(heap)
            right = after[left]
            if ids[left] != left_id or right >= len(ids) or ids[right] != right_id:
                continue  # one of the two has been merged away since
            ids[left], ids[right] = merged, -1
            after[left] = after[right]
            if after[right] < len(ids):
                before[after[right]] = left
            offer(left)
            if before[left] >= 0:
                offer(before[left])
        return [token_id for token_id in ids if token_id >= 0]

    @staticmethod
    def _is_byte(token_id: int) -> bool:
        return token_id < FIRST_TEXT_ID

    def decode(self, ids: Sequence[int]) -> str:
        return decode_all(self.stream(), ids)

    def stream(self) -> PieceStream:
        return PieceStream(self.pieces)


def load(data: bytes, path: Path) -> Llama2cTokenizer:
    """data: the content of a tokenizer.bin; raises TokenizerError."""
    try:
        tokens, scores = parse_bin(data)
        check_tokens(tokens)
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer {path}: not a usable llama2.c tokenizer.bin: {error}") from None
    return Llama2cTokenizer(tokens, scores)
