"""Hugging Face's tokenizer.json, for folders that bring no tokenizer.model; encoded by the `tokenizers` package.

Two decoders exist among Llamas: ByteLevel (Llama 3) and ByteFallback (Llama 2). decode follows Meta's tokenizer for
the first and sentencepiece for the second, so that the kinds agree on the same vocabulary.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.json').encode('Hi', bos=True))"
    [128000, 13347]
"""  # noqa: E501

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nanollama.tokenizer.base import (
    AllowedSpecial,
    TokenizerError,
    allowed_names,
    check_count,
    check_id,
    split_special,
    well_formed,
)
from nanollama.tokenizer.spm import SPACE
from nanollama.tokenizer.stream import ByteStream, Pieces, PieceStream, decode_all

BOS_NAMES = ("<|begin_of_text|>", "<s>")
EOS_NAMES = ("<|end_of_text|>", "</s>")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>")
STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "</s>")
# What Llama files use. Others (a Precompiled normalizer is a table that Rust code trusts) are refused, not guessed at.
NORMALIZERS = {"Sequence", "Prepend", "Replace", "NFC"}
PRE_TOKENIZERS = {"Sequence", "Split", "ByteLevel", "Metaspace"}


def byte_alphabet() -> dict[str, int]:
    """Character -> byte in a byte-level vocabulary (GPT-2's scheme): printable Latin-1 stands for itself, the other
    bytes for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _types(part: Any) -> set[str]:
    """The "type" of a normalizer, pre-tokenizer or decoder and of all that it is made of."""
    if isinstance(part, list):
        return set().union(*(_types(item) for item in part))
    if isinstance(part, dict):
        own = {part["type"]} if isinstance(part.get("type"), str) else set()
        return own | _types([value for value in part.values() if isinstance(value, list)])
    return set()


def parse_json(data: bytes) -> dict[str, Any]:
    """Reads a tokenizer.json and checks the shape of what is used of it; raises TokenizerError."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"not valid JSON: {error}") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError('JSON, but no tokenizer: it has no "model"')
    if model.get("type") != "BPE" or not isinstance(model.get("merges"), list):
        raise TokenizerError(f'model type {model.get("type")!r:.40}: expected "BPE" with a list of merges')
    vocab, added = model.get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise TokenizerError("its vocabulary is no map of tokens to ids")
    if not isinstance(added, list) or not all(_is_added_token(token) for token in added):
        raise TokenizerError("its added_tokens are no list of tokens with id, content and special")
    for name, allowed in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        strange = _types(content.get(name)) - allowed
        if strange:
            raise TokenizerError(f"its {name} uses {min(strange)!r:.40}, which no Llama does")
    return content


def _is_added_token(token: Any) -> bool:
    if not isinstance(token, dict):
        return False
    return type(token.get("id")) is int and type(token.get("content")) is str and type(token.get("special")) is bool


def tokens_by_id(content: dict[str, Any]) -> list[str]:
    """All tokens, added ones included, in the order of their ids; raises TokenizerError unless these are 0..n-1."""
    ids = dict(content["model"]["vocab"])
    for token in content.get("added_tokens") or []:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise TokenizerError(f"token {token['content']!r:.40} has two ids")
    check_count(len(ids))
    if sorted(ids.values()) != list(range(len(ids))):
        raise TokenizerError(f"the ids of its {len(ids)} tokens are not 0..{len(ids) - 1}, each once")
    return sorted(ids, key=ids.__getitem__)


def byte_table(tokens: list[str], special: dict[str, int]) -> list[bytes]:
    """Token id -> bytes of a byte-level vocabulary; raises TokenizerError."""
    alphabet = byte_alphabet()
    missing = set(alphabet) - set(tokens)
    if missing:
        raise TokenizerError(f"{len(missing)} of the 256 single bytes have no token")
    table = []
    for token in tokens:
        # Special tokens, and other added ones with a space or another letter outside the alphabet, spell themselves.
        spelled = token in special or not set(token) <= alphabet.keys()
        table.append(token.encode("utf-8") if spelled else bytes(alphabet[character] for character in token))
    return table


def piece_table(tokens: list[str], special: dict[str, int], strip_leading_space: bool) -> Pieces:
    """The vocabulary of a ByteFallback decoder, as decode sees it; raises TokenizerError."""
    byte_ids = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    missing = byte_ids.keys() - set(tokens)
    if missing:
        raise TokenizerError(f"{len(missing)} of the 256 byte tokens are missing, such as {min(missing)}")
    hidden = special.keys() - {"<unk>"}
    texts = ["" if token in hidden else token.replace(SPACE, " ") for token in tokens]
    if "<unk>" in special:
        texts[special["<unk>"]] = " \u2047 "  # as sentencepiece shows it
    bytes_ = {i: byte_ids[token] for i, token in enumerate(tokens) if token in byte_ids}
    return Pieces(texts, bytes_, strip_leading_space=strip_leading_space, unknown_id=special.get("<unk>"))


class HFTokenizer:
    """See base.Tokenizer."""

    kind = "hf"
    add_bos: bool = True
    chat_template: str | None = None

    def __init__(self, content: dict[str, Any], tokens: list[str], backend: tokenizers.Tokenizer):
        self.backend = backend
        backend.encode_special_tokens = True  # text that looks like a special token is text
        backend.no_truncation()  # a file may carry the settings of some training run
        backend.no_padding()
        self.vocab_size = len(tokens)
        self.special_ids = {t["content"]: t["id"] for t in content.get("added_tokens") or [] if t["special"]}
        self.bos_id = self._id_of(BOS_NAMES)
        self.eos_id = self._id_of(EOS_NAMES)
        pad = [self.special_ids[name] for name in PAD_NAMES if name in self.special_ids]
        self.pad_id = pad[0] if pad else None
        self.stop_ids = frozenset(self.special_ids[name] for name in STOP_NAMES if name in self.special_ids)
        decoder = _types(content.get("decoder"))
        self.bytes: list[bytes] | None = None
        if "ByteLevel" in decoder:
            self.bytes = byte_table(tokens, self.special_ids)
        elif "ByteFallback" in decoder:
            self.pieces = piece_table(tokens, self.special_ids, bool(decoder & {"Strip", "Metaspace"}))
        else:
            raise TokenizerError(f"its decoder is {sorted(decoder)}: expected ByteLevel (Llama 3) or ByteFallback (2)")

    def _id_of(self, names: Sequence[str]) -> int:
        for name in names:
            if name in self.special_ids:
                return self.special_ids[name]
        raise TokenizerError(f"none of {' and '.join(names)} is a special token: no Llama's vocabulary")

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: AllowedSpecial = ()) -> list[int]:
        ids = [self.bos_id] if bos else []
        for part, is_special in split_special(well_formed(text), allowed_names(self.special_ids, allowed_special)):
            ids += [self.special_ids[part]] if is_special else self.backend.encode(part, add_special_tokens=False).ids
        return ids + [self.eos_id] if eos else ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        assert self.bytes is not None
        return self.bytes[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        return decode_all(self.stream(), ids)

    def stream(self) -> ByteStream | PieceStream:
        return ByteStream(self.token_bytes) if self.bytes is not None else PieceStream(self.pieces)


def _build(data: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:
        # A Rust panic arrives as PanicException, which is no Exception; Ctrl-C must pass.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(" ".join(str(error).split())[:200]) from None
        raise


def load(data: bytes, path: Path) -> HFTokenizer:
    """data: the content of a tokenizer.json; raises TokenizerError."""
    try:
        content = parse_json(data)
        tokens = tokens_by_id(content)  # before the Rust code sees them
        return HFTokenizer(content, tokens, _build(data))
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer {path}: not a usable tokenizer.json: {error}") from None
