"""Ways in which token ids and rendered chats have been wrong."""

from typing import Any

import tiktoken

from nanollama.chat import render_chat
from parity.candidates.nano.model import Nano
from parity.mutants.edits.edit import Edit, override

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def with_tokenizer(encode: Any) -> Edit:
    """encode(tokenizer, text, bos) in place of the tokenizer's own."""

    def edit(nano: Nano) -> None:
        tokenizer = nano._tokenizer()
        override(nano, "encode", lambda text: encode(tokenizer, text, True))
        override(nano, "encode_plain", lambda text: encode(tokenizer, text, False))

    return edit


def double_bos(tokenizer: Any, text: str, bos: bool) -> list[int]:
    return [tokenizer.bos_id] * bos + tokenizer.encode(text, bos=bos)


def no_bos(tokenizer: Any, text: str, bos: bool) -> list[int]:
    return tokenizer.encode(text, bos=False)


def gpt2_pattern(tokenizer: Any, text: str, bos: bool) -> list[int]:
    vocabulary = tokenizer.vocabulary
    ranks = {token: i for i, token in enumerate(vocabulary.tokens[: vocabulary.n_ranks])}
    other = tiktoken.Encoding("gpt2-regex", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [tokenizer.bos_id] * bos + other.encode_ordinary(text)


def doubled_prefix(tokenizer: Any, text: str, bos: bool) -> list[int]:
    return tokenizer.encode(" " + text, bos=bos)


def lost_prefix(tokenizer: Any, text: str, bos: bool) -> list[int]:
    """The trick of encoding behind a newline and cutting it off again, which also cuts the dummy prefix."""
    newline = len(tokenizer.encode("\n", bos=False))
    return [tokenizer.bos_id] * bos + tokenizer.encode("\n" + text, bos=False)[newline:]


def special_from_text(tokenizer: Any, text: str, bos: bool) -> list[int]:
    return tokenizer.encode(text, bos=bos, allowed_special="all")


def chat_as_plain_text(nano: Nano) -> None:
    """The headers are rendered into the text and encoded as if the user had typed them."""
    tokenizer = nano._tokenizer()

    def encode_chat(dialog: list[dict[str, Any]]) -> list[int]:
        return tokenizer.encode(render_chat(dialog, add_generation_prompt=True), bos=False)

    override(nano, "encode_chat", encode_chat)


def date_line(nano: Nano) -> None:
    """A date line that nobody asked for."""
    from nanollama.chat import encode_chat

    tokenizer = nano._tokenizer()
    say = lambda dialog: encode_chat(dialog, tokenizer, add_generation_prompt=True, date="26 Jul 2024").ids
    override(nano, "encode_chat", say)


def single_newline(nano: Nano) -> None:
    """One line end after the header where the format has two."""
    tokenizer, true = nano._tokenizer(), nano.encode_chat
    two, one = (tokenizer.encode(text, bos=False)[0] for text in ("\n\n", "\n"))
    override(nano, "encode_chat", lambda dialog: [one if i == two else i for i in true(dialog) or []])
