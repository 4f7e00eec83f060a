"""Runs with lean states: bf16 weights resume bit by bit; updates in the backward pass are the usual ones."""

import itertools
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from finetune.metrics import read_metrics
from nanollama.checkpoint import open_checkpoint
from small_runs import stopped_at, stories_home, stories_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_home(tmp_path_factory.mktemp("lean"))


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    """The exit code of a run of 6 steps in this process."""
    return stories_run(home, out, "--max_steps 6 --grad_clip 0", *flags)


def weights(out: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(out / "final").weights
    return {name: opened[name].clone() for name in opened}


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


EIGHT_BIT = ("--optimizer", "adamw8bit")


@pytest.mark.parametrize(
    "flags",
    [
        ("--weights", "bf16"),
        ("--weights", "bf16", "--optimizer_in_backward"),
        EIGHT_BIT,
        ("--weights", "bf16", "--optimizer_in_backward", *EIGHT_BIT, "--activation_checkpointing", "--dropout", "0.1"),
    ],
)
def test_lean_states_resume_bit_by_bit(
    flags: tuple[str, ...], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(home, tmp_path / "straight", *flags) == 0
    with stopped_at(2):
        assert run(home, tmp_path / "stopped", *flags) == 128 + signal.SIGTERM
    assert run(home, tmp_path / "stopped", "--resume") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert same(tmp_path / "stopped", tmp_path / "straight")
    dtype = torch.bfloat16 if "bf16" in flags else torch.float32
    assert {w.dtype for w in weights(tmp_path / "straight").values()} == {dtype}
    [saved] = (tmp_path / "straight" / "checkpoints").iterdir()
    moment = safetensors.torch.load_file(saved / "optimizer.safetensors")["layers.0.feed_forward.w1.weight:exp_avg"]
    assert moment.dtype == (torch.int8 if "adamw8bit" in flags else dtype)
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_updates_in_the_backward_pass_are_the_usual_ones(kind: str, home: Path, tmp_path: Path) -> None:
    assert run(home, tmp_path / "usual", "--weights", kind) == 0
    assert run(home, tmp_path / "backward", "--weights", kind, "--optimizer_in_backward") == 0
    assert losses(tmp_path / "usual") == losses(tmp_path / "backward")
    assert same(tmp_path / "usual", tmp_path / "backward")
    norms = (
        [line.get("grad_norm") for line in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("usual", "backward")
    )
    for a, b in itertools.zip_longest(*norms):
        assert (a is None and b is None) or a == pytest.approx(b, rel=1e-2 if kind == "bf16" else 1e-5)


@pytest.mark.parametrize("flags", [("--grad_clip", "1"), ("--accumulate", "2")])
def test_what_needs_all_gradients_is_refused(
    flags: tuple[str, ...], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "out", "--optimizer_in_backward", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--grad_clip 0" in error
    assert not (tmp_path / "out").exists()


def test_offload_goes_with_checkpointing_and_says_when_there_is_nothing_to_do(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "out", "--offload_activations") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--activation_checkpointing" in error
    assert run(home, tmp_path / "out", "--offload_activations", "--activation_checkpointing") == 0
    assert "activations of a run on the CPU are in its memory already" in capsys.readouterr().out
