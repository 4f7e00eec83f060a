"""Llama 2's tokenizer and own vocabularies: a sentencepiece .model, encoded by the sentencepiece package.

The package is C++ and trusts its file, so the file is read and checked here first; decoding is ours, so that a
stream of ids and a list of ids give the same text.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.model').encode('Hi', bos=True))"
    [1, 6324]
"""  # noqa: E501

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from nanollama.tokenizer.base import (
    AllowedSpecial,
    TokenizerError,
    allowed_names,
    check_count,
    split_special,
    well_formed,
)
from nanollama.tokenizer.stream import Pieces, PieceStream, decode_all

SPACE = "▁"  # U+2581: how a space is spelled in a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # protobuf wire types


@dataclass
class Model:
    """What we need to know of a .model file (sentencepiece_model.proto)."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # (piece, score, type) by id
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def looks_like_model(data: bytes) -> bool:
    """A ModelProto starts with its first piece: field 1, a length above 0."""
    return len(data) > 2 and data[0] == 0x0A and data[1] > 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it)."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise TokenizerError("a number is cut off or too long")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) of each field of a protobuf message; raises TokenizerError where it is broken."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == LENGTH:
            size, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise TokenizerError(f"unknown wire type {wire} at byte {at}")
        if number == 0 or size > len(data) - at:
            raise TokenizerError(f"field {number} at byte {at} needs {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TokenizerError("a number was expected, found bytes")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TokenizerError("bytes were expected, found a number")
    return value


def _parse_piece(data: bytes) -> tuple[str, float, int]:
    piece, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            piece = _bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _number(value)
    return piece, score, kind


def parse_model(data: bytes) -> Model:
    """Reads a ModelProto; raises TokenizerError, UnicodeDecodeError or struct.error where it is broken."""
    model = Model()
    for number, value in _fields(data):
        if number == 1:
            check_count(len(model.pieces))
            model.pieces.append(_parse_piece(_bytes(value)))
        elif number == 2:
            _parse_trainer(_bytes(value), model)
        elif number == 3:
            _parse_normalizer(_bytes(value), model)
        elif number == 5:
            raise TokenizerError("it has a denormalizer, which is not supported")
    return model


def _parse_trainer(data: bytes, model: Model) -> None:
    for number, value in _fields(data):
        if number == 3:
            model.model_type = _number(value)
        elif number == 24 and value:
            raise TokenizerError("it was trained with treat_whitespace_as_suffix, which is not supported")
        elif number == 35:
            model.byte_fallback = bool(_number(value))


def _parse_normalizer(data: bytes, model: Model) -> None:
    for number, value in _fields(data):
        if number == 2 and value:
            # A rule table would also be a way to make the C++ code read out of bounds.
            raise TokenizerError("it rewrites text before encoding; train with normalization_rule_name=identity")
        if number == 3:
            model.add_dummy_prefix = bool(_number(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_number(value))
        elif number == 5 and not value:
            raise TokenizerError("it was trained with escape_whitespaces=false, which is not supported")


def check_model(model: Model) -> None:
    """Raises TokenizerError on what the C++ code would trip over, or would encode wrongly without a word."""
    if model.model_type not in (UNIGRAM, BPE):
        raise TokenizerError(f"model type {model.model_type}, expected 1 (unigram) or 2 (BPE)")
    seen: set[str] = set()
    for i, (piece, score, kind) in enumerate(model.pieces):
        if not piece or "\0" in piece or piece in seen:
            raise TokenizerError(f"piece {i} is {piece!r:.40}: empty, with a NUL, or there twice")
        if not NORMAL <= kind <= BYTE or not math.isfinite(score):
            raise TokenizerError(f"piece {i} has type {kind} and score {score}")
        seen.add(piece)
    if sum(kind == UNKNOWN for _, _, kind in model.pieces) != 1:
        raise TokenizerError("it does not have exactly one unknown piece")
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - {piece for piece, _, kind in model.pieces if kind == BYTE}
    if model.byte_fallback and missing:
        raise TokenizerError(f"{len(missing)} of the 256 byte pieces are missing, such as {min(missing)}")
    strange = {piece for piece, _, kind in model.pieces if kind == BYTE and not _is_byte_piece(piece)}
    if strange:
        raise TokenizerError(f"byte piece {min(strange)!r:.40} is none of <0x00>..<0xFF>")


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">" and set(piece[3:5]) <= set("0123456789ABCDEF")


def pieces_of(model: Model) -> Pieces:
    """The vocabulary as decode sees it."""
    texts = []
    for piece, _, kind in model.pieces:
        if kind == UNKNOWN:
            texts.append(" \u2047 ")  # sentencepiece's default unk_surface
        else:
            texts.append("" if kind == CONTROL else piece.replace(SPACE, " "))
    return Pieces(
        texts=texts,
        bytes_={i: bytes([int(p[3:5], 16)]) for i, (p, _, kind) in enumerate(model.pieces) if kind == BYTE},
        strip_leading_space=model.add_dummy_prefix,
        strip_all_leading_spaces=model.remove_extra_whitespaces,
        unknown_id=next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN),
    )


class SentencePieceTokenizer:
    """See base.Tokenizer. decode shows nothing for control pieces, as sentencepiece's does."""

    kind = "llama2"
    add_bos: bool = True
    chat_template: str | None = None

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, model: Model):
        self.processor = processor
        self.pieces = pieces_of(model)
        self.vocab_size = len(model.pieces)
        self.special_ids = {p: i for i, (p, _, kind) in enumerate(model.pieces) if kind in (UNKNOWN, CONTROL)}
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError("it has no BOS or no EOS piece; train with bos_id=1 and eos_id=2")
        # Llama 2 has no padding token. Never EOS: training would then learn not to stop.
        self.pad_id: int | None = processor.pad_id() if processor.pad_id() not in (-1, self.eos_id) else None
        self.stop_ids = frozenset({self.eos_id})

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: AllowedSpecial = ()) -> list[int]:
        ids = [self.bos_id] if bos else []
        for part, is_special in split_special(well_formed(text), allowed_names(self.special_ids, allowed_special)):
            ids += [self.special_ids[part]] if is_special else self.processor.encode(part)
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        return decode_all(self.stream(), ids)

    def stream(self) -> PieceStream:
        return PieceStream(self.pieces)


def load(data: bytes, path: Path) -> SentencePieceTokenizer:
    """data: the content of a sentencepiece .model; raises TokenizerError."""
    try:
        model = parse_model(data)
        check_model(model)
        return SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_proto=data), model)
    except (TokenizerError, UnicodeDecodeError, struct.error, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"tokenizer {path}: not a usable sentencepiece model: {reason}") from None
