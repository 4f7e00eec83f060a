"""`parity.check --result FILE`: figures for others, and nothing of whose machine and whose texts they are of."""

import getpass
import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from mutant_evidence import judge
from parity.candidates.nano.checkpoint import fingerprint
from parity.check import main
from parity.contract import Result, Status
from parity.mutants.edits import MUTANTS
from parity.report import summary
from parity.report.model import CheckpointEntry, Report
from parity.report.sendable import kind_of, plain, sendable
from parity.run.execute import RunLog

SECRET = "Zebedee"  # in every place where a user has words


@pytest.fixture(scope="module")
def failing() -> Report:
    ev, results = judge("gqa", next(m.load for m in MUTANTS if m.number == "15"))
    entry = CheckpointEntry(f"/home/{SECRET}/models", "meta", {}, 0, verified=[f"{SECRET}.pth"])
    return summary.summarise(ev, results, f"/home/{SECRET}/port.py:load", RunLog(), 1.5, entry)


def test_a_run_writes_figures_and_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / SECRET
    folder.mkdir()
    ckpt = tiny.checkpoint(folder / "meta")
    prompts = folder / "prompts.jsonl"
    ids = [(7 * i + 3) % 256 for i in range(24)]
    prompts.write_text(f"{ids}\n{ids[::-1]}\n")
    flags = ["--references", "meta", "--dtype", "fp32", "--max_new_tokens", "2", "--checks", "logits,argmax,greedy"]
    assert main(["--ckpt", str(ckpt), *flags, "--prompts", str(prompts), "--result", str(folder / "r.json")]) == 0
    text = (folder / "r.json").read_text()
    found = json.loads(text)
    assert found["verdict"] == "pass" and found["candidate"] == "nanollama"
    assert found["checkpoint"]["config"]["n_layers"] == 2 and found["tokens"]["prompts"] == 2
    assert {r["status"] for r in found["results"] if r["check"] == "logits"} == {"pass"}
    assert found["environment"]["torch"] and len(found["fingerprint"]) == 64
    words = [SECRET, str(tmp_path), socket.gethostname(), getpass.getuser(), ".jsonl", str(ids[:4])[1:-1]]
    # A user called "root" or a host called "x" could be part of any word: whole words alone.
    assert [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)] == []


def test_a_failure_says_where_and_not_what(failing: Report) -> None:
    loud = Result(
        "tokens", "G0", Status.FAIL, where=f"'{SECRET} wrote'", reason=f"/home/{SECRET}", metric=f"'{SECRET}'"
    )
    noisy = replace(failing, results=[*failing.results, loud], notices=[SECRET], errata=[SECRET], why=SECRET)
    noisy = replace(
        noisy, environment={**failing.environment, "hostname": SECRET, "torch": f"2+{SECRET}/x"}, twin=noisy
    )
    text = json.dumps(sendable(noisy, None))
    assert SECRET not in text
    found = json.loads(text)
    divergence = failing.first_divergence
    assert divergence is not None and found["first_divergence"]["tap"] == divergence.tap
    assert found["first_divergence"]["probable_cause"] == divergence.probable_cause.replace("'", "")
    assert "value" not in found["first_divergence"]
    assert found["results"][-1] == {
        "status": "fail",
        **dict.fromkeys(found["results"][-1].keys() - {"status"}),
        "check": "tokens",
        "gate": "G0",
    }
    assert found["candidate"] == "a Python module" and found["twin"]["verdict"] == "fail"


def test_every_word_is_of_a_closed_kind() -> None:
    assert plain({"a": ["rho, prefill + decode", 1.5, None], "b/c": 1, "d": "x" * 401}) == {
        "a": ["rho, prefill + decode", 1.5, None],
        "d": None,
    }
    for text in ("/home", "C:\\x", "~", "'quoted'", "a\nb", "é", "me@host", "$HOME", '"'):
        assert plain(text) is None, text


@pytest.mark.parametrize(
    ("candidate", "kind"),
    [
        ("nanollama", "nanollama"),
        ("nanollama_of_mine.py:load", "a Python module"),
        ("limits:1:2:3 cmd:./port {ckpt}", "a program"),
        ("http://127.0.0.1:8000/v1", "a server"),
    ],
)
def test_a_candidate_is_told_by_its_kind(candidate: str, kind: str) -> None:
    assert kind_of(candidate) == kind


def test_a_fingerprint_is_that_of_the_weights_in_any_format(tmp_path: Path) -> None:
    prints = [fingerprint(str(tiny.checkpoint(tmp_path / format, format))) for format in ("meta", "hf")]
    assert prints[0] == prints[1]
    assert fingerprint(str(tiny.checkpoint(tmp_path / "deeper", n_layers=3))) != prints[0]
