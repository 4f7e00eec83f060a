"""A run's folder with wrong files in it: each is refused by name before anything is restored."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.best import Best, write_best
from finetune.config import TrainConfig, resolve, to_json
from finetune.data.packing import Cursor, Packer
from finetune.errors import UserError
from finetune.evaluate import Score
from finetune.optim import make_optimizer
from finetune.restore import check_cursor
from finetune.resume import Progress, RunFolder, resume
from tiny import model as tiny_model

STEP = 3
Break = Callable[[Path], object]


def trained_run(folder: Path, **changes: Any) -> tuple[RunFolder, torch.nn.Module, torch.optim.Optimizer]:
    """A run of three steps, its checkpoint saved."""
    config = resolve(TrainConfig(init="260K", max_steps=10, seq_len=16, batch_size=2, lr=0.01, **changes), "cpu", 1)
    run, model = RunFolder(folder, config), tiny_model().train()
    optimizer = make_optimizer(model, config)
    for _ in range(STEP):
        model(torch.arange(5)[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    run.save(Progress(STEP, 40, Cursor(1, 0, 2)), model, optimizer, "data")
    saved = {"entry": "text", "world_size": 1, **to_json(config)}
    (folder / "config.json").write_text(json.dumps(saved))
    return run, model, optimizer


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / f"step_{STEP:08d}"


def in_state(**changes: Any) -> Break:
    """Keys with dots lead inside; ... takes the key away."""

    def edit(folder: Path) -> None:
        path = checkpoint(folder) / "state.json"
        state = json.loads(path.read_text())
        for key, value in changes.items():
            *inside, last = key.replace("__", ".").split(".")
            target = state
            for part in inside:
                target = target[part]
            if value is ...:
                del target[last]
            else:
                target[last] = value
        path.write_text(json.dumps(state))

    return edit


def in_tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def change(folder: Path) -> None:
        path = checkpoint(folder) / file
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def in_model(edit: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    return in_tensors("model.safetensors", edit)


def in_moments(edit: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    return in_tensors("optimizer.safetensors", edit)


def first(tensors: dict[str, torch.Tensor], name: str) -> None:
    """One number in place of all, which would be repeated."""
    tensors[name] = tensors[name][:1].clone()


def state_text(text: str) -> Break:
    return lambda folder: (checkpoint(folder) / "state.json").write_text(text)


NORM, MOMENT = "norm.weight", "norm.weight:exp_avg"
SCALAR = f"{NORM}:step"


def scalar(value: Any) -> Break:
    def edit(folder: Path) -> None:
        path = checkpoint(folder) / "state.json"
        state = json.loads(path.read_text())
        state["optimizer"][SCALAR] = value
        path.write_text(json.dumps(state))

    return edit


BROKEN: dict[str, tuple[Break, str]] = {
    "state a list": (state_text("[]"), "holds a JSON list"),
    "state empty": (state_text(""), "is empty"),
    "state deep": (state_text('{"a":' * 100_000), "nested more than"),
    "state rather deep": (state_text('{"a":' * 40 + "1" + "}" * 40), "nested more than"),
    "state a number of 400 digits": (state_text('{"a": ' + "9" * 400 + "}"), "64 bits"),
    "state with a key twice": (state_text('{"a": 1, "a": 2}'), "stands there twice"),
    "state a pipe": (lambda f: pipe(checkpoint(f) / "state.json"), "is a pipe"),
    "no schema": (in_state(schema=...), "has schema None"),
    "no progress": (in_state(progress=...), "lacks the key 'progress'"),
    "no data": (in_state(data=...), "lacks the key 'data'"),
    "no optimizer": (in_state(optimizer=...), "lacks the key 'optimizer'"),
    "no config": (in_state(config=...), "lacks the key 'config'"),
    "no cursor": (in_state(progress__cursor=...), "lacks the key 'cursor'"),
    "progress a list": (in_state(progress=[]), "progress is []"),
    "optimizer a list": (in_state(optimizer=[]), "optimizer is []"),
    "step a text": (in_state(progress__step="3"), "step is '3'"),
    "step of 2.5": (in_state(progress__step=2.5), "step is 2.5"),
    "step true": (in_state(progress__step=True), "step is True"),
    "step negative": (in_state(progress__step=-1), "step is -1"),
    "step beyond the run": (in_state(progress__step=11), "expected 0 to 10"),
    "step of another folder": (in_state(progress__step=4), "its folder is step_00000003"),
    "tokens of 2^63": (in_state(progress__tokens=2**63 - 1), "tokens is"),
    "cursor negative": (in_state(progress__cursor__row=-5), "row is -5"),
    "cursor a text": (in_state(progress__cursor__window="0"), "window is '0'"),
    "epoch of 2^70": (in_state(progress__cursor__epoch=2**70), "64 bits"),
    "epoch of 2^60": (in_state(progress__cursor__epoch=2**60), "epoch is"),
    "another dropout": (in_state(config__dropout=0.5), "was written with dropout 0.5"),
    "config of a text for a number": (in_state(config__lr="0.01"), "lr is '0.01'"),
    "optimizer step a text": (scalar("3"), "is '3'"),
    "optimizer step of 2.5": (scalar(2.5), "is 2.5"),
    "optimizer step beyond": (scalar(99), "is 99"),
    "weights of a broadcastable shape": (in_model(lambda t: first(t, NORM)), "[1]"),
    "weights of a wrong shape": (in_model(lambda t: t.update({NORM: torch.ones(3)})), "[3]"),
    "weights a scalar": (in_model(lambda t: t.update({NORM: torch.ones(())})), "F32 []"),
    "weights of integers": (in_model(lambda t: t.update({NORM: t[NORM].long()})), "is I64"),
    "weights in bf16": (in_model(lambda t: t.update({NORM: t[NORM].bfloat16()})), "is BF16"),
    "a weight missing": (in_model(lambda t: t.pop(NORM)), "lacks norm.weight"),
    "a weight too many": (in_model(lambda t: t.update({"x": torch.ones(1)})), "holds 'x'"),
    "one moment missing": (in_moments(lambda t: t.pop(MOMENT)), f"lacks {MOMENT}"),
    "a moment of a broadcastable shape": (in_moments(lambda t: first(t, MOMENT)), "[1]"),
    "a moment of integers": (in_moments(lambda t: t.update({MOMENT: t[MOMENT].int()})), "is I32"),
    "a moment of an unknown state": (in_moments(lambda t: t.update({f"{NORM}:x": torch.ones(1)})), "holds"),
    "optimizer state empty": (lambda f: (checkpoint(f) / "optimizer.safetensors").write_bytes(b""), "cannot be read"),
    "weights a pipe": (lambda f: pipe(checkpoint(f) / "model.safetensors"), "is a pipe"),
}  # fmt: skip


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, torch.nn.Module, torch.optim.Optimizer]:
    return trained_run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_of_a_run_is_refused_by_name(
    tmp_path: Path, kind: str, whole: tuple[RunFolder, torch.nn.Module, torch.optim.Optimizer]
) -> None:
    run, model, optimizer = whole
    shutil.copytree(run.path, tmp_path, dirs_exist_ok=True)
    run = replace(run, path=tmp_path)
    broken, part = BROKEN[kind]
    broken(tmp_path)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError) as refusal:
        run.restore_(model, optimizer, "data")
    said = str(refusal.value)
    assert part in said and "\n" not in said and len(said) < 900 and "only checkpoint" in said
    assert str(checkpoint(tmp_path)) in said
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw8bit"}, {"weights": "bf16"}], ids=str)
def test_a_whole_checkpoint_is_restored(tmp_path: Path, changes: dict[str, Any]) -> None:
    run, model, _ = trained_run(tmp_path, **changes)
    other = tiny_model(seed=1).train()
    progress = run.restore_(other, make_optimizer(other, run.config), "data")
    assert progress == Progress(STEP, 40, Cursor(1, 0, 2))
    theirs = dict(other.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())


def test_a_run_without_steps_is_restored(tmp_path: Path) -> None:
    run, _, _ = trained_run(tmp_path / "other")
    fresh, model = replace(run, path=tmp_path), tiny_model()
    optimizer = make_optimizer(model, run.config)
    fresh.save(Progress(), model, optimizer, "data")
    assert fresh.restore_(model, optimizer, "data") == Progress()


def test_the_checkpoint_before_a_broken_one_is_offered_and_kept(tmp_path: Path) -> None:
    run, model, optimizer = trained_run(tmp_path)
    older = tmp_path / "checkpoints" / "step_00000001"
    older.mkdir()
    for file in checkpoint(tmp_path).iterdir():
        (older / file.name).write_bytes(file.read_bytes())
    (checkpoint(tmp_path) / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"remove .*step_00000003 to continue from step_00000001"):
        run.restore_(model, optimizer, "data")
    assert (older / "state.json").exists()


def test_a_save_that_ends_late_leaves_the_newer_best(tmp_path: Path) -> None:
    """Behind the back of training, the checkpoint of step 3 ends while the best of step 5 is written, or is there."""
    run, model, optimizer = trained_run(tmp_path)
    score = Score(loss=1.0, bpb=0.1)
    for step in (1, 3, 5):
        write_best(tmp_path, step, model)
    half = tmp_path / "best" / ".step_00000007.partial"
    half.mkdir()
    run.finisher(Progress(4, best=Best(3, score)), model, optimizer, "data")()
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"step_00000003", "step_00000005", half.name}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "holds a JSON list"),
        ('{"a":' * 100_000, "nested more than"),
        ("{}", "lacks the key 'entry'"),
        ('{"entry": 3}', "entry is 3"),
        ('{"entry": "text"}', "lacks the key 'world_size'"),
        ('{"entry": "text", "world_size": "2"}', "world_size is '2'"),
        ('{"entry": "text", "world_size": 1, "lr": "x"}', "lr is 'x'"),
        ('{"entry": "text", "world_size": 1, "threads": -1}', "--threads -1"),
        ('{"entry": "text", "world_size": 1, "threads": 1.5}', "threads is 1.5"),
        ('{"entry": "text", "world_size": 1, "seq_len": 1000000000000}', "--seq_len 1000000000000"),
        ('{"entry": "text", "world_size": 1, "method": "magic"}', "method is 'magic'"),
        ('{"entry": "text", "world_size": 1, "lr": 1e999}', "beyond 64 bits"),
        ('{"entry": "text", "world_size": 1, "ghost": 1}', "unknown key ghost"),
        (f'{{"entry": "text", "world_size": 1, "{"g" * 70_000}": 1}}', "unknown key " + "g" * 60 + ":"),
    ],
)
def test_a_broken_config_of_a_run_is_refused_by_name(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as refusal:
        resume("text", TrainConfig(out=str(tmp_path), resume=True), TrainConfig())
    said = str(refusal.value)
    assert part in said and "\n" not in said and len(said) < 700


class Documents:
    """Two hundred documents of four tokens."""

    lengths, bos_id = np.full(200, 4), 1


@pytest.mark.parametrize("cursor", [Cursor(0, 0, 10**6), Cursor(0, 10**9, 0), Cursor(0, 10**9, 5)])
def test_a_cursor_that_the_data_do_not_have_is_refused(cursor: Cursor) -> None:
    packer = Packer(Documents(), 16)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no place in these data"):
        check_cursor(packer, cursor)


def test_every_cursor_of_an_epoch_is_a_place() -> None:
    packer, cursor = Packer(Documents(), 16), Cursor()  # type: ignore[arg-type]
    while cursor.epoch < 2:
        check_cursor(packer, cursor)
        _, cursor = packer.take(cursor, 1)


def test_resuming_a_folder_of_a_stranger_ends_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    line = [sys.executable, "-m", "finetune.text", "--resume", "--out", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: {tmp_path}/config.json: is a pipe and not a file: it is not read; put the file there\n"
    )
