"""Run folders of strangers that are only looked at: a report, a comparison; each is made, or refused in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.compare import compare
from finetune.errors import UserError
from finetune.report import write_report

Break = Callable[[Path], object]


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_steps": 2, "device": "cpu", "threads": 1, "lr": 0.1}))
    lines = [{"step": 1, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 9.0, "peak_bytes": 41_000}]
    lines += [{"step": 1, "val_loss": 2.0, "val_bpb": 1.4}, {"step": 1, "changed": {"lr": [0.1, 0.2]}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "sample": "once"}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"verdict": "learned", "val_loss": 2.0, "val_bpb": 1.4}))
    (folder / "environment.json").write_text(json.dumps({"torch": "2"}))
    content = {"findings": [{"ill": "a", "line": "b"}], "facts": ["c"],
               "first": [{"text": "d", "learned": True, "special": False}]}  # fmt: skip
    (folder / "doctor.json").write_text(json.dumps(content))
    return folder


def put(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def a_pipe(name: str) -> Break:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return edit


FILES = ("config.json", "environment.json", "doctor.json")
REFUSED: dict[str, tuple[Break, str]] = {
    **{f"{name} a list": (put(name, "[]"), "holds a JSON list") for name in FILES},
    **{f"{name} deep": (put(name, '{"a":' * 100_000), "nested more than") for name in FILES},
    **{
        f"{name} a pipe": (a_pipe(name), "is a pipe")
        for name in (*FILES, "summary.json", "metrics.jsonl", "samples.jsonl")
    },
    "a config of other types": (put("config.json", '{"max_steps": "x", "threads": {}}'), "max_steps is 'x'"),
    "metrics a list": (put("metrics.jsonl", "[1]\n"), "line 1: is not as a run wrote it"),
    "metrics without a step": (put("metrics.jsonl", '{"loss": 1.0}\n'), "line 1: is not as a run wrote it"),
    "a step of 2^60": (put("metrics.jsonl", '{"step": 1152921504606846976}\n'), "is not as a run wrote it"),
    "a loss that is a text": (put("metrics.jsonl", '{"step": 1, "loss": "<script>"}\n'), "is not as a run wrote it"),
    "a loss that is a list": (put("metrics.jsonl", '{"step": 1, "loss": []}\n'), "is not as a run wrote it"),
    "a loss of 10^400": (put("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n"), "is not as a run"),
    "a summary that is a list": (put("summary.json", "[]"), "is not as a run wrote it"),
    "a summary that is deep": (put("summary.json", '{"a":' * 100_000), "not JSON"),
    "a score that is a list": (put("summary.json", '{"val_loss": []}'), "is not as a run wrote it"),
    "a doctor without facts": (put("doctor.json", "{}"), "is not as the doctor wrote it"),
    "a doctor's other keys": (put("doctor.json", '{"facts": [], "findings": [{"x": 1}], "first": []}'), "doctor wrote"),
}
SHOWN: dict[str, Break] = {
    "as it is": lambda folder: None,
    "a score that is none": put("summary.json", '{"val_loss": NaN, "val_bpb": Infinity}'),
    "metrics deep": put("metrics.jsonl", "[" * 100_000),
    "metrics cut short": put("metrics.jsonl", '{"step": 1, "loss": 2.5}\n{"step'),
    "metrics not UTF-8": lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n"),
    "a loss that is none": put("metrics.jsonl", '{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n'),
    "a loss that is infinite": put("metrics.jsonl", '{"step": 1, "loss": Infinity}\n{"step": 2, "loss": -Infinity}\n'),
    "a validation without its other score": put("metrics.jsonl", '{"step": 1, "val_loss": 1.0}\n'),
    "a sample without its text": put("samples.jsonl", '{"step": 1}\n'),
    "a config of few keys": put("config.json", '{"max_steps": 1}'),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_run_folder_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder, (edit, part) = run_folder(tmp_path / "run"), REFUSED[kind]
    edit(folder)
    with pytest.raises(UserError, match=part) as refused:
        write_report(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 900


@pytest.mark.parametrize("kind", SHOWN)
def test_what_can_be_shown_of_a_run_is(kind: str, tmp_path: Path) -> None:
    SHOWN[kind](run_folder(tmp_path / "run"))
    assert write_report(tmp_path / "run").read_text().startswith("<!doctype html>")


def test_a_hostile_run_is_compared_in_one_line(tmp_path: Path) -> None:
    good, bad = run_folder(tmp_path / "good"), run_folder(tmp_path / "bad")
    (bad / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n')
    with pytest.raises(UserError, match="is not as a run wrote it"):
        compare(runs=[str(good), str(bad)], html=tmp_path / "page.html")
    (bad / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    compare(runs=[str(good), str(bad)], html=tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()
