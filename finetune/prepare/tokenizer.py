"""A sentencepiece BPE tokenizer trained on the data, as llama2.c trains its custom ones: bytes where no piece fits,
digits one by one, no normalization. The same text gives the same file.

Source: `train_vocab` in llama2.c's tinystories.py, for the settings.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune.errors import UserError

MAX_TEXT_BYTES = 50 << 20  # more text changes a vocabulary of 32,000 little
TOO_HIGH = re.compile(r"Vocabulary size too high .*<= (\d+)")
LEAST_WORDS = 3 + 256 + 1  # unknown, BOS, EOS, and all bytes


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> int:
    """Write a sentencepiece model of `vocab_size` tokens, or as many as the texts support; returns their number.

    Raises UserError when vocab_size is too small to hold the bytes.
    """
    if vocab_size < LEAST_WORDS:
        raise UserError(f"--vocab_size {vocab_size}: expected at least {LEAST_WORDS} (256 of them are the bytes)")
    lines = _spelled(list(_lines(texts)), (vocab_size - LEAST_WORDS) // 2)
    try:
        model = _train(lines, vocab_size)
    except RuntimeError as error:
        most = TOO_HIGH.search(str(error))
        if not most:
            raise UserError(f"no tokenizer of {vocab_size} words could be trained: {error}") from None
        vocab_size = int(most[1])
        model = _train(lines, vocab_size)
    path.write_bytes(model)
    return vocab_size


def _spelled(lines: list[str], most: int) -> list[str]:
    """The lines without all but the `most` frequent characters: those get no word and are spelled in bytes."""
    counts = Counter("".join(lines))
    rare = {ord(character): " " for character, _ in counts.most_common()[max(most, 1) :]}
    return [line.translate(rare) for line in lines] if rare else lines


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The first MAX_TEXT_BYTES, by line: sentencepiece skips what is longer than a few thousand bytes."""
    left = MAX_TEXT_BYTES
    for text in texts:
        for line in text.splitlines():
            for i in range(0, len(line), 1000):
                yield line[i : i + 1000]
        left -= len(text)
        if left < 0:
            return


def _train(lines: list[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        self_test_sample_size=0,
        character_coverage=1.0,
        num_threads=1,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        unk_surface=r" \342\201\207 ",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()
