"""The page of a run, and of two side by side: finished or interrupted, with names that would break a page."""

import html
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune import text
from finetune.compare import compare, with_flags
from finetune.config import TrainConfig
from finetune.errors import TrainingStopped, UserError
from finetune.metrics import SAMPLES, note_sample, read_metrics
from finetune.parallelize import World
from finetune.prepare.stories import stories
from finetune.report import NAME, defaults, differing, main, reported, write_report
from finetune.run import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ODD = "a $x_{<b>&'\"%"  # a folder's name: mathtext, markup and quotes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of a small model, and one that was interrupted."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "stories.txt").write_text("<|endoftext|>".join(story[:100] for story in stories(60)))
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 32}
    (folder / "shape.json").write_text(json.dumps(shape))
    train(folder, ODD, lr=1e-2, prompt="<script>alert(1)</script>")
    train(folder, "slow", lr=1e-3)
    shutil.copytree(folder / "slow", folder / "stopped")
    (folder / "stopped" / "summary.json").unlink()
    (folder / "stopped" / "report.html").unlink()
    lines = (folder / "stopped" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "stopped" / "metrics.jsonl").write_text("".join(lines[:5]) + '{"step": 6, "lo')
    return folder


def train(home: Path, name: str, **flags: object) -> None:
    files = {"data": str(home / "stories.txt"), "init": str(home / "shape.json"), "cache": str(home / "cache")}
    small = {"vocab_size": 300, "seq_len": 64, "batch_size": 2, "max_steps": 8, "eval_every": 4, "sample_every": 4}
    assert run(text.ENTRY, TrainConfig(**{**files, **small, "out": str(home / name), "threads": 1, **flags})) == 0


def page(home: Path, name: str) -> str:
    return (home / name / NAME).read_text(encoding="utf-8")


def test_a_finished_run_shows_all_of_itself(home: Path) -> None:
    shown = page(home, "slow")
    assert 'data-state="finished">finished at step 8 of 8' in shown
    for title in ("Curves", "Validation", "Samples", "Before the first step", "Config", "Machine"):
        assert f"<h2>{title}</h2>" in shown
    for label in ("loss, nats per token", "learning rate", "gradient norm", "labels per second", "peak of memory"):
        assert label in shown
    assert "mathdefault" not in shown  # TeX that nobody renders
    assert shown.count('class="sample">Once upon a time') == 2
    assert torch.__version__ in shown and 'class="first"' in shown


def test_the_page_needs_nothing_beside_it_and_obeys_no_name(home: Path) -> None:
    shown = page(home, ODD)
    assert "<script" not in shown and "alert(1)" in shown
    assert "<b>&'" not in shown
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', shown)
    assert links == [] and not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", shown)


def test_config_marks_what_differs_from_the_defaults(home: Path) -> None:
    saved = json.loads((home / "slow" / "config.json").read_text())
    names = differing(saved)
    assert {"data", "seq_len", "batch_size", "vocab_size", "eval_every"} <= set(names)
    assert not {"lr", "weight_decay", "min_lr", "device", "max_steps", "init", "out"} & set(names) - {"max_steps"}
    assert defaults(saved)["lr"] == 1e-3
    assert page(home, "slow").count('<tr class="differs">') == len(names)


def test_a_run_that_was_killed_gets_its_page_by_hand(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(home / "stopped")
    assert capsys.readouterr().out == f"{home / 'stopped' / NAME}\n"
    assert 'data-state="stopped early">stopped early at step 4 of 8' in page(home, "stopped")
    with pytest.raises(UserError, match="holds no run"):
        write_report(home)


@pytest.mark.parametrize("error", [TrainingStopped("stopped by SIGINT", 128 + signal.SIGINT), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_its_page(home: Path, tmp_path: Path, error: BaseException) -> None:
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(home / "stopped" / name, tmp_path)
    said: list[str] = []
    with pytest.raises(type(error)), reported(tmp_path, World(torch.device("cpu")), said.append):
        raise error
    assert said == [f"report: {tmp_path / NAME}"]
    assert "stopped early" in (tmp_path / NAME).read_text()


def test_without_matplotlib_a_run_keeps_its_result_and_says_what_is_missing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    shutil.copytree(home / "slow", tmp_path / "run")
    train(home, str(tmp_path / "run"), lr=1e-3, resume=True, max_steps=9)
    extra = "curves need the package matplotlib: pip install 'llama-parity[finetune]'"
    lines = [line for line in capsys.readouterr().out.splitlines() if "package matplotlib" in line]
    assert lines == [f"report: {tmp_path / 'run' / NAME} (without curves: {extra}, then python -m finetune.report "
                     f"{tmp_path / 'run'})"]  # fmt: skip
    shown = (tmp_path / "run" / NAME).read_text()
    assert html.escape(extra, quote=False) in shown and "<svg" not in shown and "<h2>Samples</h2>" in shown
    compare(runs=[str(home / ODD), str(home / "slow")], html=tmp_path / "c.html")
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'c.html'} (without curves: {extra})"
    with pytest.raises(UserError, match="curves need the package matplotlib"):
        compare(runs=[str(home / ODD), str(home / "slow")], html=tmp_path / "c.html", svg=tmp_path / "c.svg")


def test_a_run_without_a_step_has_a_page_without_curves(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "stopped" / "config.json", tmp_path)
    assert "no step was done" in write_report(tmp_path).read_text()


def test_samples_are_kept(home: Path, tmp_path: Path) -> None:
    assert [line["step"] for line in read_metrics(home / "slow" / SAMPLES)] == [4, 8, 8]
    note_sample(tmp_path, 3, "text")
    assert read_metrics(tmp_path / SAMPLES) == [{"step": 3, "sample": "text"}]


def test_two_runs_stand_side_by_side(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(runs=[str(home / ODD), str(home / "slow")], html=tmp_path / "c.html", svg=tmp_path / "c.svg")
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(r"0\.01 +0\.001$", shown["--lr"])
    assert "--seq_len" not in shown and "val_bpb" in shown
    made = (tmp_path / "c.html").read_text()
    assert "<td>0.001</td>" in made and "slow, validation" in made and "<b>&'" not in made
    assert (tmp_path / "c.svg").read_text().startswith("<svg")
    assert with_flags(["a", "b", "--html", "x"]) == ["--runs", "a", "--runs", "b", "--html", "x"]
    with pytest.raises(UserError, match="two folders"):
        compare(runs=["a"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_pages_open_in_a_browser(home: Path, tmp_path: Path) -> None:
    compare(runs=[str(home / ODD), str(home / "stopped")], html=tmp_path / "c.html")
    for path, expected in ((home / ODD / NAME, 'data-state="finished"'), (tmp_path / "c.html", "<h2>Curves</h2>")):
        done = browse(tmp_path, "--dump-dom", path)
        assert expected in done.stdout and "<svg" in done.stdout
        assert "CONSOLE" not in done.stderr
        shot = tmp_path / f"{path.stem}.png"
        browse(tmp_path, f"--screenshot={shot}", path)
        assert shot.stat().st_size > 20_000


def browse(tmp_path: Path, what: str, page: Path) -> SimpleNamespace:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    own = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1600", what, page.as_uri()]
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *flags, *own], capture_output=True, text=True, timeout=120)
    return SimpleNamespace(stdout=done.stdout, stderr=done.stderr)
