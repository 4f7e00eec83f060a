"""A Vocabulary written as each format's tokenizer files: tiktoken ranks, sentencepiece, tokenizer.bin, tokenizer.json.

    python -c "from nanollama.checkpoint import vocab, vocab_files as f; print(len(f.llama2c(vocab.read('tokenizer.model'))))"

Sources: sentencepiece_model.proto; llama2.c tokenizer.py; transformers convert_slow_tokenizer for the order of merges.
"""  # noqa: E501

import base64
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanollama.checkpoint.staging import Stage
from nanollama.checkpoint.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    byte_alphabet,
    looks_like_ranks,
    read,
)
from nanollama.checkpoint.weights import CheckpointError

# How Llama 3 cuts text before BPE; part of the vocabulary (llama_models.llama3.tokenizer).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def meta_bytes(vocabulary: Vocabulary) -> bytes:
    """tokenizer.model as Meta's code opens it: tiktoken's ranks, or a sentencepiece model."""
    return ranks(vocabulary) if vocabulary.kind == "bpe" else sentencepiece(vocabulary)


def ranks(vocabulary: Vocabulary) -> bytes:
    """tiktoken's lines of `base64 rank`; the special tokens are in no file."""
    ordinary = vocabulary.tokens[: vocabulary.n_ranks]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ordinary))


def sentencepiece(vocabulary: Vocabulary) -> bytes:
    """A ModelProto of type BPE with byte fallback and no normalization but the spaces."""
    out = bytearray()
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        piece = _field(1, token) + _key(2, 5) + struct.pack("<f", score) + (_field(3, kind) if kind != NORMAL else b"")
        out += _field(1, piece)
    pad = -1 if vocabulary.pad_id is None else vocabulary.pad_id
    unknown = vocabulary.types.index(UNKNOWN) if UNKNOWN in vocabulary.types else 0
    trainer = _field(3, 2) + _field(4, len(vocabulary.tokens)) + _field(35, 1)  # BPE, vocab_size, byte_fallback
    trainer += _field(40, unknown) + _field(41, vocabulary.bos_id) + _field(42, vocabulary.eos_id) + _field(43, pad)
    normalizer = _field(1, b"identity") + _field(3, int(vocabulary.add_dummy_prefix))
    normalizer += _field(4, int(vocabulary.remove_extra_whitespaces)) + _field(5, 1)  # escape_whitespaces
    return bytes(out) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _key(number, 2) + _varint(len(value)) + value
    return _key(number, 0) + _varint(value & (1 << 64) - 1)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def llama2c(vocabulary: Vocabulary) -> bytes:
    """tokenizer.bin as llama2.c's programs read it."""
    _require_spm(vocabulary, "llama2.c's programs read")
    texts = [token.replace(SPACE.encode(), b" ") for token in vocabulary.tokens]
    texts[vocabulary.bos_id] = b"\n<s>\n"
    texts[vocabulary.eos_id] = b"\n</s>\n"
    out = struct.pack("<I", max(map(len, texts)))
    for text, score in zip(texts, vocabulary.scores, strict=True):
        out += struct.pack("<fi", score, len(text)) + text
    return out


def _require_spm(vocabulary: Vocabulary, who: str) -> None:
    if vocabulary.kind != "spm" or vocabulary.types[3:259] != [BYTE] * 256:
        raise CheckpointError("tokenizer", f"{who} sentencepiece vocabularies with byte tokens 3 to 258 only")


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, first the merges that come first.

    All pairs, not only the one by which training made the token: tiktoken and sentencepiece merge any of them.
    """
    texts = printable(vocabulary)
    order: dict[str, float] = {
        text: (i if vocabulary.kind == "bpe" else -vocabulary.scores[i])
        for i, text in enumerate(texts)
        if vocabulary.types[i] == NORMAL
    }
    place = {text: i for i, text in enumerate(texts) if text in order}
    found = []
    for text, priority in order.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in place and right in place:
                found.append((priority, place[left], place[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def printable(vocabulary: Vocabulary) -> list[str]:
    """Tokens as tokenizer.json and GGUF spell them: byte-level BPE in GPT-2's alphabet, the others as they are."""
    if vocabulary.kind == "spm":
        return [token.decode() for token in vocabulary.tokens]
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    return [
        "".join(letters[b] for b in token) if kind == NORMAL else token.decode()
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def chat_template(vocabulary: Vocabulary) -> str | None:
    """The one that came with the vocabulary; for Llama 3's tokens else the published one of Llama 3."""
    if vocabulary.chat_template is None and b"<|start_header_id|>" in vocabulary.tokens:
        return LLAMA3_TEMPLATE
    return vocabulary.chat_template


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json as the tokenizers package reads it."""
    texts = printable(vocabulary)
    is_bpe = vocabulary.kind == "bpe"
    special = [i for i, kind in enumerate(vocabulary.types) if kind in (UNKNOWN, CONTROL)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = texts[vocabulary.bos_id]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": texts[i], **flags} for i in special],
        "post_processor": template,
        **(_bpe_pipeline() if is_bpe else _spm_pipeline(vocabulary)),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if is_bpe else texts[vocabulary.types.index(UNKNOWN)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": not is_bpe,
            "byte_fallback": not is_bpe,
            "ignore_merges": is_bpe,  # tiktoken takes a whole word that is a token as it is
            "vocab": {text: i for i, text in enumerate(texts) if not is_bpe or vocabulary.types[i] == NORMAL},
            "merges": merges(vocabulary),
        },
    }


def _bpe_pipeline() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


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


def read_fitting(path: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer file; refuses one with more tokens than the model has rows."""
    found = read(path)
    if len(found.tokens) > vocab_size:
        raise CheckpointError(
            path, f"has {len(found.tokens)} tokens, the model {vocab_size}: it is another model's; give the right one"
        )
    return found


def padded(vocabulary: Vocabulary, vocab_size: int) -> Vocabulary:
    """With unused tokens up to the model's number of rows, which GGUF and tokenizer.bin require."""
    n = vocab_size - len(vocabulary.tokens)
    if not n:
        return vocabulary
    unused = [b"[UNUSED%d]" % i for i in range(len(vocabulary.tokens), vocab_size)]
    return replace(
        vocabulary,
        tokens=vocabulary.tokens + unused,
        scores=vocabulary.scores + [-1e9] * n,
        types=vocabulary.types + [UNUSED] * n,
    )


def write_beside_hf(stage: Stage, vocabulary: Vocabulary, source: Path) -> None:
    """The tokenizer files of a Hugging Face folder.

    source: the file that the vocabulary was read from; Meta's own file is kept too, where hub copies have it.
    """
    texts = printable(vocabulary)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts[vocabulary.bos_id],
        "eos_token": texts[vocabulary.eos_id],
        "clean_up_tokenization_spaces": False,  # decoding must give the text back
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if vocabulary.pad_id is not None:
        config["pad_token"] = texts[vocabulary.pad_id]
    if vocabulary.kind == "spm":
        config["unk_token"] = texts[vocabulary.types.index(UNKNOWN)]
    if template := chat_template(vocabulary):
        config["chat_template"] = template
    stage.text("tokenizer.json", json.dumps(tokenizer_json(vocabulary), ensure_ascii=False) + "\n")
    stage.text("tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    if vocabulary.kind == "spm":
        write_model(stage, "tokenizer.model", vocabulary, source)


def write_model(stage: Stage, name: str, vocabulary: Vocabulary, source: Path) -> None:
    """tokenizer.model in Meta's form: the source's own bytes where it is such a file, else written anew."""
    data = source.read_bytes()
    is_model = looks_like_ranks(data) if vocabulary.kind == "bpe" else data[:1] == b"\n" and data[1:2] > b"\0"
    with stage.open(name) as file:
        file.write(data if is_model and not _is_llama2c(data) else meta_bytes(vocabulary))


def _is_llama2c(data: bytes) -> bool:
    return 0 < int.from_bytes(data[:4], "little") < 65_536
