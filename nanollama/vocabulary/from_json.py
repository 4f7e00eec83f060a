"""Hugging Face's tokenizer.json -> Vocabulary. The file keeps the last word on encoding: the value describes it.

python -c "from nanollama.vocabulary import read; print(read('tokenizer.json').pre)"   # llama-bpe
"""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, Literal

from nanollama.gate import CheckpointError, tokenizers
from nanollama.gate.charsmap import check_charsmap
from nanollama.vocabulary import spoken
from nanollama.vocabulary.added import Declared
from nanollama.vocabulary.value import BYTE_PIECES, MAX_TOKENS, TokenizerError, TokenType, Vocabulary, byte_alphabet

DEEPEST = 32  # of nested normalizers and the like; Rust's recursion is not limited
Kind = Literal["bpe", "spm", "unigram"]


def parse(data: bytes, declared: Declared = Declared()) -> Vocabulary:
    """The vocabulary of a tokenizer.json, with what is declared beside it as its added tokens.

    Raises TokenizerError where its shape is not one.
    """
    content = _load(data)
    more = _not_listed(content, declared)
    model, listed = content["model"], content.get("added_tokens") or []
    texts, added = _texts(model, listed), {token["id"]: token for token in listed}
    kind: Kind = "unigram" if model["type"] == "Unigram" else "bpe" if _uses(content, "ByteLevel") else "spm"
    types = [_type(i, text, added.get(i), model, kind) for i, text in enumerate(texts)]
    merges = parse_merges(model["merges"]) if model["type"] == "BPE" else []
    names = {text: i for i, text in enumerate(texts)}
    begins = _begins_with(content, names)
    normalizer = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    added_ids = {i for i, t in enumerate(types) if t != TokenType.NORMAL}
    return Vocabulary(
        kind,
        _encoded(texts, added_ids if kind == "bpe" else None),
        types,
        scores=[] if kind == "bpe" else _scores(texts, merges, model),
        merges=merges if kind == "bpe" else None,
        pre=spoken.name_of(content) or "unknown" if kind == "bpe" else "default",
        bos_id=begins,
        add_bos=begins is not None,
        add_dummy_prefix='"Prepend"' in normalizer or ('"Metaspace"' in normalizer and '"never"' not in normalizer),
        format="json",
        data=json.dumps(content, ensure_ascii=False).encode() if more else b"",
        content=content,
    )


def _not_listed(content: dict[str, Any], declared: Declared) -> bool:
    """Adds to the list of added tokens what is declared elsewhere; whether there was any."""
    vocab, listed = content["model"].get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        return False  # of lists, or refused when its texts are read
    ids = vocab | {token["content"]: token["id"] for token in listed}
    more = declared.of_vocabulary(ids, {token["content"] for token in listed})
    content["added_tokens"] = sorted([*listed, *more], key=lambda token: token["id"])
    return bool(more)


def _load(data: bytes) -> dict[str, Any]:
    """The file's content, the shape of what is used of it checked."""
    try:
        content = tokenizers.load(data, "")
    except CheckpointError as error:
        raise TokenizerError(str(error).removeprefix(": ")) from None
    model = content["model"]
    # The oldest files do not name the type.
    kind = model.setdefault("type", "BPE" if "merges" in model else "Unigram" if "unk_id" in model else None)
    if kind not in ("BPE", "Unigram") or (kind == "BPE" and not isinstance(model.get("merges"), list)):
        raise TokenizerError(f'model type {kind!r:.40}: expected "BPE" with a list of merges, or "Unigram"')
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(_is_added_token(token) for token in added):
        raise TokenizerError("its added_tokens are no list of tokens with id, content and special")
    content["added_tokens"] = _numbered(added, model.get("vocab"))
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        for part in _parts(content.get(name), name, DEEPEST):
            if part.get("type") == "Precompiled":
                _check_precompiled(part)
    return content


def _numbered(added: list[dict[str, Any]], vocab: Any) -> list[dict[str, Any]]:
    """The added tokens with the ids that the `tokenizers` library gives them, whatever the file says: the model's own,
    else the next one behind the model's and those before.
    """
    pieces = [piece[0] for piece in vocab if isinstance(piece, list) and piece] if isinstance(vocab, list) else []
    own = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, piece in enumerate(map(str, pieces))}
    ids = [*own.values(), *(token["id"] for token in added)]
    clash = len({token["id"] for token in added}) < len(added)
    if not own or clash or not all(type(i) is int and 0 <= i < MAX_TOKENS for i in ids):
        return added  # refused when its texts are read
    given: dict[str, int] = {}
    following = len(own)
    for name in (token["content"] for token in added):
        given.setdefault(name, own.get(name, following))
        following = max(following, given[name] + 1)
    return [{**token, "id": given[token["content"]]} for token in added]


def _is_added_token(token: Any) -> bool:
    if not isinstance(token, dict):
        return False
    return type(token.get("id")) is int and type(token.get("content")) is str and type(token.get("special")) is bool


def _parts(part: Any, name: str, depth: int) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder and all that it is made of."""
    if depth == 0:
        raise TokenizerError(f"its {name} is nested more than {DEEPEST} deep")
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = [part] if isinstance(part, dict) else []
    return own + [p for item in inner if isinstance(item, (dict, list)) for p in _parts(item, name, depth - 1)]


def _uses(content: dict[str, Any], kind: str) -> bool:
    steps = [content.get("pre_tokenizer"), content.get("decoder")]
    return any(part.get("type") == kind for part in _parts(steps, "pre_tokenizer", DEEPEST + 1))


def _check_precompiled(part: dict[str, Any]) -> None:
    rules = part.get("precompiled_charsmap")
    try:
        check_charsmap(base64.b64decode(rules if isinstance(rules, str) else "!", validate=True))
    except (binascii.Error, ValueError) as error:
        raise TokenizerError(f"its Precompiled normalizer is broken: {error}") from None


def _texts(model: dict[str, Any], added: list[dict[str, Any]]) -> list[str]:
    """Every token's text by id; ids that no token has are filled with unused ones."""
    vocab = model.get("vocab")
    if model["type"] == "Unigram" and isinstance(vocab, list):
        if not all(isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) for v in vocab):
            raise TokenizerError("its vocabulary is no list of pieces with scores")
        ids = {piece: i for i, (piece, _) in enumerate(vocab)}
    else:
        if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
            raise TokenizerError("its vocabulary is no map of tokens to ids")
        ids = dict(vocab)
    for token in added:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise TokenizerError(f"token {token['content']!r:.40} has two ids")
    by_id = {i: text for text, i in ids.items()}
    n = len(ids)
    if not n or len(by_id) != n or min(by_id) < 0 or max(by_id) >= MAX_TOKENS:
        raise TokenizerError(f"the ids of its {n} tokens are not 0..{n - 1}, each once")
    return [by_id.get(i, f"[UNUSED{i}]") for i in range(max(by_id) + 1)]


def _type(i: int, text: str, added: dict[str, Any] | None, model: dict[str, Any], kind: Kind) -> int:
    is_unknown = text == (model.get("unk_token") or "<unk>") or (kind == "unigram" and i == model.get("unk_id"))
    if kind != "bpe" and is_unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if kind != "bpe" and model.get("byte_fallback") and text.encode() in BYTE_PIECES:
        return TokenType.BYTE
    return TokenType.UNUSED if text == f"[UNUSED{i}]" else TokenType.NORMAL


def parse_merges(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """Pairs, from pairs or from two words with a space between."""
    found = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else merge for merge in merges]
    for merge in found:
        if not isinstance(merge, (tuple, list)) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
            raise TokenizerError(f"merge {merge!r:.40} is no pair of tokens")
    return [(left, right) for left, right in found]


def _encoded(texts: list[str], spelled: set[int] | None) -> list[bytes]:
    """The tokens' bytes; spelled: those of a byte-level vocabulary that were added."""
    try:
        return [text.encode() for text in texts] if spelled is None else byte_level(texts, spelled)
    except UnicodeEncodeError as error:
        raise TokenizerError(f"token {error.object!r:.40} holds half of a surrogate pair: it is no text") from None


def byte_level(texts: list[str], spelled: set[int]) -> list[bytes]:
    """The tokens' bytes; those in `spelled`, which were added, are spelled as they are.

    A byte may have no token (SmolLM2 lacks 21): the `tokenizers` library and llama.cpp leave it out of a text.
    """
    alphabet = byte_alphabet()
    plain = (i in spelled or not alphabet.keys() >= set(text) for i, text in enumerate(texts))
    return [t.encode() if p else bytes(alphabet[c] for c in t) for t, p in zip(texts, plain, strict=True)]


def _scores(texts: list[str], merges: list[tuple[str, str]], model: dict[str, Any]) -> list[float]:
    """A unigram's own; of BPE, which keeps the order of merges instead: minus the place of a piece's first merge."""
    if model["type"] == "Unigram":
        known = lambda score: isinstance(score, (int, float)) and abs(score) < 2**127
        own = [float(score) if known(score) else 0.0 for _, score in model["vocab"]]
        return own + [0.0] * (len(texts) - len(own))
    place: dict[str, int] = {}
    for left, right in merges:
        place.setdefault(left + right, len(place))
    return [-float(place.get(text, 0 if len(text) > 1 else len(texts))) for text in texts]


def _begins_with(content: dict[str, Any], ids: dict[str, int]) -> int | None:
    """The token that the post-processor puts before a text."""
    for part in _parts(content.get("post_processor"), "post_processor", DEEPEST):
        single = part.get("single")
        first = single[0] if isinstance(single, list) and single else None
        if part.get("type") in ("BertProcessing", "RobertaProcessing") and isinstance(part.get("cls"), list):
            return ids.get(str(part["cls"][:1][0])) if part["cls"] else None
        if part.get("type") == "TemplateProcessing" and isinstance(first, dict) and "SpecialToken" in first:
            return ids.get(str(first["SpecialToken"].get("id"))) if isinstance(first["SpecialToken"], dict) else None
    return None
