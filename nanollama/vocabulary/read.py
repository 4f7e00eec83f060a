"""Any tokenizer file -> Vocabulary, whatever its name: by what is in it, checked before any library sees it.

    python -c "from nanollama.vocabulary import read; print(read('tok512.bin').tokens[403])"   # b'\\xe2\\x96\\x81Once'

| format        | file                                                                         |
| ------------- | ---------------------------------------------------------------------------- |
| ranks         | Meta's tokenizer.model of Llama 3: lines of `base64-token rank`              |
| sentencepiece | .model of type BPE or unigram: Llama 2 and own vocabularies                  |
| llama2c       | llama2.c's tokenizer.bin                                                     |
| json          | tokenizer.json of BPE or unigram                                             |
| gguf          | the header of a .gguf                                                        |

Sources: llama_models.llama3.tokenizer; sentencepiece_model.proto; llama2.c tokenizer.py; tokenizers; ggml's gguf.md.
"""

import base64
import binascii
import io
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from nanollama import gguf_header
from nanollama.gate.charsmap import check_charsmap
from nanollama.vocabulary import from_json
from nanollama.vocabulary.added import Declared
from nanollama.vocabulary.beside import declared_tokens, files_beside, with_declared
from nanollama.vocabulary.spoken import ALIASES, pattern_of
from nanollama.vocabulary.value import (
    BYTE_PIECES,
    MAX_FILE_BYTES,
    MAX_TOKEN_BYTES,
    SPACE,
    TokenizerError,
    TokenType,
    Vocabulary,
    check_count,
    check_lengths,
    llama3_special_tokens,
)

MAX_SCORE = 3.4e38  # float32's largest: what sentencepiece keeps
NAMED_TEMPLATE = "tokenizer.chat_template."
UNIGRAM, BPE = 1, 2  # sentencepiece's TrainerSpec.ModelType


def read(path: str | Path) -> Vocabulary:
    """The vocabulary in a file of any kind, with what the files beside it declare; raises TokenizerError, one line."""
    path = Path(path)
    try:
        if _is_gguf(path):
            return with_declared(_checked(from_gguf(_header_keys(path)), path), {})
        data = _read_bytes(path)
        folders = [path.parent, *([path.parent.parent] if path.parent.name == "original" else [])]
        files = files_beside(folders)
        found = parse(data, declared_tokens(files))
        return with_declared(_checked(found if found.data else replace(found, data=data), path), files)
    except OSError as error:
        raise TokenizerError(f"tokenizer {path}: cannot be read: {error.strerror}") from None
    except (TokenizerError, UnicodeDecodeError, struct.error) as error:
        raise TokenizerError(f"tokenizer {path}: {' '.join(str(error).split())[:360]}") from None


def _checked(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    check_lengths(vocabulary)
    return replace(vocabulary, where=str(path))


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        what = "is a folder, name the file in it" if path.is_dir() else "does not exist or is no regular file"
        raise TokenizerError(what)
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _header_keys(path: Path) -> dict[str, Any]:
    try:
        return gguf_header.read(path).keys
    except ValueError as error:
        raise TokenizerError(str(error).removeprefix(f"{path}: ")) from None


def _read_bytes(path: Path) -> bytes:
    """The file's content; raises TokenizerError where there is none or far too much of it."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise TokenizerError(f"{size_bytes:,} bytes, no tokenizer is above {MAX_FILE_BYTES:,}")
    data = path.read_bytes()
    if not data.strip():
        raise TokenizerError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError("is a git-lfs pointer and not the file itself: run `git lfs pull`")
    return data


def parse(data: bytes, declared: Declared = Declared()) -> Vocabulary:
    """The vocabulary in a file's content, but for GGUF; raises TokenizerError.

    declared: tokens that files beside it add, to what can hold them: `data` is then the content with them.
    """
    if len(data) >= 4 and 0 < int.from_bytes(data[:4], "little") <= MAX_TOKEN_BYTES:
        return from_llama2c(data)  # first: a longest token of 123 bytes makes it start with "{"
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return from_json.parse(data, declared)
    if re.match(rb"\s*[A-Za-z0-9+/]+={0,2}[ \t]+[0-9]+[ \t]*(\r?\n|$)", data):
        return from_ranks(data)
    if len(data) > 2 and data[0] == 0x0A and data[1] > 0:  # a ModelProto starts with its first piece
        return from_sentencepiece(data, declared)
    raise TokenizerError(
        f"it starts with {data[:8]!r}, which is neither a Llama 3 rank file, a sentencepiece model, "
        "a llama2.c tokenizer.bin nor a tokenizer.json; a cut or a wrong file?"
    )


# --- Meta's ranks ----------------------------------------------------------------------------------------------------


def from_ranks(data: bytes) -> Vocabulary:
    """Meta's tokenizer.model of Llama 3; its 256 special tokens are in no file. Ranks must be 0..n-1, each once."""
    ranks: dict[bytes, int] = {}
    for line_number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            token, rank = _parse_rank(line, f"line {line_number}")
            if token in ranks:
                raise TokenizerError(f"line {line_number}: token {token!r:.40} is there twice")
            ranks[token] = rank
            check_count(len(ranks))
    n = len(ranks)
    # Special ids start at the number of ranks: a gap or a repeat would give two tokens one id.
    if sorted(ranks.values()) != list(range(n)):
        raise TokenizerError(f"its {n} ranks are not 0..{n - 1}, each once; the file is cut")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{len(missing)} of the 256 single bytes have no token, the first is {missing[0]}")
    special = llama3_special_tokens()
    types: list[int] = [*[TokenType.NORMAL] * n, *[TokenType.CONTROL] * len(special)]
    return Vocabulary(
        "bpe", sorted(ranks, key=ranks.__getitem__) + special, types,
        pre="llama-bpe", bos_id=n, eos_id=n + 1, pad_id=n + 4, format="ranks",
    )  # fmt: skip


def _parse_rank(line: bytes, where: str) -> tuple[bytes, int]:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
        raise TokenizerError(f"{where}: expected a base64 token and its rank, got {line!r:.60}")
    try:
        return base64.b64decode(parts[0], validate=True), int(parts[1])
    except binascii.Error as error:
        raise TokenizerError(f"{where}: bad base64 {parts[0]!r:.40}: {error}") from None


# --- llama2.c --------------------------------------------------------------------------------------------------------


def from_llama2c(data: bytes) -> Vocabulary:
    """llama2.c's tokenizer.bin: uint32 longest token, then for each float32 score, int32 length, the bytes.

    Spaces are spaces; token 0 is <unk>, 1 BOS and 2 EOS with line ends around their names, 3 to 258 are the bytes.
    """
    longest = int.from_bytes(data[:4], "little")
    tokens: list[bytes] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        check_count(len(tokens))
        if len(data) - at < 8:
            raise TokenizerError(f"cut off within token {len(tokens)}")
        score, size = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= size <= min(longest, len(data) - at):
            raise TokenizerError(
                f"token {len(tokens)} is said to have {size} bytes; the header allows {longest}, "
                f"{len(data) - at} are left"
            )
        tokens.append(data[at : at + size])
        scores.append(score)
        at += size
    for i, piece in enumerate(BYTE_PIECES, start=3):
        if i >= len(tokens) or tokens[i] != piece:
            found = repr(tokens[i]) if i < len(tokens) else "the end of the file"
            raise TokenizerError(f"token {i} should be the byte {piece.decode()}, found {found:.40}")
    if b" " not in tokens[259:]:
        raise TokenizerError("the space, which encoding puts before the text, has no token")
    tokens[:3] = [b"<unk>", b"<s>", b"</s>"]
    tokens[3:] = [token.replace(b" ", SPACE.encode()) for token in tokens[3 : without_padding(tokens)]]
    counts = {TokenType.UNKNOWN: 1, TokenType.CONTROL: 2, TokenType.BYTE: 256, TokenType.NORMAL: len(tokens) - 259}
    types: list[int] = [kind for kind, count in counts.items() for _ in range(count)]
    vocabulary = Vocabulary("spm", tokens, types, scores[: len(tokens)], bos_id=1, eos_id=2, format="llama2c")
    check_pieces(vocabulary)
    return vocabulary


# --- sentencepiece ---------------------------------------------------------------------------------------------------


def from_sentencepiece(data: bytes, declared: Declared = Declared()) -> Vocabulary:
    """A sentencepiece .model (a ModelProto) of type BPE or unigram; what is declared beside it becomes its pieces."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        model = ModelProto.FromString(data)
    except DecodeError as error:
        raise TokenizerError(f"no sentencepiece model, or a cut one ({error}); download it again") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    check_count(len(model.pieces))
    if trainer.model_type not in (UNIGRAM, BPE):
        raise TokenizerError(f"model type {trainer.model_type}, expected 1 (unigram) or 2 (BPE)")
    for name, is_there in (
        ("a denormalizer", model.HasField("denormalizer_spec")),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix),
        ("escape_whitespaces=false", not normalizer.escape_whitespaces),
    ):
        if is_there:
            raise TokenizerError(f"it was trained with {name}, which is not supported")
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        if not -1 <= getattr(trainer, name) < len(model.pieces):
            raise TokenizerError(
                f"its {name} is {getattr(trainer, name)}: expected -1 or one of {len(model.pieces)} ids"
            )
    try:
        check_charsmap(normalizer.precompiled_charsmap)
    except ValueError as error:
        raise TokenizerError(str(error)) from None
    ids = {p.piece: i for i, p in enumerate(model.pieces) if isinstance(p.piece, str)}
    control = {p.piece for p in model.pieces if p.type != TokenType.NORMAL}
    more = declared.of_vocabulary(ids, control) if len(ids) == len(model.pieces) else []
    for token in more:
        piece = model.pieces[token["id"]] if token["id"] < len(model.pieces) else model.pieces.add()
        piece.piece, piece.type = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    # A piece that is not UTF-8 arrives as bytes; check_pieces refuses it.
    tokens = [p.piece.encode() if isinstance(p.piece, str) else p.piece for p in model.pieces]
    types = [p.type for p in model.pieces]
    ids = {p.piece: i for i, p in enumerate(model.pieces) if p.type == TokenType.CONTROL}
    vocabulary = Vocabulary(
        "spm" if trainer.model_type == BPE else "unigram", tokens, types, [p.score for p in model.pieces],
        bos_id=ids.get(trainer.bos_piece), eos_id=ids.get(trainer.eos_piece), pad_id=ids.get(trainer.pad_piece),
        add_dummy_prefix=normalizer.add_dummy_prefix, rewrites=bool(normalizer.precompiled_charsmap),
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces, format="sentencepiece",
        data=model.SerializeToString(deterministic=True) if more else b"",
    )  # fmt: skip
    check_pieces(vocabulary, needs_bytes=trainer.byte_fallback)
    return vocabulary


def check_pieces(vocabulary: Vocabulary, needs_bytes: bool = True) -> None:
    """Raises TokenizerError on what sentencepiece's C++ would trip over, or would encode wrongly without a word."""
    seen: set[bytes] = set()
    for i, (piece, score, kind) in enumerate(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)):
        piece.decode("utf-8")
        if not piece or b"\0" in piece or piece in seen:
            raise TokenizerError(f"piece {i} is {piece!r:.40}: empty, with a NUL, or there twice")
        if not TokenType.NORMAL <= kind <= TokenType.BYTE or not abs(score) < MAX_SCORE:
            raise TokenizerError(f"piece {i} has type {kind} and score {score}")
        if kind == TokenType.BYTE and piece not in BYTE_PIECES:
            raise TokenizerError(f"byte piece {piece!r:.40} is none of <0x00>..<0xFF>")
        seen.add(piece)
    if vocabulary.types.count(TokenType.UNKNOWN) != 1:
        raise TokenizerError("it does not have exactly one unknown piece")
    missing = BYTE_PIECES.keys() - {vocabulary.tokens[i] for i, k in enumerate(vocabulary.types) if k == TokenType.BYTE}
    if needs_bytes and missing:
        raise TokenizerError(f"{len(missing)} of the 256 byte pieces are missing, such as {min(missing).decode()}")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def from_gguf(keys: dict[str, Any]) -> Vocabulary:
    """The vocabulary in a header's keys: llama.cpp's "gpt2" (byte-level BPE) and "llama" (sentencepiece BPE)."""
    part = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
    kind = {"gpt2": "bpe", "llama": "spm"}.get(str(part.get("model")))
    if kind is None:
        what = f"its tokenizer.ggml.model is {part.get('model')!r:.40}: gpt2 and llama can be read"
        raise TokenizerError(f"{what}; give the model's own tokenizer with --tokenizer")
    texts = _gguf_list(part, "tokens", str)
    types = _gguf_list(part, "token_type", int) if "token_type" in part else [TokenType.NORMAL] * len(texts)
    if set(types) <= {TokenType.NORMAL}:  # of early converters
        types = [_type_by_name(text, kind) for text in texts]
    check_count(len(texts))
    rows = len(texts)
    texts = texts[: without_padding([text.encode() for text in texts])]
    types = types[: len(texts)]
    ids = {name: part.get(f"{name}_token_id") for name in ("bos", "eos", "padding", "eot", "eom")}
    ids = {name: None if i in (-1, 2**32 - 1) else i for name, i in ids.items()}  # how some converters say none
    for name, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < rows):
            raise TokenizerError(f"its {name}_token_id is {i!r:.40}: expected an id below {rows}")
    template, pre = keys.get("tokenizer.chat_template"), str(part.get("pre"))
    shared: dict[str, Any] = {
        "bos_id": ids["bos"], "eos_id": ids["eos"], "pad_id": ids["padding"],
        "ends": tuple(ids[name] for name in ("eot", "eom") if ids[name] is not None),
        "chat_template": template if isinstance(template, str) and template else None,
        "named_templates": {
            name.removeprefix(NAMED_TEMPLATE): text
            for name, text in keys.items()
            if name.startswith(NAMED_TEMPLATE) and isinstance(text, str)
        },
        "add_bos": part.get("add_bos_token", kind == "spm" or ALIASES.get(pre, pre) == "llama-bpe"),
        "format": "gguf",
    }  # fmt: skip
    n_added = {i for i, t in enumerate(types) if t != TokenType.NORMAL}
    tokens = from_json.byte_level(texts, n_added) if kind == "bpe" else [text.encode() for text in texts]
    if "tokenizer.huggingface.json" in keys:  # the file itself, where llama.cpp's keys cannot say all that it does
        whole = from_json.parse(str(keys["tokenizer.huggingface.json"]).encode())
        if whole.tokens != tokens:
            raise TokenizerError("its tokenizer.huggingface.json has other tokens than its tokenizer.ggml.tokens")
        return replace(whole, **shared)
    if kind == "bpe":
        return Vocabulary("bpe", tokens, types, merges=_gguf_merges(part), pre=pre, **shared)
    found = Vocabulary(
        "spm", tokens, types, [float(score) for score in _gguf_list(part, "scores", (int, float))[: len(texts)]],
        add_dummy_prefix=bool(part.get("add_space_prefix", True)),
        remove_extra_whitespaces=bool(part.get("remove_extra_whitespaces", False)), **shared,
    )  # fmt: skip
    check_pieces(found, needs_bytes=found.has_bytes)
    return found


def _type_by_name(text: str, kind: str) -> int:
    if kind == "spm" and text.encode() in BYTE_PIECES:
        return TokenType.BYTE
    if kind == "spm" and text == "<unk>":
        return TokenType.UNKNOWN
    is_control = re.fullmatch(r"</?s>" if kind == "spm" else r"<\|\w+\|>", text)
    return TokenType.CONTROL if is_control else TokenType.NORMAL


def without_padding(tokens: list[bytes]) -> int:
    """How many tokens there are before those that only name a row, as GGUF and tokenizer.bin want (see padded)."""
    n = len(tokens)
    while n and tokens[n - 1] in (b"[PAD%d]" % (n - 1), b"[UNUSED%d]" % (n - 1)):
        n -= 1
    return n


def _gguf_merges(part: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Llama 3's may be left out: there, any two tokens that make one merge, by its id."""
    is_llama3 = pattern_of(part.get("pre")) is pattern_of("llama-bpe")
    if "merges" not in part and not is_llama3:
        raise TokenizerError(
            f"its pre-tokenizer (tokenizer.ggml.pre) is {part.get('pre')!r}, which needs tokenizer.ggml.merges: "
            "none are there; give the model's own tokenizer.json with --tokenizer"
        )
    return from_json.parse_merges(_gguf_list(part, "merges", str)) if "merges" in part else None


def _gguf_list(part: dict[str, Any], name: str, kind: Any) -> list[Any]:
    found = part.get(name)
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        what = f"its tokenizer.ggml.{name} is missing or holds something else"
        raise TokenizerError(f"{what}; give the model's own tokenizer with --tokenizer")
    if name in ("token_type", "scores") and len(found) != len(part["tokens"]):
        raise TokenizerError(f"its {len(found)} tokenizer.ggml.{name} do not fit its {len(part['tokens'])} tokens")
    return found
