"""Exported vocabularies in llama.cpp: the same ids as ours for any text.

python -m pytest tests/interop -k tokens
"""

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_cases import make_weights
from engines import LlamaCpp
from nanollama.checkpoint import vocab, write_gguf
from nanollama.model import ModelConfig
from nanollama.tokenizer import open_tokenizer

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'llama-parity[interop]'")

FIXED = [
    "Hello, world!",
    " two  spaces   and\ttabs\n\n\nlines\r\n",
    "it's 3.14159, isn't it? WE'LL see: 1234567 -- ok...",
    "<|begin_of_text|><|eot_id|> <s></s> [INST] <unk> <0x41>",
    "สวัสดีชาวโลก ภาษาไทยไม่เว้นวรรค",
    "你好，世界。 こんにちは 안녕하세요 Привет мир שלום مرحبا",
    "😀👍🏽 👩‍👩‍👧‍👦 e\u0301 ﬁ ½ ² x\u00a0y\u3000z\u200b",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # ok",
    "a" * 200,
    " " * 37 + "x" + "\n" * 9,
]
LETTERS = (
    "abcdeinorst   \n\t.,!?'\"0123456789ABZ_-()<>éüßñçşłžกขคาีู่你好世界日本語한국어приветعربעב😀👍🏽\u200d\u00a0\u3000\r"
)


def corpus(count: int, seed: int) -> list[str]:
    """Random mixtures of scripts, spaces and digits, and random assigned code points of the whole Unicode range.

    Exceptions: code points that are assigned only in newer versions of Unicode than this Python's (llama.cpp has tables
    of its own), and the mark that sentencepiece writes for a space, see below.
    """
    rng = random.Random(seed)
    planes = [(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0xD7FF), (0x10000, 0x1FAFF)]
    made = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 60))) for _ in range(count)]
    for _ in range(count):
        drawn = (chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 20)))
        made.append("".join(letter for letter in drawn if unicodedata.category(letter) != "Cn"))
    return FIXED + made


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A .gguf of the smallest model that carries a vocabulary."""

    def made(tokenizer: Path) -> Path:
        size = len(vocab.read(tokenizer).tokens)
        config = ModelConfig(dim=2, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=size, hidden_dim=2)
        path = tmp_path_factory.mktemp("vocabulary") / "x.gguf"
        write_gguf(path, config, make_weights(config, torch.float32), tokenizer=tokenizer)
        return path

    return made


@pytest.mark.parametrize("name", ["llama3", "llama2_tokenizer.model", "tok512.bin"])
def test_ids_are_equal(
    name: str, vocabulary_file: Callable[[Path], Path], test_data: Callable[[str], Path], llama3_tokenizer_path: Path
) -> None:
    source = llama3_tokenizer_path if name == "llama3" else test_data(name)
    ours, engine = open_tokenizer(source), LlamaCpp(vocabulary_file(source), vocab_only=True)
    texts = corpus(1000, seed=0)
    wrong = [text for text in texts if engine.encode(text) != ours.encode(text, bos=False)]
    model = engine.llama
    assert (model.token_bos(), model.token_eos()) == (ours.bos_id, ours.eos_id)
    engine.close()
    assert wrong == []


def test_the_mark_for_a_space_is_a_space_as_in_llama_cpp(
    vocabulary_file: Callable[[Path], Path], test_data: Callable[[str], Path]
) -> None:
    """U+2581 in a text: sentencepiece, llama.cpp and we take it for a space; run.c alone spells it in bytes."""
    engine = LlamaCpp(vocabulary_file(test_data("tok512.bin")), vocab_only=True)
    ours = open_tokenizer(test_data("tok512.bin"))
    assert engine.encode("a\u2581b") == engine.encode("a b") == ours.encode("a b", bos=False)
    assert ours.encode("a\u2581b", bos=False) == ours.encode("a b", bos=False)
    engine.close()
