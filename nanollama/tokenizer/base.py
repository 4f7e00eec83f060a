"""What every tokenizer kind shares: the Protocol, the error, and how text is prepared.

python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.model').kind)"
"""

import re
from collections.abc import Collection, Iterator, Sequence, Set
from pathlib import Path
from typing import Literal, Protocol

AllowedSpecial = Literal["all"] | Collection[str]

# The largest published file is a tokenizer.json of 128,256 tokens, 17 MB. The limits keep the memory that a broken or
# hostile file can ask for below 1 GiB.
MAX_FILE_BYTES = 32 * 2**20
MAX_TOKENS = 2**20


class TokenizerError(ValueError):
    """A file that is no tokenizer, or an id or a special token that it does not have. The message is one line."""


class Stream(Protocol):
    """Decodes ids as they come: the joined results of push, then flush, equal decode of the same ids."""

    def push(self, token_id: int) -> str:
        """The whole characters that this id completes; "" while one is still short of bytes."""
        ...

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the stream is then as new."""
        ...


class Tokenizer(Protocol):
    """A text <-> token ids map. Text that looks like a special token is text, unless allowed_special names it.

    kind is "llama3", "llama2", "llama2c" or "hf"; pad_id is None where the vocabulary has no padding token, and never
    the eos id; stop_ids are the ids that end generation.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def special_ids(self) -> dict[str, int]: ...

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: AllowedSpecial = ()) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream(self) -> Stream: ...


def read_bytes(path: Path) -> bytes:
    """The file's content; raises TokenizerError where there is none or far too much of it."""
    try:
        if not path.is_file():
            what = "is a folder, name the file in it" if path.is_dir() else "does not exist or is no regular file"
            raise TokenizerError(f"tokenizer {path}: {what}")
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise TokenizerError(f"tokenizer {path}: {size_bytes:,} bytes, no tokenizer is above {MAX_FILE_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"tokenizer {path}: cannot be read: {error.strerror}") from None


def well_formed(text: str) -> str:
    """Text that UTF-8 can carry: pairs of surrogates joined, lone ones replaced by U+FFFD (as tiktoken does)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def allowed_names(special_ids: dict[str, int], allowed_special: AllowedSpecial) -> Set[str]:
    """The special tokens that encode may read out of text; raises TokenizerError on a name that does not exist."""
    if isinstance(allowed_special, str):
        if allowed_special != "all":
            raise TokenizerError(f'allowed_special is {allowed_special!r}: expected "all" or a set of special tokens')
        return special_ids.keys()
    unknown = sorted(set(allowed_special) - special_ids.keys())
    if unknown:
        raise TokenizerError(f"allowed_special names {unknown[0]!r}, which is no special token of this tokenizer")
    return set(allowed_special)


def split_special(text: str, names: Set[str]) -> Iterator[tuple[str, bool]]:
    """Cuts text at the named special tokens: (part, whether the part is one of them); no empty parts."""
    if not names:
        parts = [text]
    else:
        # Longest first: where one name starts with another, the longer one is meant.
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
    for i, part in enumerate(parts):
        if part:
            yield part, i % 2 == 1


def check_id(token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise TokenizerError(f"token id {token_id} is outside of the tokenizer's 0..{vocab_size - 1}")


def check_count(count: int) -> None:
    if count > MAX_TOKENS:
        raise TokenizerError(f"more than {MAX_TOKENS:,} tokens")
