"""What a check, and the kill matrix, make of a checkpoint's seeded twin."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import LLAMA31, make_weights, write
from nanollama.cli import read
from parity import check
from parity.candidates.nano.checkpoint import describe
from parity.candidates.probe import probe_in_process, start_candidate
from parity.mutants import matrix
from parity.mutants.evaluate import with_twin
from parity.report.model import Absent, CheckpointEntry, Report, Tokens
from parity.run import twin as report_of_both
from parity.run.request import Request
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

PORT = Path(__file__).parents[1] / "ports" / "plain_port.py"
pytestmark = pytest.mark.usefixtures("kept_traces")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Meta folder whose states are as large as a trained model's: each embedding row has RMS 64."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shape = replace(SHAPES["tiny"], vocab_size=512, n_layers=5, dim=64, hidden_dim=192)
    synthesise(shape, folder)
    (folder / "SHA256SUMS").unlink()
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    rows = weights["tok_embeddings.weight"].float()
    weights["tok_embeddings.weight"] = (64 * rows / rows.square().mean(-1, keepdim=True).sqrt()).bfloat16()
    weights["layers.0.attention_norm.weight"] *= 2
    torch.save(weights, folder / "consolidated.00.pth")
    return folder


def checked(tmp_path: Path, ckpt: Path, candidate: str, *more: str) -> tuple[int, dict[str, Any]]:
    out, quick = tmp_path / "report.json", ("--references", "meta", "--dtype", "fp32", "--max_new_tokens", "2")
    flags = ("--ckpt", str(ckpt), "--candidate", candidate, "--json", str(out))
    code = check.main([*flags, *quick, "--checks", "taps,logits,kl,argmax,greedy", *more])
    return code, json.loads(out.read_text())


def test_a_mistake_that_trained_weights_hide_is_found_on_the_twin(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--junit", str(tmp_path / "junit.xml"), "--html", str(tmp_path / "report.html"))
    code, report = checked(tmp_path, trained, f"{PORT}:wrong_eps", *files)
    said = capsys.readouterr().out
    failed = {(r["checkpoint"], r["check"]) for r in report["results"] if r["status"] == "fail"}
    assert {("twin", "taps"), ("twin", "logits")} <= failed and {where for where, _ in failed} == {"twin"}
    assert (code, report["verdict"]) == (1, "fail") and report["why"].startswith("on its seeded twin")
    first = report["first_divergence"]
    assert (first["checkpoint"], first["tap"]) == ("twin", "layers.0.attn_norm") and "eps" in first["probable_cause"]
    assert report["twin"]["status"] == "run" and report["twin"]["checkpoint"]["config"]["n_layers"] == 4
    assert "first departs, in the twin, at layers.0.attn_norm" in said
    assert "twin, fp32" in (tmp_path / "junit.xml").read_text()
    assert "First divergence, in the seeded twin" in (tmp_path / "report.html").read_text()


def test_without_the_twin_it_passes_and_the_report_says_what_goes_unseen(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = checked(tmp_path, trained, f"{PORT}:wrong_eps", "--twin", "off")
    assert (code, report["verdict"]) == (0, "pass")
    assert {r["checkpoint"] for r in report["results"]} == {"given"} and report["twin"]["status"] == "off"
    assert "--twin off: the candidate was not asked for seeded weights; unseen without it" in capsys.readouterr().out


def test_a_right_port_passes_on_both(trained: Path, tmp_path: Path) -> None:
    code, report = checked(tmp_path, trained, f"{PORT}:load")
    assert code == 0, report["why"]
    passed = [r["checkpoint"] for r in report["results"] if r["status"] == "pass"]
    assert report["why"] == f"{len(passed)} results passed, {passed.count('twin')} of them on the seeded twin"
    assert passed.count("twin") == passed.count("given") > 0 and report["first_divergence"] is None


def bare(verdict: str) -> Report:
    return Report(
        verdict=verdict,
        why=verdict,
        candidate="port",
        references=[],
        checkpoint=CheckpointEntry("x", "meta", {}, 0),
        environment={},
        results=[],
        tokens=Tokens(0, 0, 0, {}),
    )


STUBBORN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {ports!r})
from plain_port import load as plain

def fixed(checkpoint, dtype, device):
    return plain({ckpt!r}, dtype, device)

def five(checkpoint, dtype, device):
    if json.loads((Path(checkpoint) / "params.json").read_text())["n_layers"] != 5:
        raise RuntimeError("layer 4 is not there")
    return plain(checkpoint, dtype, device)
"""


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("fixed", "it does not load the checkpoint that it is given"),
        ("five", "load(checkpoint, fp32, cpu) raised RuntimeError: layer 4 is not there (stubborn.py:12)"),
    ],
)
def test_a_candidate_that_has_no_twin_gets_a_plain_word(
    attribute: str, said: str, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.format(ports=str(PORT.parent), ckpt=str(trained)))
    flags = ["--ckpt", str(trained), "--candidate", f"{tmp_path}/stubborn.py:{attribute}", "--dtype", "fp32"]
    request = check.request_of(read(check.Flags, flags))
    described = describe(str(trained), None)
    with start_candidate(request.candidate, tmp_path) as candidate:
        found = probe_in_process(candidate, described, ["fp32"], "cpu")
    outcome = check.check_twin(request, described, found, tmp_path / "twin")
    assert isinstance(outcome, Absent) and outcome.status == "none"
    assert said in outcome.why
    report = report_of_both.merge(bare("pass"), outcome)
    assert report.verdict == "pass" and said in report.notices[0] and "unseen without it" in report.notices[0]


@pytest.mark.parametrize(
    ("candidate", "ckpt", "needed"),
    [("http://127.0.0.1:1/v1", "x", True), ("nanollama", "x", False), (f"{PORT}:load", None, False)],
)
def test_servers_nanollama_and_the_embedded_default_have_no_twin(
    candidate: str, ckpt: str | None, needed: bool, tmp_path: Path
) -> None:
    request = Request(candidate, ckpt, checks=("logits",))
    path = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))
    found = report_of_both.absent(request, describe(str(path), None))
    assert found is not None and (found.status, found.needed) == ("none", needed)


@pytest.mark.parametrize(
    ("own", "other", "both"),
    [
        ("pass", "pass", "pass"), ("pass", "fail", "fail"), ("fail", "pass", "fail"), ("limited", "pass", "limited"),
        ("pass", "limited", "limited"), ("quantized", "quantized", "quantized"), ("quantized", "fail", "fail"),
    ],
)  # fmt: skip
def test_the_worse_verdict_is_that_of_both(own: str, other: str, both: str) -> None:
    assert report_of_both.merge(bare(own), bare(other)).verdict == both


def test_a_twin_that_came_to_no_end_limits_the_verdict() -> None:
    ended = Absent("error", "meta ended with signal 9")
    found = report_of_both.merge(bare("pass"), ended)
    assert found.verdict == "limited" and found.results[0].checkpoint == "twin"
    assert report_of_both.merge(bare("fail"), ended).verdict == "fail"


def fate(fp32: bool, bf16: bool, by: str | None) -> dict[str, Any]:
    gates = {"fp32": ["G3"] * fp32, "bf16": ["G3"] * bf16}
    survived = [dtype for dtype, failed in gates.items() if not failed]
    by_logits = {"fp32": fp32, "bf16": False}
    fields = {"number": "10", "what": "eps", "gates": gates, "survived_in": survived, "by_logits": by_logits}
    return fields | {"killed": not survived, "killed_by": by, "found": by, "cause": None}


@pytest.mark.parametrize(
    ("own", "twin_of_it", "killed", "cells"),
    [
        ((False, False, None), (True, True, "ops"), True, ["survives", "survives", "fp32, bf16", "fp32"]),
        ((True, False, "taps"), (False, False, None), False, ["fp32", "fp32", "fp32", "fp32"]),
        ((False, False, None), (False, False, None), False, ["survives"] * 4),
    ],
)
def test_a_mutant_survives_what_both_checkpoints_let_through(
    own: tuple[bool, bool, str | None], twin_of_it: tuple[bool, bool, str | None], killed: bool, cells: list[str]
) -> None:
    found = with_twin(fate(*own), fate(*twin_of_it))
    assert found["killed"] is killed and found["killed_by"] == (own[2] or twin_of_it[2])
    assert matrix.twin_cells(found)[2:] == cells
