"""Candidates outside Python: a program that answers on its standard output, a server with a completions interface."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mutant_evidence import judge
from parity.candidates.command import command_loader
from parity.check import main
from parity.contract import Result
from parity.mutants import evaluate as mutants
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from ports import plain_port

PROGRAM = Path(plain_port.__file__).parent / "program.py"
SMALL = replace(SHAPES["tiny"], vocab_size=512, n_layers=2, n_heads=16, n_kv_heads=4)  # head_dim 8
Shape = Callable[[list[int]], dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "meta"
    synthesise(SMALL, folder)
    return folder


def run(checkpoint: Path, tmp_path: Path, candidate: str, *flags: str) -> tuple[int, dict]:
    out = tmp_path / "report.json"
    common = ("--references", "meta", "--dtype", "fp32", "--max_new_tokens", "4", "--json", str(out))
    common += ("--checks", "taps,logits,kl,argmax,greedy,metamorphic")
    code = main(["--ckpt", str(checkpoint), "--candidate", candidate, *common, *flags])
    return code, json.loads(out.read_text()) if out.is_file() else {}


def program(kind: str) -> str:
    return f"{sys.executable} {PROGRAM} {{ckpt}} {{dtype}} {kind}"


def judged(report: dict) -> set[str]:
    return {r["check"] for r in report["results"] if r["status"] == "pass"}


def verdict_of(results: list[Result], check: str) -> set[str]:
    return {r.status.value for r in results if r.check == check}


def test_a_right_program_passes(checkpoint: Path, tmp_path: Path) -> None:
    code, report = run(checkpoint, tmp_path, f"cmd:{program('load')}", "--dtype", "fp32,bf16")
    assert code == 0, report["why"]
    assert {"logits", "kl", "argmax", "greedy", "metamorphic", "taps"} <= judged(report)


def test_a_program_without_taps_is_judged_by_its_logits() -> None:
    _, results = judge("gqa", command_loader(program("few")))
    assert not mutants.failed(results)
    assert verdict_of(results, "logits") == {"pass"} and verdict_of(results, "taps") == {"skip"}


@pytest.mark.parametrize(("kind", "tap"), [("swapped", "layers.0.gate"), ("wrong_base", "layers.0.q_rope")])
def test_a_wrong_program_fails_where_it_is_wrong(kind: str, tap: str) -> None:
    row = mutants.row_of(*judge("gqa", command_loader(program(kind))))
    assert (row.killed_by, row.found) == ("taps", tap)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mute", "answered `can` with 'hello'"),
        ("dies", "ended with exit code 1 at `logits`: out of registers"),
        ("declines", "answered `logits` with 'error prompt too long'"),
        ("short", "holds 10 bytes: expected 3 rows of float32"),
        ("empty", "holds 0 bytes: expected 3 rows of float32"),
        ("forgets", "wrote no logits.f32"),
    ],
)
def test_a_program_that_fails_says_why(kind: str, said: str, checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=re.escape(said)):
        command_loader(program(kind))(str(checkpoint), torch.float32, "cpu")(torch.tensor([[1, 2, 3]]))


def test_a_program_that_cannot_be_run_is_no_pass(checkpoint: Path, tmp_path: Path) -> None:
    code, report = run(checkpoint, tmp_path, f"cmd:{program('dies')}")
    assert (code, report["verdict"]) == (1, "fail")
    (error,) = (r["reason"] for r in report["results"] if r["status"] == "error")
    assert error.endswith("out of registers")


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        ("cmd:", "names no program"),
        ("cmd:no_such_program --fast", "there is no program 'no_such_program'"),
        ("cmd:sh 'unfinished", "No closing quotation"),
        ("http://127.0.0.1:9/v1", "is the server running?"),
        ("nonsense", "cmd:PROGRAM"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    candidate: str, said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(checkpoint, tmp_path, candidate)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and said in line
