"""A run that goes on otherwise than it began, or with more data; folders that hold no run; how a run is continued."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import interrupts
from finetune.data.appended import Extent
from finetune.data.dialogs import Dialogs
from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from finetune.train import Loop
from nanollama.checkpoint import open_checkpoint
from small_runs import stories_home, stories_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_home(tmp_path_factory.mktemp("on"), layers=1)


def run(home: Path, out: Path, *flags: str, data: str = "stories.txt") -> int | str | None:
    """The exit code of a run of 6 steps in this process."""
    steps = "" if "--max_steps" in flags or "--epochs" in flags else "--max_steps 6"
    return stories_run(home, out, f"--eval_every 3 --save_every 3 {steps}", *flags, data=data)


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    assert run(home, home / "done") == 0
    return home / "done"


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """The run that is done, in a folder of its own."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def lines(out: Path, key: str) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if key in line]


def test_a_finished_run_is_extended(home: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: weight.clone() for name, weight in open_checkpoint(copy / "final").weights.items()}
    assert run(home, copy, "--max_steps", "9", "--resume") == 0
    assert [line["step"] for line in lines(copy, "loss")] == list(range(1, 10))
    assert json.loads((copy / "config.json").read_text())["max_steps"] == 9
    assert "step 6: --max_steps 6 -> 9" in capsys.readouterr().out
    after = open_checkpoint(copy / "final").weights
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_without_more_to_do_says_what_goes_on(
    home: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "final" / "consolidated.00.pth").read_bytes()
    assert run(home, copy, "--resume") == 0
    assert "all 6 steps are done: --max_steps with a larger number goes on" in capsys.readouterr().out
    assert (copy / "final" / "consolidated.00.pth").read_bytes() == before


def test_changes_of_rate_and_intervals_are_said_logged_and_kept(
    home: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--lr", "0.002", "--schedule", "constant", "--eval_every", "2", "--max_steps", "8", "--resume")
    assert run(home, copy, *flags) == 0
    said = capsys.readouterr().out
    assert "step 6: --lr 0.01 -> 0.002" in said and "step 6: --eval_every 3 -> 2" in said
    [logged] = lines(copy, "changed")
    assert logged["step"] == 6 and logged["changed"]["lr"] == [0.01, 0.002]
    assert [line["lr"] for line in lines(copy, "loss")][6:] == [0.002, 0.002]
    assert run(home, copy, *flags) == 0, "the same line again changes nothing more"
    assert len(lines(copy, "changed")) == 1


def test_epochs_say_how_long_a_run_is_and_how_much_longer(home: Path, tmp_path: Path) -> None:
    assert run(home, tmp_path / "out", "--epochs", "0.1") == 0
    steps = json.loads((tmp_path / "out" / "config.json").read_text())["max_steps"]
    assert run(home, tmp_path / "out", "--epochs", "0.2", "--resume") == 0
    after = json.loads((tmp_path / "out" / "config.json").read_text())["max_steps"]
    assert 2 * steps - 1 <= after <= 2 * steps and after > steps
    assert len(lines(tmp_path / "out", "loss")) == after


def test_epochs_beside_max_steps_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, tmp_path / "out", "--epochs", "1", "--max_steps", "6") == 2
    assert "--epochs 1 and --max_steps 6 together" in capsys.readouterr().err


def test_documents_that_were_appended_are_taken_up(
    home: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(home / "stories.txt", tmp_path / "stories.txt")
    shutil.copy(home / "shape.json", tmp_path / "shape.json")
    assert run(tmp_path, tmp_path / "out") == 0
    with (tmp_path / "stories.txt").open("a") as file:
        file.write("<|endoftext|>" + "<|endoftext|>".join(stories(20, seed=5)))
    capsys.readouterr()
    assert run(tmp_path, tmp_path / "out", "--max_steps", "8", "--resume") == 0
    said = capsys.readouterr().out
    assert "19 documents more to train on and 1 held out, behind the 38 and 2 that were there" in said
    assert [line["step"] for line in lines(tmp_path / "out", "loss")] == list(range(1, 9))


def test_an_extent_knows_its_beginning_and_nothing_else() -> None:
    def made(texts: list[list[int]]) -> Extent:
        starts = np.cumsum([0, *map(len, texts)])
        ids = np.concatenate([np.array(text) for text in texts])
        return Extent.of(Dialogs(None, ids, np.ones(len(ids), dtype=bool), starts))

    before, more = made([[1, 2], [3, 4, 5]]), made([[1, 2], [3, 4, 5], [6]])
    read = Extent(**before.saved())  # type: ignore[arg-type]
    assert more.begins_with(read) and before.begins_with(read)
    assert not made([[1, 2], [3, 4, 6], [6]]).begins_with(read)
    assert not made([[6], [1, 2], [3, 4, 5]]).begins_with(read)
    assert not made([[1, 2]]).begins_with(read)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model", '{"architectures": ["LlamaForCausalLM"]}', "was not written by a run"),
        ("list", "[]", "holds a JSON list, expected an object"),
        ("broken", "{", "JSON"),
    ],
)
def test_a_foreign_folder_is_not_resumed(
    home: Path, tmp_path: Path, name: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(text)
    assert run(home, tmp_path / name, "--resume") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert (tmp_path / name / "config.json").read_text() == text


def test_an_interrupt_while_data_are_prepared_is_one_line_and_leaves_no_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.run.prepare", interrupted)
    assert run(home, tmp_path / "out") == 130
    assert capsys.readouterr().err == interrupts.WORD + "\n"
    assert not (tmp_path / "out").exists()


def test_an_interrupt_after_a_checkpoint_says_how_to_continue(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Loop.step

    def interrupted(loop: Loop, stop: int) -> object:
        if loop.progress.step == 4:
            raise KeyboardInterrupt
        return step(loop, stop)

    monkeypatch.setattr(Loop, "step", interrupted)
    assert run(home, tmp_path / "out") == 130
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("interrupted")]
    assert len(said) == 1 and said[0].endswith(f"--out {tmp_path / 'out'} --resume")
