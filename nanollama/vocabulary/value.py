"""A vocabulary as data: what its files say, and nothing that encodes.

Three kinds exist among Llamas: byte-level BPE ("bpe": Llama 3, GPT-2 and its heirs), sentencepiece's BPE ("spm":
Llama 2, llama2.c, own vocabularies) and its unigram ("unigram").

    python -c "from nanollama.vocabulary import read; print(len(read('tokenizer.model').tokens))"   # 128256
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

SPACE = "▁"  # U+2581: how sentencepiece spells a space
BYTE_PIECES = {f"<0x{byte:02X}>".encode(): bytes([byte]) for byte in range(256)}

# The largest published file is a tokenizer.json of 128,256 tokens, 17 MB. The limits keep the memory that a broken or
# hostile file can ask for below 1 GiB.
MAX_FILE_BYTES = 32 * 2**20
MAX_TOKENS = 2**20
MAX_TOKEN_BYTES = 65_535  # Llama 2's longest is 27

LLAMA3_SPECIAL_COUNT = 256
LLAMA3_NAMED = (  # by order of id, as of Llama 3.1 (3.0 called some of them reserved)
    ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id")
    + ("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image")
)


# sentencepiece's and GGUF's numbers, from 1 on
TokenType = IntEnum("TokenType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")


class TokenizerError(ValueError):
    """A file that is no tokenizer, or an id or a special token that it does not have. The message is one line."""


@dataclass(frozen=True)
class Vocabulary:
    """tokens: bytes by id; "spm" and "unigram" spell "▁" for a space and "<0x0A>" for a byte.

    Special tokens spell their own name. bos_id, eos_id, pad_id: None where there is none; pad_id is never the EOS.
    """

    kind: Literal["bpe", "spm", "unigram"]
    tokens: list[bytes]
    types: list[int]
    scores: list[float] = field(default_factory=list)  # "spm": the higher, the earlier a merge; "bpe": none
    merges: list[tuple[str, str]] | None = None  # "bpe", first the earliest; None: any two that make a token, by its id
    pre: str = "default"  # "bpe": GGUF's name of how text is cut before
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    ends: tuple[int, ...] = ()  # other ids that end an answer
    add_bos: bool = True  # a text begins with BOS
    add_dummy_prefix: bool = True  # "spm": a space before the text
    remove_extra_whitespaces: bool = False
    chat_template: str | None = None
    named_templates: dict[str, str] = field(default_factory=dict)  # besides it, such as "tool_use"
    named_tokens: dict[str, str] = field(default_factory=dict)  # what templates call other tokens: "image_token"
    format: str = ""  # of the file: "ranks", "sentencepiece", "llama2c", "json" or "gguf"
    data: bytes = field(default=b"", repr=False)  # the file as it stands, but for GGUF
    content: dict[str, Any] | None = field(default=None, repr=False)  # of a tokenizer.json, also one within a GGUF
    beside: dict[str, bytes] = field(default_factory=dict, repr=False)  # the files that said some of this, by name
    where: str = ""  # the file's path, for messages
    rewrites: bool = False  # "spm", "unigram": rules that change the text (nmt_nfkc), which only the file holds

    @property
    def special_ids(self) -> dict[str, int]:
        """Name -> id of the tokens that no text makes."""
        kinds = (TokenType.UNKNOWN, TokenType.CONTROL)
        return {self.tokens[i].decode(): i for i, kind in enumerate(self.types) if kind in kinds}

    @property
    def n_ordinary(self) -> int:
        """How many tokens come before the added ones at the end: any model of this vocabulary has rows for them."""
        ordinary = (TokenType.NORMAL, TokenType.BYTE)
        return next((n for n in range(len(self.types), 0, -1) if self.types[n - 1] in ordinary), 0)

    @property
    def n_ranks(self) -> int:
        """ "bpe": the number of ordinary tokens before the first special one."""
        return next((i for i, kind in enumerate(self.types) if kind != TokenType.NORMAL), len(self.types))

    @property
    def has_bytes(self) -> bool:
        """Whether a text that no pieces make is spelled in bytes."""
        return TokenType.BYTE in self.types

    @property
    def unknown_id(self) -> int | None:
        return next((i for i, kind in enumerate(self.types) if kind == TokenType.UNKNOWN), None)

    @property
    def stop_ids(self) -> list[int]:
        """The EOS first, then the other ids that end an answer."""
        return list(dict.fromkeys(i for i in (self.eos_id, *self.ends) if i is not None))


def llama3_special_tokens() -> list[bytes]:
    """The 256 names by order of id."""
    reserved = [f"reserved_special_token_{2 + i}" for i in range(LLAMA3_SPECIAL_COUNT - len(LLAMA3_NAMED))]
    return [f"<|{name}|>".encode() for name in (*LLAMA3_NAMED, *reserved)]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, the others from U+0100 on."""
    own = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


def check_lengths(vocabulary: Vocabulary) -> None:
    """Raises TokenizerError for a token that no text has: each of its bytes is looked at again and again."""
    longest = max(map(len, vocabulary.tokens), default=0)
    if longest > MAX_TOKEN_BYTES:
        raise TokenizerError(f"it has a token of {longest:,} bytes: at most {MAX_TOKEN_BYTES:,} are read")


def check_count(count: int) -> None:
    if count > MAX_TOKENS:
        raise TokenizerError(f"more than {MAX_TOKENS:,} tokens")
