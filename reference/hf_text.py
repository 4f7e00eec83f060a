"""Token ids by transformers: the user's folder or .gguf as AutoTokenizer opens it, template included.

Meta's own files (a tokenizer.model alone), which AutoTokenizer does not open rightly, go through transformers'
converters. Beside its own reading it gives those of the checkpoint's files as they stand: see `HfText.readings`.

from reference.hf_text import HfText
HfText(checkpoint, None).encode("Hello", bos=True)    # [128000, 9906]
"""

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nanollama import gate
from nanollama.gate import documents
from reference.files import Checkpoint, read_json
from reference.files.gguf import is_gguf, open_gguf
from reference.files.guard import TextGuard, guard_file, guard_folder, limited
from reference.files.weights import Unusable, through_gate
from reference.meta_text import check_model, is_tiktoken, open_text, tool_call
from reference.protocol import Dialog

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
T = TypeVar("T")
MARK = "\ufdd1"  # no character: put inside names of special tokens in messages
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
        self.guard = guard_of(path)
        self.model = library(lambda: open_tokenizer(path), f"transformers cannot read {path.name}")
        self.model.chat_template = self.model.chat_template or chat_template(path.parent)
        self.before = library(lambda: self._begin(path), f"transformers cannot encode by {path.name}")
        self.specials = {str(t): i for i, t in self.model.added_tokens_decoder.items() if t.special}
        self.stop_ids = stop_ids(self.model, checkpoint.folder)
        self.sources = {
            "tokens": f"{path.name} (transformers)",
            "chat": "the checkpoint's chat template (transformers)",
        }

    def _begin(self, path: Path) -> list[int]:
        return begins_with(self.model) if path.suffix != ".model" else bos_of_model(self.model, path.parent)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The text alone, its special tokens' names as plain text; with bos, begun as this tokenizer begins a text."""
        return self.before * bos + self._ids(text, split_special_tokens=True)

    def _ids(self, text: str, **options: bool) -> list[int]:
        self.guard.text(text)
        encode = partial(self.model.encode, text, add_special_tokens=False, **options)
        return library(encode, f"transformers cannot encode by {self.path.name}")

    def decode(self, ids: list[int]) -> str:
        self.guard.ids(ids)
        return self.model.decode(ids, clean_up_tokenization_spaces=False)

    def plain(self, text: str) -> list[int]:
        return self.encode(text, bos=False)

    def dialog(self, messages: Dialog) -> list[int] | None:
        """By the chat template that the checkpoint brings; None where it brings none, or refuses the dialog."""
        rendered = self.render(messages)
        return None if rendered is None else self._ids(rendered)

    def render(self, messages: Dialog, specials: Iterable[str] = ()) -> str | None:
        """`specials`: names that are marked in the messages, so that they can be told from the template's own."""
        if not self.model.chat_template:
            return None
        template = [_openai_message(message) for message in messages]
        for message in template:
            for name in specials:
                message["content"] = message["content"].replace(name, name[0] + MARK + name[1:])
        make = partial(self.model.apply_chat_template, template, add_generation_prompt=True, tokenize=False)
        return limited(make, self.path.parent)

    def readings(self) -> Iterator["Reading"]:
        """The same texts by the checkpoint's files as they stand, which a class of transformers need not follow."""
        yield Reading(self, self, self.sources["tokens"])
        if self.path.name == "tokenizer.json":
            yield Reading(self, Stored(self.path, self.before, self.guard), "tokenizer.json (as it stands)")
        if is_gguf(self.path) and (spaced := sentencepiece_like(self.model, self.before)) is not None:
            yield Reading(self, spaced, f"{self.path.name} (as sentencepiece reads it)")
        model = self.checkpoint.find("tokenizer.model") if self.own else None
        if model is not None and model != self.path:
            with contextlib.suppress(Unusable):  # Meta's reference will say it
                metas = open_text(None, str(model))
                yield Reading(self, metas, metas.sources["tokens"])


def library(call: Callable[[], T], what: str) -> T:
    """What the call returns; a library's error, or a panic of Rust's, which is no Exception, as Unusable."""
    try:
        return call()
    except Unusable:
        raise
    except BaseException as error:  # each library has errors of its own for a broken file
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Unusable(f"{what} ({gate.reason(error)})") from None


def guard_of(path: Path) -> TextGuard:
    """The limits of a tokenizer file, and of the files beside it that transformers opens. Raises Unusable."""
    if is_gguf(path):
        return TextGuard()
    guard = guard_folder(path.parent)
    if path.suffix == ".json" and path.name not in FOLDERS:
        return guard_file(path)
    through_gate(documents.read_bytes, path)
    if path.suffix == ".model":
        check_model(path)
    return guard


class Ids(Protocol):
    specials: dict[str, int]

    def encode(self, text: str, *, bos: bool) -> list[int]: ...
    def plain(self, text: str) -> list[int]: ...


class Reading:
    """A tokenizer of the checkpoint, and the checkpoint's chat template in its ids; messages are text alone there."""

    def __init__(self, by: HfText, text: Ids, name: str):
        self.by, self.text, self.encode = by, text, text.encode
        self.sources = {"tokens": name, "chat": f"the checkpoint's chat template in the ids of {name}"}

    def dialog(self, messages: Dialog) -> list[int] | None:
        specials = self.text.specials
        rendered = self.by.render(messages, specials)
        if rendered is None:
            return None
        names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        parts = [part for part in re.split(f"({names})", rendered) if part] if names else [rendered]
        ids = [[specials[p]] if p in specials else self.text.plain(p.replace(MARK, "")) for p in parts]
        return [token for part in ids for token in part]


class Stored:
    """A tokenizer.json (or a backend) run by the tokenizers library."""

    def __init__(self, path: Path | Any, before: list[int], guard: TextGuard | None = None):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(str(path)) if isinstance(path, Path) else path
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.before, self.guard = before, guard or TextGuard()
        self.specials = {t.content: i for i, t in self.backend.get_added_tokens_decoder().items() if t.special}

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return self.before * bos + self.plain(text)

    def plain(self, text: str) -> list[int]:
        self.guard.text(text)
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
    if (
        not is_tiktoken(start)
        and (path.parent / "config.json").is_file()
        and importlib.util.find_spec("google.protobuf")
    ):
        return AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    if not is_tiktoken(start):
        return _from_sentencepiece(path)
    converted = TikTokenConverter(str(path), extra_special_tokens=LLAMA3_SPECIAL).converted()
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=converted, **names)


def _from_sentencepiece(path: Path) -> Any:
    """transformers' tokenizer of the same vocabulary, where no Hugging Face folder is around it."""
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


def sentencepiece_like(model: Any, before: list[int]) -> Stored | None:
    """The tokenizer with a space put before every text, where it has sentencepiece's kind of pieces."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import Metaspace

    if not isinstance(model.backend_tokenizer.pre_tokenizer, Metaspace):
        return None
    backend = Tokenizer.from_str(model.backend_tokenizer.to_str())
    put_space_before(backend)
    return Stored(backend, before)


def begins_with(model: Any) -> list[int]:
    """The ids that this tokenizer puts before a text."""
    whole, bare = model.encode("a"), model.encode("a", add_special_tokens=False)
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def bos_of_model(model: Any, folder: Path) -> list[int]:
    """A .model file does not say whether it begins a text with BOS: Meta's code does, unless the folder says no."""
    config = folder / "tokenizer_config.json"
    refused = config.is_file() and read_json(config).get("add_bos_token") is False
    return [] if refused or model.bos_token_id is None else [model.bos_token_id]


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
        return through_gate(documents.read_text, folder / "chat_template.jinja")
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
