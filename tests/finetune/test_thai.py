"""Another language: Thai, three bytes a letter and no spaces between words, on sentences written for this project.

A vocabulary too small for the alphabet spells the rest in bytes, so tokens end within letters: what is streamed must
not.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint_cases import make_weights
from finetune.config import TrainConfig
from finetune.prepare.tokenizer import train_tokenizer
from finetune.run import run
from finetune.text import ENTRY
from nanollama.checkpoint import open_checkpoint, write_bin
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import ModelConfig
from nanollama.tokenizer import Tokenizer, open_tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "thai_news.txt"
SENTENCES = SAMPLE.read_text(encoding="utf-8").splitlines()
HELD_OUT = "ข่าวด่วน: ฤๅษีฆ้องฟ้า ฯลฯ พบ ฐานปฏิมากรรมที่ภูเขา ๑๒๓ 😀"  # letters that the sample has not


@pytest.fixture(scope="module", params=[270, 600])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 words: ten beside the bytes, so nearly every letter is spelled. 600: whole syllables."""
    path = tmp_path_factory.mktemp("thai") / "tokenizer.model"
    assert train_tokenizer(SENTENCES, request.param, path) == request.param
    return path


def steps(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """What is shown, id by id."""
    stream = tokenizer.stream()
    yield from map(stream.push, ids)
    yield stream.flush()


def test_every_sentence_comes_back(tokenizer_file: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    for text in [*SENTENCES, HELD_OUT]:
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_letters_are_split_to_bytes_and_streamed_whole(tokenizer_file: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    for text in [*SENTENCES, HELD_OUT]:
        ids = tokenizer.encode(text, bos=True)
        shown = list(steps(tokenizer, ids))
        assert "".join(shown) == text
        assert not any("\ufffd" in piece for piece in shown)
        silent = sum(not piece for piece in shown[1:-1])
        if tokenizer.vocab_size == 270:
            assert silent >= len(text)  # two of three bytes of nearly every letter
        elif text != HELD_OUT:
            assert len(ids) < len(text)


def test_a_larger_vocabulary_needs_fewer_tokens(tmp_path: Path) -> None:
    lengths = []
    for words in (270, 400, 600):
        train_tokenizer(SENTENCES, words, tmp_path / "x.model")
        tokenizer = open_tokenizer(tmp_path / "x.model")
        lengths.append(sum(len(tokenizer.encode(text, bos=False)) for text in SENTENCES))
    assert lengths[0] > 2 * lengths[1] > 2 * lengths[2]


def test_the_vocabulary_travels_to_llama2c_and_back(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    config = ModelConfig(8, 1, 2, 1, tokenizer.vocab_size, 8, rope_theta=10_000.0)
    write_bin(tmp_path / "x.bin", config, make_weights(config, torch.float32), tokenizer=tokenizer_file)
    found = open_checkpoint(tmp_path / "x.bin").tokenizer
    assert found is not None
    for text in [*SENTENCES, HELD_OUT]:
        assert open_tokenizer(found).encode(text, bos=True) == tokenizer.encode(text, bos=True)


def test_a_model_of_thai_text_learns_and_generates_whole_letters(tmp_path: Path) -> None:
    """A news run end to end: one sentence a line, own vocabulary, a prompt in the same language."""
    config = TrainConfig(
        **ENTRY.defaults, data=str(SAMPLE), separator="\n", init="260K", vocab_size=400, seq_len=128, batch_size=4,
        max_steps=25, eval_every=25, save_every=25, prompt="กีฬา:", threads=1, out=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"), workers=1, device="cpu",
    )  # fmt: skip
    assert run(ENTRY, config) == 0
    llama = Llama.load(tmp_path / "run" / "final")
    events = list(llama.generate(["กีฬา: ทีม", "เศรษฐกิจ:"], Sampling(max_new_tokens=60)))
    for prompt in (0, 1):
        own = [event for event in events if event.prompt == prompt]
        text = "".join(event.text for event in own)
        assert sum("\u0e00" <= letter <= "\u0e7f" for letter in text) > len(text) / 2
        assert "\ufffd" not in text
