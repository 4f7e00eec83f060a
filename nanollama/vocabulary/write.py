"""A Vocabulary as each format's files. What a format cannot hold is refused by name or carried beside, never replaced.

    python -c "from nanollama.vocabulary import read, write; print(list(write.meta_files(read('tokenizer.json'))))"

Sources: sentencepiece_model.proto; llama2.c tokenizer.py; transformers convert_slow_tokenizer for the order of merges;
ggml's gguf.md for the keys.
"""

import base64
import json
import struct
from dataclasses import replace
from typing import Any

from nanollama.vocabulary import spoken
from nanollama.vocabulary.beside import json_object, with_declared
from nanollama.vocabulary.read import parse
from nanollama.vocabulary.to_json import is_exact, merges, printable, tokenizer_json
from nanollama.vocabulary.value import SPACE, TokenizerError, TokenType, Vocabulary, llama3_special_tokens

LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def fitting(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """The vocabulary for a model of so many rows: added tokens beyond them, which it can never say, are left out.

    Raises TokenizerError where ordinary tokens have no row: it is another model's.
    """
    if vocabulary.n_ordinary > rows:
        raise TokenizerError(
            f"the tokenizer has {len(vocabulary.tokens):,} tokens and the model {rows:,}: it is another model's; "
            "give the right one with --tokenizer"
        )
    return vocabulary


# --- Meta ------------------------------------------------------------------------------------------------------------


def meta_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """tokenizer.model as Meta's code opens it; tokenizer.json where a tokenizer.model would give other ids."""
    if vocabulary.format in ("ranks", "sentencepiece"):
        return {"tokenizer.model": vocabulary.data} | _said_beside(vocabulary, vocabulary.data)
    if vocabulary.kind == "bpe" and _is_llama3(vocabulary):
        data = ranks(vocabulary)
    elif vocabulary.kind == "spm" and is_exact(vocabulary):
        data = sentencepiece(vocabulary)
    else:
        return hf_files(vocabulary)
    return {"tokenizer.model": data} | _said_beside(vocabulary, data)


def _is_llama3(vocabulary: Vocabulary) -> bool:
    """Whether a rank file says it all: Llama 3's pattern, every byte, merges by rank, its 256 special tokens behind."""
    n = vocabulary.n_ranks
    same = vocabulary.pre == "llama-bpe" and vocabulary.tokens[n:] == llama3_special_tokens() and is_exact(vocabulary)
    same = same and {bytes([byte]) for byte in range(256)} <= set(vocabulary.tokens)
    by_rank = replace(vocabulary, merges=None)
    return same and (vocabulary.merges is None or vocabulary.merges == merges(by_rank))


def _said_beside(vocabulary: Vocabulary, data: bytes) -> dict[str, bytes]:
    """tokenizer_config.json and generation_config.json where the file alone would say something else."""
    alone = with_declared(parse(data), {})
    usual = vocabulary.chat_template == LLAMA3_TEMPLATE and not vocabulary.named_templates
    template = None if usual else vocabulary.chat_template
    same = all(getattr(alone, name) == getattr(vocabulary, name) for name in ("bos_id", "eos_id", "pad_id", "add_bos"))
    same = same and set(alone.stop_ids) == set(vocabulary.stop_ids)
    if same and template is None and not vocabulary.named_templates:
        return {}
    config = tokenizer_config(replace(vocabulary, chat_template=template))
    return {"tokenizer_config.json": _json(config), "generation_config.json": generation_config(vocabulary)}


def ranks(vocabulary: Vocabulary) -> bytes:
    """tiktoken's lines of `base64 rank`; the special tokens are in no file."""
    ordinary = vocabulary.tokens[: vocabulary.n_ranks]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ordinary))


def sentencepiece(vocabulary: Vocabulary) -> bytes:
    """A ModelProto of type BPE or unigram, no normalization but the spaces."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        model.pieces.add(piece=token.decode(), score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = 1 + (vocabulary.kind == "spm")
    trainer.vocab_size, trainer.byte_fallback = len(vocabulary.tokens), vocabulary.has_bytes
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    for role, i in (ids | {"unk": vocabulary.unknown_id}).items():
        setattr(trainer, f"{role}_id", -1 if i is None else i)
        # By name, too: the package goes by these.
        setattr(trainer, f"{role}_piece", "" if i is None else vocabulary.tokens[i].decode())
    normalizer.name, normalizer.add_dummy_prefix = "identity", vocabulary.add_dummy_prefix
    normalizer.remove_extra_whitespaces = vocabulary.remove_extra_whitespaces
    return model.SerializeToString(deterministic=True)


# --- llama2.c --------------------------------------------------------------------------------------------------------


def llama2c_files(vocabulary: Vocabulary, rows: int) -> dict[str, bytes]:
    """tokenizer.bin as llama2.c's programs read it, and beside it what it has no place for."""
    data = llama2c(padded(fitting(vocabulary, rows), rows))
    return {"tokenizer.bin": data} | _said_beside(vocabulary, data)


def llama2c(vocabulary: Vocabulary) -> bytes:
    """tokenizer.bin: spaces written out, line ends around BOS and EOS. Raises TokenizerError for what it cannot say."""
    fixed = [TokenType.UNKNOWN, *vocabulary.types[1:3], *[TokenType.BYTE] * 256]
    if vocabulary.kind != "spm" or vocabulary.types[:259] != fixed:
        raise TokenizerError("llama2.c's programs read sentencepiece vocabularies with byte tokens 3 to 258 only")
    special = [name for name, i in vocabulary.special_ids.items() if i > 2]
    if special or (vocabulary.bos_id, vocabulary.eos_id) != (1, 2):
        what = f"the special token {special[0]}" if special else "a BOS and EOS other than 1 and 2"
        raise TokenizerError(f"llama2.c's tokenizer.bin cannot say {what}: write meta, hf or gguf")
    if vocabulary.rewrites or not vocabulary.add_dummy_prefix or not is_exact(vocabulary):
        raise TokenizerError(
            "llama2.c's programs put a space before every text and change nothing else, this tokenizer does otherwise: "
            "write meta, hf or gguf, or give a tokenizer.model with --tokenizer"
        )
    texts = [token.replace(SPACE.encode(), b" ") for token in vocabulary.tokens]
    texts[1:3] = [b"\n<s>\n", b"\n</s>\n"]
    out = struct.pack("<I", max(map(len, texts)))
    for text, score in zip(texts, vocabulary.scores, strict=True):
        out += struct.pack("<fi", score, len(text)) + text
    return out


def padded(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """With a name for each of the model's rows, which GGUF and tokenizer.bin require; without tokens beyond them."""
    n = len(vocabulary.tokens)
    unused = [b"[PAD%d]" % i for i in range(n, rows)]
    return replace(
        vocabulary,
        tokens=(vocabulary.tokens + unused)[:rows],
        scores=vocabulary.scores and (vocabulary.scores + [-1e9] * len(unused))[:rows],
        types=(vocabulary.types + [TokenType.UNUSED] * len(unused))[:rows],
    )


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hf_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder; those of such a folder as they were."""
    if vocabulary.format == "json":
        files = {"tokenizer.json": vocabulary.data} | vocabulary.beside
        files.setdefault("tokenizer_config.json", _json(tokenizer_config(vocabulary)))
        if vocabulary.named_templates:  # whose own files would be a folder
            files = {name: data for name, data in files.items() if not name.startswith("chat_template")}
            settings = json_object(files["tokenizer_config.json"])
            files["tokenizer_config.json"] = _json({**settings, "chat_template": _all_templates(vocabulary)})
        return files | {"generation_config.json": generation_config(vocabulary)}
    if vocabulary.rewrites:
        raise TokenizerError(
            "the tokenizer rewrites text by rules (nmt_nfkc or the like) that exist in its own file only: write meta"
        )
    content = vocabulary.content or tokenizer_json(vocabulary)
    template = chat_template(vocabulary)
    files = {
        "tokenizer.json": (json.dumps(content, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": _json(tokenizer_config(replace(vocabulary, chat_template=template))),
        "generation_config.json": generation_config(vocabulary),
    }
    if vocabulary.kind != "bpe" and vocabulary.content is None:
        files["tokenizer.model"] = (
            vocabulary.data if vocabulary.format == "sentencepiece" else sentencepiece(vocabulary)
        )
    return files


def tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    texts = {i: vocabulary.tokens[i].decode() for i in vocabulary.special_ids.values()}
    roles = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "pad_token": vocabulary.pad_id}
    roles |= {} if vocabulary.kind == "bpe" else {"unk_token": vocabulary.unknown_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {role: texts.get(i, vocabulary.tokens[i].decode()) for role, i in roles.items() if i is not None}
    if not vocabulary.add_bos:
        config["add_bos_token"] = False
    config["clean_up_tokenization_spaces"] = False  # decoding must give the text back
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config |= {"extra_special_tokens": vocabulary.named_tokens} if vocabulary.named_tokens else {}
    templates = _all_templates(vocabulary)
    return config | ({"chat_template": templates} if templates else {})


def _all_templates(vocabulary: Vocabulary) -> str | list[dict[str, str]] | None:
    """As tokenizer_config.json has them: one as it is, several by name."""
    if not vocabulary.named_templates:
        return vocabulary.chat_template
    default = {"default": vocabulary.chat_template} if vocabulary.chat_template else {}
    return [{"name": name, "template": text} for name, text in (default | vocabulary.named_templates).items()]


def generation_config(vocabulary: Vocabulary) -> bytes:
    """What was given, with every id that ends an answer."""
    given = json_object(vocabulary.beside.get("generation_config.json")) or {"_from_model_config": True}
    return _json({**given, **token_ids(vocabulary)})


def token_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """bos_token_id and eos_token_id of config.json and generation_config.json."""
    ids = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.stop_ids or None}
    return {name: value for name, value in ids.items() if value is not None}


def chat_template(vocabulary: Vocabulary) -> str | None:
    """The one that came with the vocabulary; for Llama 3's tokens else the published one of Llama 3."""
    own = vocabulary.chat_template or vocabulary.named_templates
    return LLAMA3_TEMPLATE if not own and b"<|start_header_id|>" in vocabulary.tokens else vocabulary.chat_template


def _with_names(template: str, names: dict[str, str]) -> str:
    """The template with the tokens that it calls by name, for a format that has no place for them."""
    used = {name: text for name, text in names.items() if name.isidentifier() and name in template}
    return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in used.items()) + template


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_keys(vocabulary: Vocabulary, rows: int) -> dict[str, Any]:
    """The header's keys for a model of so many rows. Raises TokenizerError for what llama.cpp could not run."""
    if vocabulary.kind == "unigram" or vocabulary.rewrites:
        what = "unigram vocabularies" if vocabulary.kind == "unigram" else "rules that rewrite text"
        raise TokenizerError(f"GGUF's vocabulary of a Llama has no place for {what}: write hf or meta")
    if vocabulary.kind == "bpe" and vocabulary.pre not in {*spoken.KNOWN, *spoken.ALIASES}:
        raise TokenizerError(
            "how its tokenizer.json cuts text before merging has no name in GGUF (tokenizer.ggml.pre; known are "
            f"{', '.join(spoken.KNOWN)}): write hf or meta"
        )
    whole = padded(fitting(vocabulary, rows), rows)
    keys: dict[str, Any] = {
        "model": "gpt2" if whole.kind == "bpe" else "llama",
        "pre": whole.pre if whole.kind == "bpe" else "default",
        "tokens": printable(whole),
        "token_type": list(map(int, whole.types)),
    }
    if whole.kind == "bpe":
        keys["merges"] = [f"{left} {right}" for left, right in merges(whole)]
    else:
        keys |= {"scores": whole.scores, "add_space_prefix": whole.add_dummy_prefix}
        keys |= {"remove_extra_whitespaces": True} if whole.remove_extra_whitespaces else {}
        keys |= {"unknown_token_id": whole.unknown_id}
    ids = {"bos": whole.bos_id, "eos": whole.eos_id, "padding": whole.pad_id}
    others = sorted((i for i in whole.stop_ids if i != whole.eos_id), key=lambda i: whole.tokens[i] == b"<|eom_id|>")
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    keys |= {f"{name}_token_id": i for name, i in ids.items() if i is not None and i < rows}
    keys |= {"add_bos_token": whole.add_bos, "add_eos_token": False}
    found = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    named = {f"tokenizer.chat_template.{name}": text for name, text in vocabulary.named_templates.items()}
    for key, template in ({"tokenizer.chat_template": chat_template(vocabulary)} | named).items():
        if template:
            found[key] = _with_names(template, vocabulary.named_tokens)
    found |= {"tokenizer.chat_templates": list(vocabulary.named_templates)} if named else {}
    if not is_exact(vocabulary):
        found["tokenizer.huggingface.json"] = json.dumps(vocabulary.content, ensure_ascii=False)
    return found
