"""Llama 3's tokenizer: byte-level BPE over tiktoken, from Meta's tokenizer.model (lines of `base64-token rank`).

The ids are those of Meta's llama_models.llama3.tokenizer.Tokenizer, also for inputs so long that it cuts them.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.model').encode('Hi', bos=True))"
    [128000, 13347]
"""  # noqa: E501

import base64
import binascii
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken

from nanollama.tokenizer.base import AllowedSpecial, TokenizerError, allowed_names, check_count, check_id
from nanollama.tokenizer.stream import ByteStream

# How text is cut before BPE (the pattern is part of the vocabulary: another one gives other ids).
PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with one leading space or sign
        r"\p{N}{1,3}",  # digits by at most three
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the line ends behind them
        r"\s*[\r\n]+",  # line ends, with the space before them
        r"\s+(?!\S)",  # a run of spaces, but for the last one before a word
        r"\s+",
    ]
)

SPECIAL_COUNT = 256
# Ids follow the order, from the number of ranks on. 3.0 called some of these reserved; the names are 3.1's.
NAMED_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)

# tiktoken panics on much longer strings (Meta's TIKTOKEN_MAX_ENCODE_CHARS) and on long runs of one class,
# https://github.com/openai/tiktoken/issues/195 (Meta's MAX_NO_WHITESPACES_CHARS). The cuts change ids: both are kept.
MAX_CHUNK_CHARS = 400_000
MAX_RUN_CHARS = 25_000


def special_tokens(first_id: int) -> dict[str, int]:
    """Name -> id of all 256 special tokens."""
    reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(SPECIAL_COUNT - len(NAMED_SPECIAL))]
    return {name: first_id + i for i, name in enumerate([*NAMED_SPECIAL, *reserved])}


def looks_like_ranks(data: bytes) -> bool:
    return re.match(rb"\s*[A-Za-z0-9+/]+={0,2}[ \t]+[0-9]+[ \t]*(\r?\n|$)", data) is not None


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Reads the rank file; raises TokenizerError naming the first bad line. Ranks must be 0..n-1, each once."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            token, rank = _parse_line(line, f"{where}, line {number}")
            if token in ranks:
                raise TokenizerError(f"{where}, line {number}: token {token!r:.40} is there twice")
            ranks[token] = rank
            check_count(len(ranks))
    # Special ids start at the number of ranks: a gap or a repeat would give two tokens one id.
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{where}: its {len(ranks)} ranks are not 0..{len(ranks) - 1}, each once; the file is cut")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{where}: {len(missing)} of the 256 single bytes have no token, the first is {missing[0]}"
        )
    return ranks


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
        raise TokenizerError(f"{where}: expected a base64 token and its rank, got {line!r:.60}")
    try:
        return base64.b64decode(fields[0], validate=True), int(fields[1])
    except binascii.Error as error:
        raise TokenizerError(f"{where}: bad base64 {fields[0]!r:.40}: {error}") from None


def split_long(text: str) -> Iterator[str]:
    """Cuts text every 400,000 characters and, within such a chunk, every 25,000 characters of a run of whitespace or
    of non-whitespace, counted from the run's start. The cuts are those of Meta's Tokenizer.encode."""
    for start in range(0, len(text), MAX_CHUNK_CHARS):
        chunk = text[start : start + MAX_CHUNK_CHARS]
        cut = 0
        if len(chunk) > MAX_RUN_CHARS:
            for run in re.finditer(r"\s+|\S+", chunk):
                for end in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                    yield chunk[cut:end]
                    cut = end
        yield chunk[cut:]


class Llama3Tokenizer:
    """See base.Tokenizer. decode shows special tokens by their names, as Meta's does."""

    kind = "llama3"
    add_bos: bool = True
    chat_template: str | None = None

    def __init__(self, ranks: dict[bytes, int], name: str = "llama3"):
        self.special_ids = special_tokens(len(ranks))
        self.vocab_size = len(ranks) + SPECIAL_COUNT
        self.bos_id = self.special_ids["<|begin_of_text|>"]
        self.eos_id = self.special_ids["<|end_of_text|>"]
        self.pad_id = self.special_ids["<|finetune_right_pad_id|>"]
        self.stop_ids = frozenset(self.special_ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
        self.model = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids)

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: AllowedSpecial = ()) -> list[int]:
        allowed = set(allowed_names(self.special_ids, allowed_special))
        ids = [self.bos_id] if bos else []
        for part in split_long(text):
            ids += self.model.encode(part, allowed_special=allowed, disallowed_special=())
        return ids + [self.eos_id] if eos else ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self.model.decode_single_token_bytes(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        for token_id in ids:
            check_id(token_id, self.vocab_size)
        return self.model.decode(list(ids))

    def stream(self) -> ByteStream:
        return ByteStream(self.token_bytes)


def load(data: bytes, path: Path) -> Llama3Tokenizer:
    """data: the content of a Llama 3 tokenizer.model; raises TokenizerError."""
    return Llama3Tokenizer(parse_ranks(data, f"tokenizer {path}"), path.name)
