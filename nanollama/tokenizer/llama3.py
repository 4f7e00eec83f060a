"""Llama 3's tokenizer: byte-level BPE over tiktoken, from Meta's tokenizer.model (lines of `base64-token rank`).

The ids are those of Meta's llama_models.llama3.tokenizer.Tokenizer, also for inputs so long that it cuts them.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.model').encode('Hi', bos=True))"
    [128000, 13347]
"""  # noqa: E501

import re
from collections.abc import Iterator, Set

import tiktoken

from nanollama.tokenizer.base import Encoder
from nanollama.vocabulary import Vocabulary
from nanollama.vocabulary.spoken import pattern_of

# tiktoken panics on much longer strings (Meta's TIKTOKEN_MAX_ENCODE_CHARS) and on long runs of one class,
# https://github.com/openai/tiktoken/issues/195 (Meta's MAX_NO_WHITESPACES_CHARS). The cuts change ids: both are kept.
MAX_CHUNK_CHARS = 400_000
MAX_RUN_CHARS = 25_000


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


def encoder(vocabulary: Vocabulary) -> Encoder:
    """Of a vocabulary whose merges go by the order of its ids."""
    ranks = {token: i for i, token in enumerate(vocabulary.tokens[: vocabulary.n_ranks])}
    (pattern,) = pattern_of(vocabulary.pre).patterns
    model = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=vocabulary.special_ids)

    def encode(text: str, allowed: Set[str]) -> list[int]:
        ids: list[int] = []
        for part in split_long(text):
            ids += model.encode(part, allowed_special=set(allowed), disallowed_special=())
        return ids

    return encode
