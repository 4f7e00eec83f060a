"""Whole LoRA runs through the command line: resumed bit by bit, an adapter picked up again, refusals in one line."""

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from finetune.closing import base_name
from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from finetune.text import ENTRY
from nanollama.__main__ import COMMANDS
from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.adapter import CONFIG, TENSORS
from nanollama.cli import run as run_command
from small_runs import base, exit_code, stopped_at, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories, and a base with its tokenizer."""
    folder, texts = tmp_path_factory.mktemp("lora"), stories(40)
    (folder / "stories.txt").write_text("<|endoftext|>".join(texts))
    base(folder / "base", tokenizer(folder, texts), 128)
    return folder


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    """The exit code of a run of 8 steps with dropout, in this process."""
    line = ["--data", str(home / "stories.txt"), "--ckpt", str(home / "base"), "--cache", str(home / "cache")]
    small = "--method lora --seq_len 64 --batch_size 2 --max_steps 8 --lr 0.01 --lora_dropout 0.1 --threads 1"
    argv = [*line, *small.split(), "--out", str(out), *flags]
    return exit_code(ENTRY, *argv)


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    assert run(home, home / "straight") == 0
    return home / "straight"


@pytest.fixture(scope="module")
def straight_dora(home: Path) -> Path:
    assert run(home, home / "dora", "--dora") == 0
    return home / "dora"


KINDS = [("straight", [], {".lora_A", ".lora_B"})]
KINDS += [("straight_dora", ["--dora"], {".lora_A", ".lora_B", ".lora_magnitude"})]


@pytest.mark.parametrize(("kind", "flags", "parts"), KINDS)
def test_an_interrupted_run_resumes_bit_by_bit(
    home: Path, kind: str, flags: list[str], parts: set[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out, straight = tmp_path / "stopped", request.getfixturevalue(kind)
    with stopped_at(3):
        assert run(home, out, *flags) == 128 + signal.SIGTERM
    [saved] = (out / "checkpoints").iterdir()
    names = set(safetensors.torch.load_file(saved / "model.safetensors"))
    assert {f".{name.rpartition('.')[2]}" for name in names} == parts
    states = {name.partition(":")[0] for name in safetensors.torch.load_file(saved / "optimizer.safetensors")}
    assert states == names
    assert run(home, out, "--resume") == 0
    losses = [[e["loss"] for e in read_metrics(o / "metrics.jsonl") if "loss" in e] for o in (out, straight)]
    assert losses[0] == losses[1]
    mine, theirs = (safetensors.torch.load_file(o / "adapter" / TENSORS) for o in (out, straight))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    merged = [open_checkpoint(o / "final").weights for o in (out, straight)]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[1])


@pytest.mark.parametrize("kind", ["straight", "straight_dora"])
def test_an_adapter_is_picked_up_again(home: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    straight = request.getfixturevalue(kind)
    adapter = str(straight / "adapter")
    assert run(home, tmp_path / "on", "--adapter", adapter, "--lr", "1e-12") == 0
    before, after = (safetensors.torch.load_file(o / "adapter" / TENSORS) for o in (straight, tmp_path / "on"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_an_adapter_names_its_base_by_a_path_that_holds_from_anywhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert run(Path("."), tmp_path / "out", "--max_steps", "1") == 0
    said = json.loads((tmp_path / "out" / "adapter" / CONFIG).read_text())
    assert said["base_model_name_or_path"] == str((home / "base").resolve())
    assert base_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def generated(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as caught:
        run_command(COMMANDS, ["generate", "--prompt", "Once", "--max_new_tokens", "12", "--json", *flags])
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


def test_generate_with_the_adapter_says_what_the_merged_model_says(
    home: Path, straight: Path, straight_dora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = str(home / "base"), str(straight / "adapter")
    texts = []
    ways = [["--ckpt", base, "--adapter", adapter], ["--ckpt", str(straight / "final")], ["--ckpt", base]]
    dora = straight_dora
    ways += [["--ckpt", base, "--adapter", str(dora / "adapter")], ["--ckpt", str(dora / "final")]]
    for flags in ways:
        code, out, err = generated(capsys, *flags)
        assert code == 0, err
        texts.append(json.loads(out)["answers"][0]["tokens"])
    assert texts[0] == texts[1] != texts[2] != texts[3] == texts[4]


def test_a_folder_that_is_no_adapter_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = generated(capsys, "--ckpt", str(home / "base"), "--adapter", str(home / "base"))
    assert code == 2
    assert err.count("\n") == 1
    assert "is a whole checkpoint (it holds no adapter_config.json): open it with --ckpt" in err


def test_the_folder_of_a_run_names_the_adapter_in_it(
    home: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = generated(capsys, "--ckpt", str(home / "base"), "--adapter", str(straight))
    assert code == 2
    assert err == f"error: {straight}: is no adapter, but {straight / 'adapter'} is: give that folder\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora_targets w9", "lora target w9: expected all, attention"),
        ("--lora_targets output", "the head is tied"),
        ("--lora_targets ,", "--lora_targets names no matrix"),
        ("--lora_rank 0", "--lora_rank 0: expected at least 1"),
        ("--lora_dropout 1", "--lora_dropout 1.0: expected at least 0 and less than 1"),
        ("--adapter nowhere", "nowhere: does not exist: expected the folder of an adapter"),
        ("--method full --adapter nowhere", "--adapter goes with --method lora or qlora, not full"),
        ("--adapter ADAPTER --lora_rank 4", "--adapter ADAPTER has rank 8"),
        ("--adapter ADAPTER --dora", "--adapter ADAPTER is no DoRA: drop --dora"),
        ("--method full --dora", "--dora goes with --method lora or qlora, not full"),
    ],
)
def test_unusable_flags_are_one_line(
    home: Path, straight: Path, tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(straight / "adapter")
    assert run(home, tmp_path / "out", *flags.replace("ADAPTER", adapter).split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message.replace("ADAPTER", adapter) in said
    assert not (tmp_path / "out").exists()
