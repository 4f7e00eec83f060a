"""The doctor: twelve planted ills, each named in one line; six healthy runs, of which it says nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch

import patients
from finetune.doctor import machine
from finetune.doctor.examine import examine, lines
from finetune.doctor.page import page
from finetune.doctor.picture import Piece, in_html, in_terminal, pieces_of
from finetune.doctor.rate import find_rate


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patients.home(tmp_path_factory.mktemp("doctor"))


@pytest.mark.parametrize("ill", patients.ILLS)
def test_a_planted_ill_is_named_in_one_line(home: Path, tmp_path: Path, ill: str) -> None:
    [finding] = examine(patients.ILLS[ill](home, tmp_path))
    assert finding.ill == ill
    [line] = lines([finding])
    assert "\n" not in line and len(line) > 60


@pytest.mark.parametrize("name", patients.HEALTHY)
def test_a_healthy_run_is_left_in_peace(home: Path, tmp_path: Path, name: str) -> None:
    assert lines(examine(patients.HEALTHY[name](home, tmp_path))) == []


@pytest.mark.parametrize("ill", patients.QUICK_ILLS)
def test_an_ill_of_the_text_is_named_before_a_run(home: Path, tmp_path: Path, ill: str) -> None:
    found = examine(patients.QUICK_ILLS[ill](home, tmp_path))
    assert [finding.ill for finding in found if finding.ill != "wrong tokenizer"] == [ill]  # such text is unlike any
    assert "\n" not in lines(found)[0]


@pytest.mark.parametrize("name", patients.ODD)
def test_an_odd_run_that_is_right_is_left_in_peace(home: Path, tmp_path: Path, name: str) -> None:
    assert [f.ill for f in examine(patients.ODD[name](home, tmp_path)) if f.ill != "wrong tokenizer"] == []


@pytest.mark.parametrize(
    "ill", ["wrong template", "doubled BOS", "duplicated validation", "all masked", "truncated documents"]
)
def test_the_quick_look_before_a_run_sees_the_ills_of_data(home: Path, tmp_path: Path, ill: str) -> None:
    patient = patients.ILLS[ill](home, tmp_path)
    patient.thorough = False
    assert [finding.ill for finding in examine(patient)] == [ill]


def test_the_model_and_the_random_numbers_are_as_before(home: Path, tmp_path: Path) -> None:
    patient = patients.HEALTHY["an adapter"](home, tmp_path)
    before = {name: weight.clone() for name, weight in patient.model.state_dict().items()}
    state = torch.get_rng_state()
    examine(patient)
    find_rate(patient)
    assert all(torch.equal(weight, before[name]) for name, weight in patient.model.state_dict().items())
    assert all(parameter.grad is None for parameter in patient.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rate_that_changes_nothing_is_named(home: Path, tmp_path: Path) -> None:
    patient = patients.patient(home, tmp_path, method="lora", lr=1e-6, max_steps=40)
    [finding] = examine(patient)
    assert finding.ill == "rate too low"
    assert "40 steps would change nothing" in finding.line


def test_rows_that_are_mostly_padding_are_named(home: Path, tmp_path: Path) -> None:
    findings = examine(patients.patient(home, tmp_path, "chat", data=str(few(home)), seq_len=512, max_steps=40))
    assert [finding.ill for finding in findings] == ["padding", "duplicated validation"]


def few(home: Path) -> Path:
    """Two dialogues: less than half of a long row."""
    path = home / "few.jsonl"
    path.write_text("".join(json.dumps(patients.dialog(i)) + "\n" for i in range(2)))
    return path


def test_the_range_test_suggests_a_rate_that_learns(home: Path, tmp_path: Path) -> None:
    tried, suggested = find_rate(patients.HEALTHY["all parameters"](home, tmp_path))
    rates = [trial.rate for trial in tried]
    assert rates == sorted(rates) and rates[0] < suggested < rates[-1]
    assert 1e-3 < suggested < 5e-2
    assert tried[-1].last > min(trial.last for trial in tried)


def test_a_dtype_that_the_machine_emulates_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = patients.patient(home, tmp_path, dtype="bf16")
    for emulates, expected in ((True, ["emulated dtype"]), (False, [])):
        monkeypatch.setattr(machine, "emulates_bf16", lambda device, answer=emulates: answer)
        assert [finding.ill for finding in machine.check_dtype(patient)] == expected


def test_more_memory_than_there_is_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 10**6)
    [finding] = machine.check_memory(patients.patient(home, tmp_path))
    assert finding.ill == "memory" and "--activation_checkpointing" in finding.line


def test_the_first_dialogue_shows_what_is_learned(home: Path, tmp_path: Path) -> None:
    pieces = pieces_of(patients.HEALTHY["dialogues"](home, tmp_path))
    ask, answer = (message["content"] for message in patients.dialog(0)["messages"])
    plain = in_terminal(pieces, colour=False)
    assert plain.startswith("<s>") and f"[INST] {ask} [/INST]" in plain.replace("\u2581", " ")
    assert f"{answer}</s>⟧" in plain
    assert "\033[32m" in in_terminal(pieces, colour=True)
    assert f'<span class="learned">{answer[:10]}'.replace(" ", "") in in_html(pieces).replace(" ", "")


def test_text_of_a_stranger_is_shown_and_not_obeyed() -> None:
    pieces = [Piece("<script>alert(1)</script>\033[2J", True, False)]
    assert "\033[2J" not in in_terminal(pieces, colour=True)
    made = page([], ["<b>"], pieces)
    assert "<script>" not in made and "&lt;script&gt;" in made and "<li><b></li>" not in made


def test_the_command_takes_the_flags_of_training(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.doctor.__main__ import ENTRIES, command
    from nanollama.cli import execute

    monkeypatch.chdir(tmp_path)
    line = f"text --data {home / 'stories.txt'} --ckpt {home / 'own'} --cache {home / 'cache'} --seq_len 128"
    flags = ["--batch_size", "4", "--max_steps", "80", "--threads", "1", "--html", "d.html"]
    commands = {entry.name: command(entry) for entry in ENTRIES}
    assert execute(commands, [*line.split(), *flags, "--lr", "1e-3", "--find_lr"], prog="doctor") == 0
    shown = capsys.readouterr().out
    assert "doctor: nothing found" in shown and "suggested: --lr" in shown and "loss before the first step" in shown
    assert execute(commands, [*line.split(), *flags, "--lr", "0.1"], prog="doctor") == 1
    assert "doctor: rate too high: at --lr 0.1" in capsys.readouterr().out
    assert "rate too high" in (tmp_path / "d.html").read_text()
    rows = [patients.dialog(i, prompt_chars=60)["messages"] for i in range(60)]
    pairs = [{"prompt": ask["content"], "chosen": said["content"], "rejected": "No."} for ask, said in rows]
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    line = f"preference --data {home / 'pairs.jsonl'} --cache {home / 'cache'} --seq_len 256 --threads 1 --ckpt {home}"
    assert execute(commands, f"{line}/own".split(), prog="doctor") == 0
    assert execute(commands, f"{line}/two-bos".split(), prog="doctor") == 1
    assert "doctor: doubled BOS: " in capsys.readouterr().out
    assert execute(commands, f"{line}/own --find_lr".split(), prog="doctor") == 2
    assert sys.argv and sorted(path.name for path in tmp_path.iterdir()) == ["d.html"]
