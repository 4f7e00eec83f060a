"""How a run goes, in its own words: the plan, validation from step 0 on, the verdict, the best step, what is odd."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from finetune.best import Best, load_best_
from finetune.build import Copies
from finetune.config import RATES, TrainConfig, resolve
from finetune.data.dialogs import Dialogs
from finetune.data.packing import Packer
from finetune.evaluate import Score, hold_out
from finetune.metrics import Lines, StepMetrics, in_words, read_metrics
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from finetune.recipe import settle
from finetune.text import ENTRY
from finetune.train import Loop
from finetune.verdict import Yardsticks, doubt, judge
from finetune.watch import LOST_STEPS, Watch
from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.weights import as_weights
from nanollama.tokenizer import open_tokenizer
from small_runs import base, exit_code, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories, and a base with a context of 96 tokens that was trained on them a little."""
    folder, texts = tmp_path_factory.mktemp("course"), stories(60)
    (folder / "stories.txt").write_text("<|endoftext|>".join(texts))
    fresh = base(folder / "fresh", tokenizer(folder, texts), 96)
    start = ("--ckpt", str(fresh), "--lr", "0.01", "--max_steps", "60", "--eval_every", "0")
    assert run(folder, folder / "base", *start) == 0
    return folder


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    """The exit code of a run on the stories in this process."""
    data = [] if "--data" in flags else ["--data", str(home / "stories.txt")]
    ckpt = [] if "--ckpt" in flags else ["--ckpt", str(home / "base" / "final")]
    more = ["--cache", str(home / "cache"), "--batch_size", "2", "--threads", "1", "--out", str(out)]
    return exit_code(ENTRY, *data, *ckpt, *more, *flags)


def checks(out: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["val_loss"]) for e in read_metrics(out / "metrics.jsonl") if "val_loss" in e]


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    [found] = folder.glob(f"{name}/model.safetensors")
    return safetensors.torch.load_file(found)


@pytest.mark.parametrize("method", ["full", "no_embeddings", "norms", "lora"])
def test_each_method_trains_at_its_defaults(home: Path, tmp_path: Path, method: str) -> None:
    assert run(home, tmp_path / "out", "--method", method, "--max_steps", "12", "--eval_every", "0") == 0
    (_, began), (_, ended) = checks(tmp_path / "out")
    assert ended < began
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lr"] == RATES[method]


def test_the_plan_the_validation_of_step_0_and_the_verdict_are_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "out", "--method", "lora", "--lr", "0.01", "--max_steps", "10") == 0
    said = capsys.readouterr().out
    assert "plan: 192 tokens a step (2 rows of 96); 10 steps are 0." in said
    assert "plan: rate 0.01, cosine after 0 steps; trains " in said
    assert "memory plan: " in said and "plan: about " in said
    assert "step 0: validation loss " in said and "step 0: beside it uniform 5.7" in said
    assert "verdict: better than where it began by 0." in said and "step 10, kept as final/" in said
    assert [step for step, _ in checks(tmp_path / "out")] == [0, 10]


def test_the_rate_of_a_method_is_called_its_own(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, tmp_path / "out", "--method", "lora", "--max_steps", "1") == 0
    assert "plan: rate 0.0002 (lora's own), cosine" in capsys.readouterr().out


def test_a_run_that_ends_worse_than_it_began_says_so_and_fails(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "out", "--lr", "1.0", "--max_steps", "8", "--grad_clip", "0") == 1
    assert "verdict: worse than where it began by " in capsys.readouterr().out
    assert (tmp_path / "out" / "final" / "params.json").exists()


def test_the_best_step_is_kept_and_patience_ends_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, evaluate = {0: 5.0, 2: 3.0, 4: 4.0, 6: 3.5}, Loop.evaluate

    def evaluated(loop: Loop) -> Score:
        evaluate(loop)
        return Score(planned[loop.progress.step], planned[loop.progress.step] / 2)

    monkeypatch.setattr(Loop, "evaluate", evaluated)
    flags = ("--max_steps", "20", "--eval_every", "2", "--save_every", "2", "--patience", "2", "--lr", "0.01")
    assert run(home, tmp_path / "out", *flags) == 0
    said = capsys.readouterr().out
    assert "step 6: 2 validations without a better one: stopped early" in said
    assert "better than where it began by 1.00 bits per byte; best at step 2, kept as final/" in said
    assert [folder.name for folder in (tmp_path / "out" / "best").iterdir()] == ["step_00000002"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["val_loss"] == 3.0
    kept = open_checkpoint(tmp_path / "out" / "final").weights
    best, last = (load(tmp_path / "out" / folder, "step_*") for folder in ("best", "checkpoints"))
    assert torch.equal(kept["norm.weight"], best["norm.weight"])
    assert not torch.equal(kept["norm.weight"], last["norm.weight"])


def test_best_counts_what_is_no_better() -> None:
    best = Best(10, Score(3.0, 1.5)).after(20, Score(3.1, 1.6)).after(30, Score(float("nan"), 1.6))
    assert (best.step, best.waited) == (10, 2)
    assert best.after(40, Score(2.9, 1.4)) == Best(40, Score(2.9, 1.4))


YARDS = Yardsticks(Score(6.0, 3.0), Score(4.0, 2.0))


@pytest.mark.parametrize(
    ("began", "kept", "last", "said"),
    [
        (5.0, 3.0, 3.0, "better than where it began by 1.00 bits per byte; step 9, kept as final/"),
        (
            5.0,
            4.5,
            4.5,
            "better than where it began by 0.25 bits per byte; step 9, kept as final/; a bigram model still",
        ),
        (3.0, 3.2, 3.2, "worse than where it began by 0.1 bits per byte: lower --lr"),
        (3.0, 3.0, 3.0, "no better than where it began: raise --lr or --max_steps"),
        (7.0, 6.5, 6.5, "it still predicts worse than chance"),
        (5.0, 3.0, float("nan"), "better than where it began by 1.00"),
    ],
)
def test_the_verdict_is_one_sentence(began: float, kept: float, last: float, said: str) -> None:
    verdict = judge(YARDS, Score(began, began / 2), Score(kept, kept / 2), 9, Score(last, last / 2), 9)
    assert said in verdict.text and "\n" not in verdict.text
    assert verdict.is_worse == said.startswith("worse")


def test_a_model_that_begins_worse_than_chance_is_doubted() -> None:
    assert "is the tokenizer its own" in doubt(YARDS, Score(11.4, 5.0))
    assert doubt(YARDS, Score(5.9, 2.9)) == ""


def test_a_foreign_tokenizer_of_equal_size_gets_a_word(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text.swapcase()[::-1] for text in stories(60)]
    words = open_tokenizer(home / "t.model").vocab_size
    train_tokenizer(texts, words, tmp_path / "other.model")
    assert open_tokenizer(tmp_path / "other.model").vocab_size == words
    run(home, tmp_path / "out", "--tokenizer", str(tmp_path / "other.model"), "--max_steps", "1")
    assert "predicts worse than chance" in capsys.readouterr().out


def test_validation_copies_of_training_text_get_a_word(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twice.txt").write_text("<|endoftext|>".join(stories(10) * 4))
    run(home, tmp_path / "out", "--data", str(tmp_path / "twice.txt"), "--max_steps", "1")
    assert "data: 2 of 2 held-out documents stand among those trained on, word for word" in capsys.readouterr().out


def test_a_file_of_a_few_words_gets_a_word(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few.txt").write_text("One day, a cat and a dog met.")
    run(home, tmp_path / "out", "--data", str(tmp_path / "few.txt"), "--max_steps", "100", "--eval_every", "0")
    said = capsys.readouterr().out
    assert "little for so many steps: each document is seen about 200 times" in said
    assert "tokens are held out: their loss says little" in said


def test_val_data_are_validated_on_and_all_of_data_is_trained_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val.txt").write_text("<|endoftext|>".join(stories(3, seed=7)))
    assert run(home, tmp_path / "out", "--val_data", str(tmp_path / "val.txt"), "--max_steps", "1") == 0
    assert "data: stories: 60 documents" in (said := capsys.readouterr().out) and "held out: 3 documents" in said
    assert run(home, tmp_path / "no", "--val_data", str(tmp_path / "none.txt")) == 2
    assert "--val_data" in capsys.readouterr().err


def test_the_length_of_rows_and_of_the_run_follow_from_checkpoint_and_data(home: Path) -> None:
    config = resolve(TrainConfig(ckpt="x"), "cpu", 1, context=96)
    assert (config.seq_len, config.max_steps) == (96, 0)
    assert resolve(TrainConfig(ckpt="x"), "cpu", 1, context=8192).seq_len == 1024
    assert resolve(TrainConfig(ckpt="x", seq_len=128), "cpu", 1, context=96).seq_len == 128

    class Rows:
        def rows_an_epoch(self) -> int:
            return 400

    def steps(**changes: float) -> int:
        config = resolve(TrainConfig(ckpt="x", **changes), "cpu", 1)  # type: ignore[arg-type]
        return settle(config, Rows(), config.batch_size).max_steps  # type: ignore[arg-type]

    assert (steps(), steps(epochs=1), steps(epochs=0.5), steps(max_steps=7)) == (300, 100, 50, 7)
    assert (steps(batch_size=400), steps(batch_size=1)) == (50, 1000)


def step(loss: float) -> StepMetrics:
    return StepMetrics(loss=loss, lr=0.1, grad_norm=1.0, tokens=1, tokens_per_s=250.0, peak_bytes=1)


def test_off_a_terminal_the_first_step_and_then_one_in_ten_seconds_get_a_line() -> None:
    now = [0.0]
    lines = Lines(100, clock=lambda: now[0])
    said = []
    for number in range(1, 31):
        now[0] += 1.0
        said.append(lines.of_step(number, step(2.0)))
    shown = [number for number, text in enumerate(said, start=1) if text]
    assert shown == [1, 11, 21]
    assert said[0] == "step 1/100: loss 2.000, 250 tok/s"
    assert said[10] == "step 11/100: loss 2.000, 250 tok/s, 89 s left"
    assert (in_words(12), in_words(1200), in_words(36_000)) == ("12 s", "20 min", "10.0 h")


def test_a_spike_and_a_loss_that_does_not_come_back_are_seen() -> None:
    noise, watch = np.random.default_rng(0), Watch()
    for _ in range(60):
        assert watch.see(3 + 0.1 * noise.normal(), 1 + 0.1 * noise.random()) == ""
    assert watch.see(6.0, 1.0).startswith("the loss jumps to 6.00 from about ")
    assert watch.see(6.0, 1.0) == "", "one word is enough for a while"
    for _ in range(30):
        assert watch.see(3.0, 1.0) == ""
    assert "gradient's norm rises to 30" in watch.see(3.0, 30.0)
    for _ in range(LOST_STEPS + 40):
        watch.see(7.0, 1.0)
    assert watch.diverged.startswith("diverged: ")


@pytest.mark.parametrize("falls", [True, False])
def test_healthy_losses_are_not_diverged(falls: bool) -> None:
    noise, watch = np.random.default_rng(1), Watch()
    for number in range(400):
        watch.see((9 * 0.99**number if falls else 2.0) + abs(noise.normal()), 1 + noise.random())
    assert watch.diverged == ""


def test_a_best_of_other_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_best_(tmp_path, 3, torch.nn.Linear(2, 2))


def test_bits_per_byte_count_the_bytes_of_text_alone(home: Path) -> None:
    tokenizer = open_tokenizer(home / "t.model")
    tokenizer.special_ids = {"<s>": 1, "</s>": 2, "<|answer|>": 5}
    ids = np.array([1, 5, *tokenizer.encode("a cat met a dog", bos=False), 2])
    said = np.array([False, True, *[True] * (len(ids) - 2)])
    held_out = hold_out(Packer(Dialogs(1, ids, said, np.array([0, len(ids)])), 64), tokenizer, 50)
    assert (held_out.text_bytes, held_out.tokens) == (len("a cat met a dog"), len(ids) - 1)


def test_of_a_book_the_beginning_is_validated_on(home: Path) -> None:
    class Book:
        bos_id, lengths = 1, np.array([5000])

        def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
            return np.where(np.arange(start, stop) == 0, 1, 300 - 1)

    held_out = hold_out(Packer(Book(), 64), open_tokenizer(home / "t.model"), 100)
    assert held_out.tokens == 99
    assert sum(len(held_out.packer.batch([row]).tokens[0]) for row in held_out.rows) == 128


def test_weights_are_copied_one_at_a_time_and_those_that_come_later_not_at_all() -> None:
    stored = as_weights({"tok_embeddings.weight": torch.ones(4, 2), "layers.0.wq": torch.ones(6, 3)})
    copies = Copies(stored, torch.device("cpu"), torch.float32, frozenset(["layers.0.wq"]))
    mine = copies["tok_embeddings.weight"]
    assert mine.data_ptr() != stored["tok_embeddings.weight"].data_ptr() and torch.equal(mine, torch.ones(4, 2))
    later = copies["layers.0.wq"]
    assert later.shape == (6, 3) and later.untyped_storage().nbytes() == 4
