"""Whole runs through the command line, in processes of their own: killed, interrupted, out of disk, refused."""

import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from finetune.run import run_entry
from finetune.text import ENTRY
from nanollama.checkpoint import open_checkpoint
from nanollama.generation.llama import Llama, Sampling

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 stories, a shape, and a cache that the runs share."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories(60)))
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    return folder


def line(home: Path, out: Path, *flags: str) -> list[str]:
    """Arguments of a run of 20 steps with dropout, so that the random numbers count too."""
    data = ["--data", str(home / "stories.txt"), "--init", str(home / "shape.json"), "--cache", str(home / "cache")]
    small = "--vocab_size 300 --seq_len 128 --batch_size 2 --max_steps 20 --save_every 4 --eval_every 10 --threads 1"
    return [*data, *small.split(), "--lr", "0.01", "--dropout", "0.1", "--out", str(out), *flags]


def child(argv: list[str], log: Path, environment: dict[str, str], file_limit_bytes: int) -> None:
    """The process of a run: its output goes to `log`, a full disk is a limit on the size of files."""
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))
    sys.argv = ["text", *argv]
    run_entry(ENTRY)


@pytest.fixture(scope="module")
def start() -> Start:
    """`start(argv, log)`: a run in a new process, forked from one that has torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.text"])

    def begin(argv: list[str], log: Path, file_limit_bytes: int = 0, **environment: str) -> BaseProcess:
        process = context.Process(target=child, args=(argv, log, environment, file_limit_bytes))
        process.start()
        return process

    return begin


def finished(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def steps_done(out: Path) -> int:
    return max((entry["step"] for entry in read_metrics(out / "metrics.jsonl")), default=0)


def wait_for_step(process: BaseProcess, out: Path, step: int) -> None:
    while process.is_alive() and steps_done(out) < step:
        time.sleep(0.002)
    assert process.is_alive(), "the run ended before it could be stopped"


def numbers(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what differs from run to run."""
    drop = {"tokens_per_s", "peak_bytes"}
    return [{k: v for k, v in entry.items() if k not in drop} for entry in read_metrics(out / "metrics.jsonl")]


def assert_same_run(out: Path, other: Path) -> None:
    """Every loss and every final weight, bit by bit."""
    assert numbers(out) == numbers(other)
    mine, theirs = open_checkpoint(out / "final").weights, open_checkpoint(other / "final").weights
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.fixture(scope="module")
def straight(home: Path, start: Start) -> Path:
    """A run without interruption."""
    out = home / "straight"
    process = start(line(home, out, "--export", "hf", "--sample_every", "15"), home / "straight.log")
    assert finished(process) == 0, (home / "straight.log").read_text()
    return out


def test_a_run_leaves_its_curves_and_a_model_that_opens_and_generates(straight: Path) -> None:
    steps = [entry for entry in read_metrics(straight / "metrics.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 21))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_bytes"}
    assert all(entry.keys() == keys for entry in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    checks = [entry for entry in read_metrics(straight / "metrics.jsonl") if "val_loss" in entry]
    assert [(e["step"], e.keys()) for e in checks] == [(s, {"step", "val_loss", "val_bpb"}) for s in (0, 10, 20)]
    assert "<svg" in (straight / "report.html").read_text()
    meta, hf = open_checkpoint(straight / "final"), open_checkpoint(straight / "final-hf")
    assert all(torch.equal(meta.weights[name], hf.weights[name]) for name in meta.weights)
    events = list(Llama.load(straight / "final").generate(["Once"], Sampling(max_new_tokens=5)))
    assert 1 <= len(events) <= 5


def test_a_run_says_its_data_and_what_to_type_next(straight: Path) -> None:
    said = (straight.parent / "straight.log").read_text()
    for part in (
        "data: stories: 57 documents",
        "documents are longer than --seq_len 128: cut in pieces, each with its BOS",
        "step 15: Once upon a time",
        "a bigram model fitted on the training text:",
        f"python -m nanollama generate --ckpt {straight / 'final'}",
        f"python -m parity.check --ckpt {straight / 'final'}",
    ):
        assert part in said


def test_three_kills_and_resumes_equal_the_straight_run(home: Path, start: Start, straight: Path) -> None:
    out, log = home / "killed", home / "killed.log"
    flags = line(home, out, "--export", "hf", "--sample_every", "15")
    for step in (2, 7, 13):
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = start([*flags, *resume], log)
        wait_for_step(process, out, step)
        process.kill()
        assert finished(process) == -signal.SIGKILL
    assert finished(start([*flags, "--resume"], log)) == 0, log.read_text()
    assert_same_run(out, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop_and_the_printed_command_resumes(
    home: Path, start: Start, straight: Path, number: signal.Signals
) -> None:
    out, log = home / number.name, home / f"{number.name}.log"
    process = start(line(home, out, "--save_every", "100"), log)
    wait_for_step(process, out, 3)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finished(process) == 128 + number
    step = steps_done(out)
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert f"stopped by {number.name} after step {step}, which is saved" in log.read_text()
    assert f"--out {out} --resume" in log.read_text()
    assert finished(start(["--out", str(out), "--resume", "--cache", str(home / "cache")], log)) == 0, log.read_text()
    assert_same_run(out, straight)


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(home: Path, start: Start, straight: Path) -> None:
    out, log = home / "full", home / "full.log"
    process = start(line(home, out), log)
    wait_for_step(process, out, 5)
    process.kill()
    process.join()
    good = list((out / "checkpoints").glob("*/state.json"))
    log.write_text("")
    assert finished(start(line(home, out, "--resume"), log, file_limit_bytes=30_000)) == 1
    [complaint] = [text for text in log.read_text().splitlines() if text.startswith("error: ")]
    assert "File too large" in complaint
    assert f"the last good checkpoint is {good[-1].parent}: make room" in complaint
    assert "Traceback" not in log.read_text()
    assert list((out / "checkpoints").glob("*/state.json")) == good
    assert finished(start(line(home, out, "--resume"), log)) == 0, log.read_text()
    assert_same_run(out, straight)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_documents(home: Path, start: Start) -> None:
    out, log = home / "diverged", home / "diverged.log"
    assert finished(start(line(home, out, "--lr", "1e30", "--warmup_steps", "0"), log)) == 1
    [complaint] = [text for text in log.read_text().splitlines() if "the batch holds documents [" in text]
    step = int(complaint.removeprefix("step ").partition(":")[0])
    assert "the state before the step is saved" in complaint
    [state] = (out / "checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["progress"]["step"] == step - 1
    assert steps_done(out) == step - 1


def test_two_ranks_train_as_one_process_that_accumulates(home: Path, start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    outs = [home / "ranks", home / "alone"]
    short = ["--dropout", "0", "--max_steps", "6"]
    ranks = [start(line(home, outs[0], *short), home / f"rank{r}.log", RANK=str(r), **address) for r in (0, 1)]
    assert [finished(process) for process in ranks] == [0, 0], (home / "rank0.log").read_text()
    assert (home / "rank1.log").read_text() == ""
    assert finished(start(line(home, outs[1], *short, "--accumulate", "2"), home / "alone.log")) == 0
    for together, alone in zip(*map(numbers, outs), strict=True):
        assert together == pytest.approx(alone, rel=1e-5)


def test_a_run_starts_from_a_checkpoint_and_leaves_it_alone(home: Path, start: Start, straight: Path) -> None:
    before = {path: path.read_bytes() for path in (straight / "final").iterdir()}
    out, log = home / "from", home / "from.log"
    flags = ["--data", str(home / "stories.txt"), "--cache", str(home / "cache"), "--ckpt", str(straight / "final")]
    flags += [
        "--seq_len",
        "128",
        "--batch_size",
        "2",
        "--max_steps",
        "4",
        "--threads",
        "1",
        "--method",
        "no_embeddings",
    ]
    assert finished(start([*flags, "--out", str(out)], log)) == 0, log.read_text()
    assert {path: path.read_bytes() for path in (straight / "final").iterdir()} == before
    first = next(entry["loss"] for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry)
    assert first == pytest.approx(json.loads((straight / "summary.json").read_text())["val_loss"], rel=0.15)
    old, new = (open_checkpoint(folder / "final").weights for folder in (straight, out))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == old.keys() - {"tok_embeddings.weight"}


def complaint(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command line gets."""
    monkeypatch.setattr(sys, "argv", ["text", *argv])
    with pytest.raises(SystemExit) as caught:
        run_entry(ENTRY)
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    lines = said.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "holds a run already: add --resume to continue it, or choose another folder"),
        (["--resume", "--seed", "3"], "--resume continues a run with --seed 0, not 3"),
        (["--resume", "--batch_size", "4"], "--resume continues a run with --batch_size 2, not 4"),
        (["--resume", "--max_steps", "10"], "--max_steps 10: the run has done 20 steps already"),
        (["--resume", "--data", "other.txt"], "--resume continues a run with --data"),
    ],
)
def test_a_folder_with_a_run_is_never_overwritten(
    home: Path,
    straight: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(straight)
    assert message in complaint(line(home, straight, *flags), monkeypatch, capsys)
    assert snapshot(straight) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data DIR/none.txt", "none.txt: no such file or folder"),
        ("--data auto", "--data is missing"),
        ("--data DIR/empty.txt", "empty.txt: the file is empty"),
        ("--data DIR/latin.txt", "latin.txt: not UTF-8 at byte 3"),
        ("--init 1B", "--init 1B: expected one of 260K, 15M, 42M, 110M or a .json file"),
        ("--init DIR/none.json", "none.json: no such file"),
        ("--init DIR/bad.json", "unknown key colour"),
        ("--ckpt DIR", "--ckpt and --init together"),
        ("--vocab_size 100", "--vocab_size 100: expected at least 260"),
        ("--tokenizer DIR/none.model --vocab_size 0", "none.model: does not exist"),
        ("--tokenizer DIR/none.model", "--vocab_size trains a tokenizer, but --tokenizer names one"),
        ("--seq_len 1", "--seq_len 1: expected at least 2"),
        ("--lr -1", "--lr -1.0: expected at least 0"),
        ("--lr nan", "--lr nan: expected at least 0"),
        ("--dropout 1", "--dropout 1.0: expected less than 1"),
        ("--device tpu", "--device tpu: expected cpu, cuda or mps"),
        ("--method lorra", "--method: expected one of full, norms, no_embeddings"),
        ("--resume", "holds no run to resume"),
    ],
)
def test_unusable_flags_are_one_line(
    home: Path,
    tmp_path: Path,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**SHAPE, "colour": 1}))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    argv = line(home, tmp_path / "out", *flags.replace("DIR", str(tmp_path)).split())
    assert message in complaint(argv, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(
    home: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    said = complaint(line(home, tmp_path / "out", f"--{package}"), monkeypatch, capsys)
    assert f"pip install 'llama-parity[{package}]'" in said
    assert not (tmp_path / "out").exists()


def test_an_out_that_holds_something_else_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty (it holds thesis.tex)" in complaint(line(home, tmp_path), monkeypatch, capsys)
    assert snapshot(tmp_path) == {tmp_path / "thesis.tex": b"years of work"}


def test_data_that_changed_since_the_save_is_refused(
    home: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "copy", tmp_path / "stories.txt"
    shutil.copytree(straight, out)
    data.write_text("<|endoftext|>".join(stories(60, seed=9)))
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "data": str(data)}))
    argv = ["--out", str(out), "--resume", "--cache", str(tmp_path / "cache")]
    assert "the data or its tokenizer has changed since" in complaint(argv, monkeypatch, capsys)
