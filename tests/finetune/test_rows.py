"""Models with other numbers of rows than of tokens: a run ends only where the text needs a row that is not there."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.build import chat_rows, fresh_weights, ordinary_tokens, reset_rows_
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from finetune.run import sample
from finetune.text import ENTRY
from nanollama.checkpoint import write_hf, write_meta
from nanollama.model import ModelConfig, Transformer
from nanollama.tokenizer import open_tokenizer
from small_runs import exit_code

SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 128}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories, and the tokenizer of 300 words that was trained on them."""
    folder, texts = tmp_path_factory.mktemp("rows"), stories(40)
    (folder / "stories.txt").write_text("<|endoftext|>".join(texts))
    train_tokenizer(texts, 300, folder / "t.model")
    return folder


def base(home: Path, rows: int, says: int | None = None) -> Path:
    """A checkpoint with this many rows; `says`: the only token that it ever draws."""
    config = ModelConfig(vocab_size=rows, **SHAPE)
    weights = fresh_weights(config, torch.Generator().manual_seed(0))
    if says is not None:
        weights["tok_embeddings.weight"][:, 0] = 4.0
        weights["output.weight"].zero_()[says, 0] = 50.0
    folder = home / f"base-{rows}-{says}"
    if not folder.exists():
        write_meta(folder, config, weights)
    return folder


def run(home: Path, ckpt: Path, out: Path, *flags: str) -> int | str | None:
    argv = ["--data", str(home / "stories.txt"), "--cache", str(home / "cache"), "--ckpt", str(ckpt)]
    small = "--seq_len 64 --batch_size 1 --max_steps 2 --lr 1e-9 --sample_every 1 --threads 1"
    argv += ["--tokenizer", str(home / "t.model"), *small.split(), "--out", str(out), *flags]
    return exit_code(ENTRY, *argv)


def test_a_sample_that_draws_a_row_without_a_token_does_not_end_the_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, base(home, 320, says=310), tmp_path / "out") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count("Once upon a time") >= 3  # after each step, and at the end
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "out" / "final" / "params.json").exists()


@pytest.mark.parametrize("prompt", ["", "word " * 200], ids=["empty", "longer than the context"])
def test_a_prompt_that_cannot_be_continued_does_not_end_the_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    assert run(home, base(home, 300), tmp_path / "out", "--prompt", prompt) == 0, capsys.readouterr().err
    if prompt:
        assert "[the sample ends here: prompt 0 has" in capsys.readouterr().out


def test_the_tokenizer_of_another_model_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, base(home, 280), tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said == (
        "error: the tokenizer has 300 tokens and the model 280: it is another model's; give the right one with "
        "--tokenizer\n"
    )
    assert not (tmp_path / "out").exists()


def with_words(home: Path, *words: str) -> Path:
    """The tokenizer as a tokenizer.json with added words, one of them special."""
    folder = home / f"{len(words)}-words"
    write_hf(
        folder,
        ModelConfig(vocab_size=300, **SHAPE),
        fresh_weights(ModelConfig(vocab_size=300, **SHAPE), torch.Generator()),
        tokenizer=home / "t.model",
    )
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, word in enumerate(words):
        content["added_tokens"].append({"id": 300 + i, "content": word, "special": i == 0, **flags})
    (home / f"{len(words)}.json").write_text(json.dumps(content))
    return home / f"{len(words)}.json"


def test_words_without_a_row_are_legal_until_the_text_uses_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ("--tokenizer", str(with_words(home, "<pad>", "Lily")))
    text = home / "plain.txt"
    text.write_text("<|endoftext|>".join(f"The cat saw {n} red balls." for n in range(40)))
    assert run(home, base(home, 300), tmp_path / "plain", *tokenizer, "--data", str(text)) == 0, capsys.readouterr().err
    text.write_text(text.read_text().replace("cat", "Lily"))
    assert run(home, base(home, 300), tmp_path / "lily", *tokenizer, "--data", str(text)) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "the data uses token 301, 'Lily', and the model has rows for 300 tokens only: name its own --tokenizer\n"
    )
    assert not (tmp_path / "lily").exists()


def test_the_sample_shows_what_was_drawn_before_it_failed(home: Path) -> None:
    class Broken:
        """A tokenizer whose stream fails at the third token."""

        def __init__(self) -> None:
            self.inner, self.seen = open_tokenizer(home / "t.model"), 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def stream(self) -> "Broken":
            return self

        def push(self, token: int) -> str:
            self.seen += 1
            if self.seen > 12:
                raise ValueError("no such token")
            return "x"

    config = ModelConfig(vocab_size=300, **SHAPE)
    model = Transformer.from_weights(config, fresh_weights(config, torch.Generator().manual_seed(0))).train()
    text = sample(model, Broken(), "Once")  # type: ignore[arg-type]
    assert text.startswith("Oncex")
    assert text.endswith(" [the sample ends here: no such token]")
    assert model.training


def test_chat_words_that_come_before_the_ordinary_ones_are_filled_with_their_mean() -> None:
    """Special tokens may have the first ids, and a word of the vocabulary no row."""

    config = ModelConfig(vocab_size=50, **SHAPE)
    weights = fresh_weights(config, torch.Generator().manual_seed(0))
    weights["tok_embeddings.weight"][2] = 0
    model = Transformer.from_weights(config, weights)
    special = {"<s>": 0, "<|eot_id|>": 1, "<|start_header_id|>": 2, "<|eom_id|>": 57}
    words = SimpleNamespace(vocab_size=60, special_ids=special, chat_template=None, bos_id=0)
    ids = chat_rows(model, words, "auto")  # type: ignore[arg-type]
    assert ids == (2,)
    reset_rows_(model, ids, ordinary_tokens(words, model))  # type: ignore[arg-type]
    assert torch.allclose(model.tok_embeddings.weight[2], weights["tok_embeddings.weight"][3:].mean(dim=0), atol=1e-6)
