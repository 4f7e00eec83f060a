"""Token ids by Meta's code: llama_models' Tokenizer and ChatFormat for Llama 3, sentencepiece for Llama 2.

from reference.meta_text import open_text
open_text(checkpoint, None).encode("Hello", bos=True)    # [128000, 9906]
"""

import uuid
from pathlib import Path
from typing import Any

from nanollama import gate
from nanollama.gate import documents
from nanollama.gate.charsmap import check_charsmap
from nanollama.gate.tokenizers import MAX_TOKEN_BYTES
from reference.files import Checkpoint
from reference.files.weights import Unusable, through_gate
from reference.protocol import Dialog


def open_text(checkpoint: Checkpoint | None, tokenizer: str | None) -> "Llama3Text | Llama2Text":
    """The tokenizer of the path, else of the checkpoint."""
    path = Path(tokenizer) if tokenizer else checkpoint.find("tokenizer.model") if checkpoint else None
    if path is None:
        raise Unusable("Meta's code has no tokenizer here: the checkpoint has no tokenizer.model")
    try:
        through_gate(gate.require_file, path)
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise Unusable(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix in (".json", ".bin") or start[:4] == b"GGUF":
        raise Unusable(f"Meta's code has no tokenizer here: it opens tokenizer.model files, not {path.name}")
    check_model(path)
    try:
        return Llama3Text(path) if is_tiktoken(start) else Llama2Text(path)
    except BaseException as error:  # each library has errors of its own for a broken file; a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = "neither a Llama 3 nor a sentencepiece tokenizer"
        raise Unusable(f"{path}: {what} ({gate.reason(error)})") from None


def check_model(path: Path) -> None:
    """A tokenizer.model before its library sees it. Raises Unusable for lengths, types and ids that no model has."""
    data = through_gate(documents.read_bytes, path)
    if is_tiktoken(data[:4096]):
        longest = max(map(len, data.split(b"\n")))
        if longest > MAX_TOKEN_BYTES:
            raise Unusable(f"{path}: has a line of {longest:,} bytes: no token is so long")
        return
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        model = ModelProto.FromString(data)
    except DecodeError as error:
        raise Unusable(f"{path}: neither a Llama 3 nor a sentencepiece tokenizer ({gate.reason(error)})") from None
    count = len(model.pieces)
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        if not -1 <= getattr(model.trainer_spec, name) < count:
            said = getattr(model.trainer_spec, name)
            raise Unusable(f"{path}: its {name} is {said}: expected -1 or one of {count} ids")
    try:
        check_charsmap(model.normalizer_spec.precompiled_charsmap)
    except ValueError as error:
        raise Unusable(f"{path}: {error}") from None
    if any(len(piece.piece) > MAX_TOKEN_BYTES for piece in model.pieces):
        raise Unusable(f"{path}: has a token of more than {MAX_TOKEN_BYTES:,} characters")


def is_tiktoken(start: bytes) -> bool:
    """A tiktoken file is lines of base64, a space and a rank."""
    pieces = start.split(b"\n", 1)[0].split(b" ")
    return len(pieces) == 2 and pieces[1].strip().isdigit()


class Llama3Text:
    def __init__(self, path: Path):
        from llama_models.llama3.tokenizer import Tokenizer

        self.model = Tokenizer(path)
        self.stop_ids = frozenset(self.model.stop_tokens)
        self.sources = {"tokens": f"{path.name} (Meta's code)", "chat": "Meta's chat format"}
        self.specials = dict(self.model.special_tokens)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return self.model.encode(text, bos=bos, eos=False)

    def plain(self, text: str) -> list[int]:
        return self.encode(text, bos=False)

    def decode(self, ids: list[int]) -> str:
        """Ids that the tokenizer lacks (a padded vocabulary) are left out."""
        return self.model.decode([token for token in ids if token < self.model.n_words])

    def dialog(self, messages: Dialog) -> list[int] | None:
        from llama_models.datatypes import RawMessage
        from llama_models.llama3.chat_format import ChatFormat

        raw = [RawMessage(**_raw_message(message)) for message in messages]
        return ChatFormat(self.model).encode_dialog_prompt(raw).tokens


def _raw_message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: message[key] for key in ("role", "content", "stop_reason") if message.get(key) is not None}
    calls = [tool_call(call) for call in message.get("tool_calls") or []]
    return {"content": ""} | kept | {"tool_calls": [{"call_id": str(uuid.uuid4()), **call} for call in calls]}


def tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as {"tool_name", "arguments"}, whether written in Meta's manner or in OpenAI's."""
    call = call.get("function", call)
    return {"tool_name": call.get("tool_name", call.get("name")), "arguments": call["arguments"]}


class Llama2Text:
    """As Meta's Llama 2 code did it: sentencepiece, with BOS put before. That chat format is not in llama_models."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_file=str(path))
        self.stop_ids = frozenset({self.model.eos_id()})
        self.sources = {"tokens": f"{path.name} (Meta's code)", "chat": "Meta's chat format"}
        self.specials = {self.model.id_to_piece(i): i for i in range(len(self.model)) if self.model.is_control(i)}

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.model.bos_id()] * (bos and self.model.bos_id() >= 0) + self.model.encode(text)

    def plain(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([token for token in ids if token < self.model.get_piece_size()])

    def dialog(self, messages: Dialog) -> list[int] | None:
        return None
