"""Byte-level vocabularies that have no token for some bytes, as SmolLM2's: read, run and exported as they stand."""

from pathlib import Path

import pytest
import tokenizers

from nanollama.checkpoint import open_checkpoint
from nanollama.tokenizer import open_tokenizer
from vocabularies import folder_of

TEXTS = ["the cat and the other cat", "the \x04 cat", "café über\x13", "", "\xff\U0001f600 the"]


def byte_level(path: Path) -> tokenizers.Tokenizer:
    """GPT-2's scheme, trained on plain letters alone: most of the 256 bytes have no token."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator(["the cat and the other cat sat on the mat; the bat ran"] * 20, trainer)
    made.save(str(path))
    return made


@pytest.mark.parametrize("format", ["hf", "meta", "gguf"])
def test_a_byte_without_a_token_is_left_out_as_the_tokenizers_library_does(tmp_path: Path, format: str) -> None:
    from nanollama.checkpoint import convert

    theirs = byte_level(tmp_path / "tokenizer.json")
    assert len(theirs.encode("\x04\x13").ids) == 0
    folder = folder_of(tmp_path / "hf", theirs.get_vocab_size(), tmp_path / "tokenizer.json")
    made = folder if format == "hf" else tmp_path / ("x.gguf" if format == "gguf" else "meta")
    if format != "hf":
        convert(folder, made, format)
    tokenizer = open_checkpoint(made).tokenizer
    assert tokenizer is not None
    ours = open_tokenizer(tokenizer)
    for text in TEXTS:
        assert ours.encode(text, bos=False) == theirs.encode(text).ids, text
