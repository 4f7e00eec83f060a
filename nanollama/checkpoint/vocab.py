"""A vocabulary as data, read from any tokenizer file, so that it can be written into another format's.

Two kinds exist among Llamas: byte-level BPE ("bpe": Llama 3, tiktoken) and sentencepiece BPE with byte fallback ("spm":
Llama 2, llama2.c and own vocabularies). Encoding text is nanollama.tokenizer's affair; here only tables move.

    python -c "from nanollama.checkpoint.vocab import read; print(len(read('tokenizer.model').tokens))"   # 128256
"""

import base64
import binascii
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollama.checkpoint.weights import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece's and GGUF's numbers
SPACE = "▁"  # how sentencepiece spells a space
LLAMA3_SPECIAL_COUNT = 256
LLAMA3_NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)
BOS_NAMES, EOS_NAMES, PAD_NAMES = (
    ("<|begin_of_text|>", "<s>"),
    ("<|end_of_text|>", "</s>"),
    ("<|finetune_right_pad_id|>", "<pad>"),
)


@dataclass(frozen=True)
class Vocabulary:
    """tokens: bytes by id; for "spm" the piece's text in UTF-8, "▁" for a space and "<0x0A>" for a byte piece."""

    kind: str  # "bpe" or "spm"
    tokens: list[bytes]
    scores: list[float]  # "spm": the higher, the earlier a merge; "bpe": 0
    types: list[int]
    bos_id: int
    eos_id: int
    pad_id: int | None = None
    add_dummy_prefix: bool = True  # "spm": a space before the text
    remove_extra_whitespaces: bool = False
    chat_template: str | None = None

    @property
    def n_ranks(self) -> int:
        """ "bpe": the number of ordinary tokens, which come first."""
        return next((i for i, kind in enumerate(self.types) if kind != NORMAL), len(self.types))

    @property
    def stop_ids(self) -> list[int]:
        """The eos id, and Llama 3's ends of a message and of a turn."""
        names = {b"<|eom_id|>", b"<|eot_id|>"} if self.kind == "bpe" else set()
        extra = [i for i in range(self.n_ranks, len(self.tokens)) if self.tokens[i] in names] if names else []
        return [self.eos_id, *extra]


def read(path: str | Path) -> Vocabulary:
    """The vocabulary of a tokenizer file of any kind; raises CheckpointError."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if data.lstrip()[:1] == b"{":
            vocabulary = from_tokenizer_json(json.loads(data))
        elif looks_like_ranks(data):
            vocabulary = from_ranks(data)
        elif len(data) > 12 and 0 < int.from_bytes(data[:4], "little") < 65_536:
            vocabulary = from_llama2c(data)
        else:
            vocabulary = from_sentencepiece(data)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror}): check the path") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(path, f"is not a tokenizer file that can be converted ({error!r})") from None
    template = _template_beside(path)
    return vocabulary if template is None else Vocabulary(**{**vars(vocabulary), "chat_template": template})


def _template_beside(path: Path) -> str | None:
    """The chat template that a Hugging Face folder holds, in either of its two places."""
    alone, config = path.parent / "chat_template.jinja", path.parent / "tokenizer_config.json"
    try:
        if alone.is_file():
            return alone.read_text("utf-8")
        template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def looks_like_ranks(data: bytes) -> bool:
    """tiktoken's lines of `base64 rank`."""
    line = data[:4096].split(b"\n", 1)[0].split()
    return len(line) == 2 and line[1].isdigit()


def llama3_special_tokens() -> list[bytes]:
    """The 256 names by order of id, as of Llama 3.1."""
    reserved = [f"reserved_special_token_{2 + i}" for i in range(LLAMA3_SPECIAL_COUNT - len(LLAMA3_NAMED))]
    return [f"<|{name}|>".encode() for name in (*LLAMA3_NAMED, *reserved)]


def from_ranks(data: bytes) -> Vocabulary:
    """Meta's tokenizer.model of Llama 3."""
    ranks = {}
    for line in data.splitlines():
        if line:
            token, rank = line.split()
            try:
                ranks[int(rank)] = base64.b64decode(token, validate=True)
            except binascii.Error as error:
                raise ValueError(f"line {line[:40]!r}: {error}") from None
    tokens = [ranks[i] for i in range(len(ranks))]  # KeyError where a rank is missing
    special = llama3_special_tokens()
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special)
    n = len(tokens)
    return Vocabulary("bpe", tokens + special, [0.0] * len(types), types, bos_id=n, eos_id=n + 1, pad_id=n + 4)


def from_llama2c(data: bytes) -> Vocabulary:
    """llama2.c's tokenizer.bin: spaces are written out, BOS and EOS have line ends around their names."""
    tokens: list[bytes] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= size <= len(data) - at:
            raise ValueError(f"token {len(tokens)} is said to have {size} bytes, {len(data) - at} are left")
        tokens.append(data[at : at + size])
        scores.append(score)
        at += size
    if len(tokens) < 259:
        raise ValueError(f"{len(tokens)} tokens: llama2.c's begin with 259 fixed ones")
    tokens[0:3] = [b"<unk>", b"<s>", b"</s>"]
    tokens[3:] = [token.replace(b" ", SPACE.encode()) for token in tokens[3:]]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    return Vocabulary("spm", tokens, scores, types, bos_id=1, eos_id=2)


def from_sentencepiece(data: bytes) -> Vocabulary:
    """A sentencepiece .model of type BPE (sentencepiece_model.proto)."""
    pieces: list[tuple[bytes, float, int]] = []
    trainer, normalizer = {}, {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1], score, piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces or trainer.get(3, 1) != 2:
        raise ValueError("only sentencepiece models of type BPE can be converted")
    if normalizer.get(2):
        raise ValueError(f"its normalization {normalizer.get(1)!r} exists in no other format; train with `identity`")
    pad_id = trainer.get(43, -1)
    return Vocabulary(
        "spm",
        [piece for piece, _, _ in pieces],
        [score for _, score, _ in pieces],
        [kind for _, _, kind in pieces],
        bos_id=trainer.get(41, 1),
        eos_id=trainer.get(42, 2),
        pad_id=pad_id if 0 <= pad_id < len(pieces) else None,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """(field number, integer or bytes) of one protobuf message."""
    found: list[tuple[int, Any]] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            found.append((key >> 3, value - (1 << 64) if value >> 63 else value))
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or size > len(data) - at:
            raise ValueError("a protobuf field is cut off or of an unknown kind")
        found.append((key >> 3, data[at : at + size]))
        at += size
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a protobuf number is too long")


def from_tokenizer_json(content: dict[str, Any]) -> Vocabulary:
    """Hugging Face's tokenizer.json of either kind."""
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']!r}: only BPE can be converted")
    by_id = {i: text for text, i in model["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    n = max([*by_id, *added]) + 1
    if n != len(by_id.keys() | added.keys()):
        raise ValueError("its ids have gaps")
    texts = [added[i]["content"] if i in added else by_id[i] for i in range(n)]
    ids = {text: i for i, text in enumerate(texts)}
    if model.get("byte_fallback"):
        tokens = [text.encode() for text in texts]
        types = [_spm_type(text, added.get(i), model.get("unk_token")) for i, text in enumerate(texts)]
        scores = _scores_from_merges(texts, model["merges"])
    else:
        alphabet = byte_alphabet()
        tokens = [texts[i].encode() if i in added else bytes(alphabet[c] for c in texts[i]) for i in range(n)]
        types = [CONTROL if i in added else NORMAL for i in range(n)]
        scores = [0.0] * n
    bos, eos, pad = (next((ids[t] for t in names if t in ids), None) for names in (BOS_NAMES, EOS_NAMES, PAD_NAMES))
    if bos is None or eos is None:
        raise ValueError("it has no begin-of-text and end-of-text tokens that a Llama uses")
    prefix = "Prepend" in json.dumps(content.get("normalizer"))
    return Vocabulary(
        "spm" if model.get("byte_fallback") else "bpe", tokens, scores, types, bos, eos, pad, add_dummy_prefix=prefix
    )


def _spm_type(text: str, added: dict[str, Any] | None, unknown: str | None) -> int:
    if text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _scores_from_merges(texts: list[str], merges: list[Any]) -> list[float]:
    """tokenizer.json keeps the order of the merges instead of scores: minus the place of a piece's first merge."""
    place: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        place.setdefault(left + right, len(place))
    return [-float(place.get(text, 0 if len(text) > 1 else len(texts))) for text in texts]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, the others from U+0100 on."""
    own = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}
