"""Token ids by transformers: the user's folder or .gguf as AutoTokenizer opens it, template included.

Meta's own files (a tokenizer.model alone), which AutoTokenizer does not open rightly, go through transformers'
converters. Beside its own reading it gives those of the checkpoint's files as they stand: see `HfText.readings`.

from reference.hf_text import HfText
HfText(checkpoint, None).encode("Hello", bos=True)    # [128000, 9906]
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference.files import Checkpoint, read_json
from reference.hf_gguf import is_gguf, open_gguf
from reference.meta_text import is_tiktoken, open_text, tool_call
from reference.protocol import Dialog
from reference.weights import Unusable

# The special tokens of Llama 3.1 in the order of their ids; the reserved ones fill up to 256.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
]
LLAMA3_SPECIAL += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
LLAMA3_SPECIAL += ["<|eot_id|>", "<|python_tag|>", "<|image|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
FOLDERS = ("tokenizer.json", "vocab.json")  # what AutoTokenizer opens a folder by
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class HfText:
    reader = "transformers"

    def __init__(self, checkpoint: Checkpoint, tokenizer: str | None):
        path = Path(tokenizer) if tokenizer else checkpoint.find(*FILES)
        if path is None:
            raise Unusable(
                "transformers has no tokenizer here: the checkpoint has no tokenizer.json or tokenizer.model"
            )
        self.checkpoint, self.path, self.own = checkpoint, path, tokenizer is None
        try:
            self.model = open_tokenizer(path)
        except Unusable:
            raise
        except Exception as error:  # each library has errors of its own for a broken file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            raise Unusable(f"transformers cannot read {path.name} ({reason})") from None
        self.model.chat_template = self.model.chat_template or chat_template(path.parent)
        converted = path.name not in FOLDERS and path.suffix != ".json" and not is_gguf(path)
        self.before = [self.model.bos_token_id] if converted else begins_with(self.model)  # Meta's files say nothing
        self.stop_ids = stop_ids(self.model, checkpoint.folder)
        self.sources = {
            "tokens": f"{path.name} (transformers)",
            "chat": "the checkpoint's chat template (transformers)",
        }

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The text alone, its special tokens' names as plain text; with bos, begun as this tokenizer begins a text."""
        ids = self.model.encode(text, add_special_tokens=False, split_special_tokens=True)
        return self.before * bos + ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, clean_up_tokenization_spaces=False)

    def dialog(self, messages: Dialog) -> list[int] | None:
        """By the chat template that the checkpoint brings; None where it brings none, or refuses the dialog."""
        rendered = self.render(messages)
        return None if rendered is None else self.encode_special(rendered)

    def encode_special(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False)

    def render(self, messages: Dialog) -> str | None:
        if not self.model.chat_template:
            return None
        template = [_openai_message(message) for message in messages]
        try:
            return self.model.apply_chat_template(template, add_generation_prompt=True, tokenize=False)
        except Exception:  # what a template raises is its own business: it may know no system message
            return None

    def readings(self) -> Iterator["Reading"]:
        """The same texts by the checkpoint's files as they stand, which a class of transformers need not follow."""
        template = "the checkpoint's chat template in the ids of"
        if self.path.name == "tokenizer.json":
            plain = Stored(self.path, self.before)
            yield Reading(
                self, plain, {"tokens": "tokenizer.json (as it stands)", "chat": f"{template} tokenizer.json"}
            )
        if is_gguf(self.path) and (spaced := sentencepiece_like(self.model)) is not None:
            name = f"{self.path.name} (as sentencepiece reads it)"
            yield Reading(self, spaced, {"tokens": name, "chat": f"{template} {name}"})
        model = self.checkpoint.find("tokenizer.model") if self.own else None
        if model is not None and model != self.path:
            with contextlib.suppress(Unusable):  # Meta's reference will say it
                metas = open_text(None, str(model))
                yield Reading(self, metas, {"tokens": metas.sources["tokens"], "chat": f"{template} tokenizer.model"})


@dataclass
class Reading:
    """Another tokenizer of the checkpoint, and what transformers' chat template is in its ids."""

    by: HfText
    text: Any  # encode(text, bos=), encode_special(text)
    sources: dict[str, str]

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return self.text.encode(text, bos=bos)

    def dialog(self, messages: Dialog) -> list[int] | None:
        rendered = self.by.render(messages)
        return None if rendered is None else self.text.encode_special(rendered)


class Stored:
    """A tokenizer.json (or a backend) run by the tokenizers library."""

    def __init__(self, path: Path | Any, before: list[int]):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(str(path)) if isinstance(path, Path) else path
        self.backend.no_truncation()
        self.backend.no_padding()
        self.before = before

    def encode(self, text: str, *, bos: bool) -> list[int]:
        self.backend.encode_special_tokens = True
        return self.before * bos + self.backend.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        self.backend.encode_special_tokens = False
        return self.backend.encode(text, add_special_tokens=False).ids


def open_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if is_gguf(path):
        return open_gguf(path)
    if path.name in FOLDERS:
        return AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    if path.suffix == ".json":
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    with path.open("rb") as file:
        start = file.read(4096)
    if not is_tiktoken(start):
        return _from_sentencepiece(path)
    converted = TikTokenConverter(str(path), extra_special_tokens=LLAMA3_SPECIAL).converted()
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=converted, **names)


def _from_sentencepiece(path: Path) -> Any:
    """transformers' tokenizer of the same vocabulary: its own reader of .model files needs one more package."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces)}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    names = {name: pieces[i] if i >= 0 else None for name, i in special.items()}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, scores), **names)
    put_space_before(tokenizer.backend_tokenizer)
    return tokenizer


def put_space_before(backend: Any) -> None:
    """As sentencepiece and Meta's tokenizer.json do; the class swallows a space at the beginning of a text."""
    from tokenizers import normalizers

    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def sentencepiece_like(model: Any) -> Stored | None:
    """The tokenizer with a space put before every text, where it has sentencepiece's kind of pieces."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import Metaspace

    if not isinstance(model.backend_tokenizer.pre_tokenizer, Metaspace):
        return None
    backend = Tokenizer.from_str(model.backend_tokenizer.to_str())
    put_space_before(backend)
    return Stored(backend, begins_with(model))


def begins_with(model: Any) -> list[int]:
    """The ids that this tokenizer puts before a text."""
    whole, bare = model.encode("a"), model.encode("a", add_special_tokens=False)
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def stop_ids(model: Any, folder: Path) -> frozenset[int]:
    """Of every place: the tokenizer's EOS, generation_config.json, config.json; in Meta's folders Llama 3's by name."""
    found: list[Any] = [model.eos_token_id]
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        found += ids if isinstance(ids, list) else [ids]
    if (folder / "params.json").is_file():
        vocabulary = model.get_vocab()
        found += [vocabulary.get(name) for name in LLAMA3_STOPS]
    return frozenset(token for token in found if type(token) is int)


def chat_template(folder: Path) -> str | None:
    """The template of a folder whose tokenizer AutoTokenizer did not open, or that lies where it does not look."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # several by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _openai_message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {"content": "", **{key: value for key, value in message.items() if key in ("role", "content")}}
    calls = [tool_call(call) for call in message.get("tool_calls") or []]
    if calls:
        functions = [{"name": call["tool_name"], "arguments": call["arguments"]} for call in calls]
        kept["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return kept
