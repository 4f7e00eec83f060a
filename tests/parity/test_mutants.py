"""Every mutant is killed, by the check named for it, and found where it was made; every benign variant passes."""

import json
from pathlib import Path

import pytest

from mutant_evidence import judge
from parity.checks import CHECKS
from parity.contract import Result, Status
from parity.mutants import evaluate as mutants
from parity.mutants import matrix
from parity.mutants.edits import MUTANTS, VARIANTS, Mutant, Variant
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

# 13 is visible in low precision alone, and compiling takes a while: the slow run below has them, and all variants.
FAST = [m for m in MUTANTS if "fp32" in m.dtypes and m.member in ("gqa", "train", "llama2-text")]
QUICK = [v for v in VARIANTS if "compiled" not in v.what and "threads" not in v.what][1::2]


@pytest.mark.parametrize("mutant", FAST, ids=lambda m: m.number)
def test_mutant_is_killed_by_the_check_named_for_it(mutant: Mutant) -> None:
    row = mutants.row_of(*judge(mutant.member, mutant.load))
    assert row.gates["fp32"]
    assert row.killed_by == mutant.killed_by
    assert row.found == mutant.tap


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("variant", QUICK, ids=lambda v: v.what)
def test_benign_variant_passes_every_check(variant: Variant) -> None:
    _, results = judge("gqa", variant.load)
    assert [(r.check, r.value, r.bound, r.where) for r in mutants.failed(results)] == []


def test_registry_is_complete_and_unambiguous() -> None:
    numbers = [m.number for m in MUTANTS]
    assert len(set(numbers)) == len(numbers)
    wanted = {*range(1, 12), *range(13, 59)} - {35}  # 35 is a lint of prompts, see test_harness_self.py
    assert wanted <= {int(n.rstrip("abcde")) for n in numbers}
    assert {m.killed_by for m in MUTANTS} <= set(CHECKS)
    assert len(VARIANTS) >= 20


def test_a_mutant_that_crashes_is_not_killed() -> None:
    crash = Result("tokens", "G0", Status.ERROR, reason="encode('Hi') raised AttributeError")
    assert mutants.killer([crash]) is None
    assert mutants.killer([crash, Result("logits", "G3", Status.FAIL)]) == "logits"


def test_only_refuses_a_number_that_no_mutant_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["--only", "99"]) == 2
    assert "no mutant has this number" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--only", "30"], ["--only", "10,24"]], ids=["all", "text", "training"])
def test_a_checkpoint_of_yours_goes_with_mutants_of_the_forward_pass(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutants.main(["--ckpt", "DIR", *flags]) == 2
    assert "mutants of the forward pass" in capsys.readouterr().err


@pytest.mark.slow
def test_mutants_are_killed_on_a_checkpoint_of_yours(tmp_path: Path) -> None:
    synthesise(SHAPES["tiny"], tmp_path / "tiny")
    line = ["--only", "1,10", "--ckpt", str(tmp_path / "tiny"), "--json", str(tmp_path / "matrix.json")]
    assert mutants.main(line) == 0
    report = json.loads((tmp_path / "matrix.json").read_text())
    assert [(m["killed_by"], m["member"]) for m in report["mutants"]] == [("rope", "yours"), ("ops", "yours")]


@pytest.mark.slow
def test_whole_matrix_in_every_dtype(tmp_path: Path) -> None:
    code = mutants.main(["--json", str(tmp_path / "matrix.json"), "--markdown", str(tmp_path / "matrix.md")])
    report = json.loads((tmp_path / "matrix.json").read_text())
    assert code == 0, matrix.text(report)
    assert report["right_check"] == len(MUTANTS)
    assert report["localised"] >= 0.9 * len(MUTANTS)
    assert report["faults_noticed"] == 5
    assert "| 14 | gate and up swapped |" in (tmp_path / "matrix.md").read_text()
