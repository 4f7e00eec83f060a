"""tokenizer.json, run by the `tokenizers` package as it stands: normalizer, pre-tokenizer, model, added tokens.

A vocabulary of byte-level BPE that comes from elsewhere (a GGUF) is written as one first.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.json').encode('Hi', bos=True))"
    [128000, 13347]
"""  # noqa: E501

import json
from collections.abc import Callable, Set
from typing import Any, TypeVar

import tokenizers

from nanollama.gate import CheckpointError
from nanollama.gate.tokenizers import Guard, is_known
from nanollama.tokenizer.base import Encoder, by_parts
from nanollama.vocabulary import TokenizerError, Vocabulary
from nanollama.vocabulary.to_json import tokenizer_json

T = TypeVar("T")


def encoder(vocabulary: Vocabulary) -> Encoder:
    """Raises TokenizerError where the package refuses the file."""
    content = vocabulary.content or tokenizer_json(vocabulary)
    data = vocabulary.data if vocabulary.format == "json" else json.dumps(content).encode()
    check = _guard(vocabulary, content, data)
    backend = _guarded(lambda: tokenizers.Tokenizer.from_buffer(data.removeprefix(b"\xef\xbb\xbf")))
    backend.no_truncation()  # a file may carry the settings of some training run
    backend.no_padding()
    special_ids = vocabulary.special_ids

    def plain(text: str) -> list[int]:
        check(text)
        backend.encode_special_tokens = True  # text that looks like a special token is text
        return _guarded(lambda: backend.encode(text, add_special_tokens=False).ids)

    some = by_parts(plain, special_ids)

    def encode(text: str, allowed: Set[str]) -> list[int]:
        if not allowed or allowed != special_ids.keys():
            return some(text, allowed)
        check(text)
        backend.encode_special_tokens = False
        return _guarded(lambda: backend.encode(text, add_special_tokens=False).ids)

    return encode


def _guard(vocabulary: Vocabulary, content: dict[str, Any], data: bytes) -> Callable[[str], None]:
    """What raises TokenizerError for a text that this file's rules would make too much of."""
    if is_known(content):
        return lambda text: None
    where = vocabulary.where or "tokenizer.json"

    def refused(call: Callable[[], T]) -> T:
        try:
            return call()
        except CheckpointError as error:
            raise TokenizerError(f"tokenizer {error}") from None

    guard = refused(lambda: Guard(data, where))
    return lambda text: refused(lambda: guard.check(text=text))


def _guarded(call: Callable[[], T]) -> T:
    """What the call returns; a Rust panic, which is no Exception, as TokenizerError."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"not a usable tokenizer.json: {' '.join(str(error).split())[:200]}") from None
        raise
