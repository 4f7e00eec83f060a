"""A Vocabulary as tokenizer.json, and whether it says all that a given tokenizer.json does.

    python -c "from nanollama.vocabulary import read, to_json; print(to_json.merges(read('tokenizer.model'))[:3])"

Sources: the tokenizers package for the form, transformers' convert_slow_tokenizer for the order of merges.
"""

from typing import Any

from nanollama.vocabulary import spoken
from nanollama.vocabulary.value import SPACE, TokenType, Vocabulary, byte_alphabet


def printable(vocabulary: Vocabulary) -> list[str]:
    """Tokens as tokenizer.json and GGUF spell them: byte-level BPE in GPT-2's alphabet, the others as they are."""
    if vocabulary.kind != "bpe":
        return [token.decode() for token in vocabulary.tokens]
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    return [
        "".join(letters[b] for b in token) if kind == TokenType.NORMAL else token.decode()
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The file's own, else every pair of tokens that makes a token, first the merges that come first.

    All pairs, not only the one by which training made the token: tiktoken and sentencepiece merge any of them.
    """
    if vocabulary.merges is not None:
        return vocabulary.merges
    texts = printable(vocabulary)
    order: dict[str, float] = {
        text: (i if vocabulary.kind == "bpe" else -vocabulary.scores[i])
        for i, text in enumerate(texts)
        if vocabulary.types[i] == TokenType.NORMAL
    }
    place = {text: i for i, text in enumerate(texts) if text in order}
    found = []
    for text, priority in order.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in place and right in place:
                found.append((priority, place[left], place[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json as the tokenizers package reads it."""
    texts = printable(vocabulary)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds: dict[int, bool] = {TokenType.UNKNOWN: True, TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    added = [
        {"id": i, "content": texts[i], **flags, "special": kinds[kind]}
        for i, kind in enumerate(vocabulary.types)
        if kind in kinds
    ]
    is_bpe = vocabulary.kind == "bpe"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _post_processor(vocabulary, texts),
        **(_bpe_pipeline(vocabulary.pre) if is_bpe else _spm_pipeline(vocabulary)),
        "model": _model(vocabulary, texts),
    }


def _post_processor(vocabulary: Vocabulary, texts: list[str]) -> dict[str, Any] | None:
    if vocabulary.bos_id is None or not vocabulary.add_bos:
        return None
    bos = texts[vocabulary.bos_id]

    def begun(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": begun("A", 0),
        "pair": begun("A", 0) + begun("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
    }


def _model(vocabulary: Vocabulary, texts: list[str]) -> dict[str, Any]:
    unknown, has_bytes = vocabulary.unknown_id, vocabulary.has_bytes
    if vocabulary.kind == "unigram":
        pieces = [[text, score] for text, score in zip(texts, vocabulary.scores, strict=True)]
        return {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": has_bytes}
    is_bpe = vocabulary.kind == "bpe"
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if is_bpe or unknown is None else texts[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": not is_bpe,
        "byte_fallback": has_bytes,
        "ignore_merges": is_bpe and spoken.pattern_of(vocabulary.pre).whole,
        # The package numbers added tokens that are not in here from the end on, whatever their ids say.
        "vocab": {text: i for i, text in enumerate(texts) if not is_bpe or i < vocabulary.n_ordinary},
        "merges": merges(vocabulary),
    }


def _bpe_pipeline(pre: str) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"normalizer": None, "pre_tokenizer": spoken.pre_tokenizer(pre), "decoder": level}


def _spm_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if vocabulary.remove_extra_whitespaces:
        steps += [_replace({"Regex": "^ +| +$"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if vocabulary.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(_replace({"String": " "}, SPACE))
    decoder: list[dict[str, Any]] = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.add_dummy_prefix:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def is_exact(vocabulary: Vocabulary) -> bool:
    """Whether the value says all that its tokenizer.json does to a text: written out, it gives the same file."""
    given = vocabulary.content
    if given is None:
        return True
    if vocabulary.kind == "bpe" and vocabulary.pre not in spoken.KNOWN:
        return False
    made = tokenizer_json(vocabulary)
    if vocabulary.kind == "bpe":  # cut as `pre` says, which came from the file
        made["pre_tokenizer"] = given.get("pre_tokenizer")
    return _does(made, vocabulary) == _does(given, vocabulary)


def _does(content: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """What of a tokenizer.json changes the ids of a text, in one form."""
    model = content["model"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    names = ("id", "content", "special", "lstrip", "rstrip", "single_word")
    return {
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "added": sorted([token.get(name, False) for name in names] for token in content.get("added_tokens") or []),
        "model": [bool(model.get(key)) for key in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix")],
        # The order among pairs that make the same token does not matter to sentencepiece.
        "merges": pairs if vocabulary.kind == "bpe" else (set(pairs), list(dict.fromkeys(a + b for a, b in pairs))),
    }
