"""A signal amid a long step, or a long validation: obeyed between two layers, and nothing is different afterwards."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from finetune import stopping
from finetune.metrics import read_metrics
from finetune.stopping import StopSignals
from nanollama.checkpoint import open_checkpoint
from small_runs import stories_home, stories_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_home(tmp_path_factory.mktemp("stopping"))


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    return stories_run(home, out, "--max_steps 6 --eval_every 3", *flags)


@contextmanager
def signal_at(time: int) -> Iterator[list[int]]:
    """SIGTERM comes as a layer asks for this time; counts how often they ask."""
    asked, ask = [0], StopSignals.stop_where_late

    def counted(signals: StopSignals) -> None:
        asked[0] += 1
        if asked[0] == time:
            os.kill(os.getpid(), signal.SIGTERM)
        ask(signals)

    with patch.object(StopSignals, "stop_where_late", counted), patch.object(stopping, "BEHIND_THE_STEP_S", 0.0):
        yield asked


def told(out: Path) -> list[tuple[int, float | None, float | None]]:
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(home: Path) -> int:
    """How often the layers of a run ask that nothing stops."""
    with signal_at(-1) as asked:
        assert run(home, home / "straight") == 0
    return asked[0]


@pytest.mark.parametrize("share", [0.02, 0.35, 0.47, 0.5, 0.53, 0.8, 1.0])
def test_a_signal_amid_a_step_is_obeyed_between_layers(
    share: float, home: Path, straight: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with signal_at(round(share * straight)):
        assert run(home, out) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM amid what follows step " in capsys.readouterr().err
    assert run(home, out, "--resume") == 0
    assert told(out) == told(home / "straight")
    mine, theirs = (open_checkpoint(folder / "final").weights for folder in (out, home / "straight"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_short_step_is_finished_first(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with signal_at(1), patch.object(stopping, "BEHIND_THE_STEP_S", 60.0):
        assert run(home, tmp_path) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 1, which is saved" in capsys.readouterr().err
