"""The candidate is probed before the references run, and prompts stay within what it and the checkpoint hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parity.check import main
from parity.contract import UsageError
from parity.report import terminal
from parity.run.prompts import BUILT_IN, Prompts, built_in, within
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

PORT = Path(__file__).parents[1] / "ports" / "plain_port.py"
SMALL = replace(SHAPES["tiny"], vocab_size=512, n_layers=1, n_heads=16, n_kv_heads=4)
FAILS = """
import os
import sys
import torch

def unready(checkpoint, dtype, device):
    raise FileNotFoundError("weights.bin")

def narrow(checkpoint, dtype, device):
    return lambda tokens: torch.zeros(*tokens.shape, 500)

def no_tensor(checkpoint, dtype, device):
    return lambda tokens: None

def leaves(checkpoint, dtype, device):
    return lambda tokens: sys.exit(0)

def killed(checkpoint, dtype, device):
    return lambda tokens: os.abort()

def declines(checkpoint, dtype, device):
    raise NotImplementedError(f"nothing in {dtype}")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "meta"
    synthesise(SMALL, folder)
    return folder


def run(checkpoint: Path, tmp_path: Path, candidate: str, *flags: str) -> tuple[int, dict]:
    out = tmp_path / "report.json"
    code = main(["--ckpt", str(checkpoint), "--candidate", candidate, "--json", str(out), *flags])
    return code, json.loads(out.read_text()) if out.is_file() else {}


@pytest.mark.parametrize(
    ("attribute", "code", "said"),
    [
        ("unready", 1, "load(checkpoint, fp32, cpu) raised FileNotFoundError: weights.bin"),
        ("narrow", 1, "model(tokens) returned logits (1, 3, 500): expected (1, 3, 512)"),
        ("no_tensor", 1, "model(tokens) returned None: expected logits (1, 3, 512)"),
        ("leaves", 1, "model(tokens) raised SystemExit: 0"),
        ("killed", 1, "was ended by SIGABRT at fails.py:19, while it was loaded and asked"),
        ("declines", 3, "nothing in torch.float32"),
    ],
)
def test_a_candidate_that_fails_at_once_is_reported_before_the_references_run(
    attribute: str, code: int, said: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("parity.run.runner.Runner.run", lambda self: pytest.fail("the references were started"))
    (tmp_path / "fails.py").write_text(FAILS)
    found, report = run(checkpoint, tmp_path, f"{tmp_path / 'fails.py'}:{attribute}")
    assert found == code and said in report["why"]
    assert report["verdict"] == {1: "fail", 3: "limited"}[code]
    assert any(said in str(r["reason"]) for r in report["results"])
    assert report["why"] in capsys.readouterr().out and "verdict" in terminal.render(report)


def test_prompts_stay_within_what_the_candidate_holds(checkpoint: Path, tmp_path: Path) -> None:
    port = tmp_path / "short_port.py"
    port.write_text(
        f"import sys\nsys.path.insert(0, {str(PORT.parent)!r})\nfrom pathlib import Path\nimport plain_port\n\n"
        "class Port(plain_port.Port):\n    max_positions = 64\n\n"
        "    def __call__(self, tokens):\n        assert tokens.shape[1] <= 64, tokens.shape\n"
        "        return super().__call__(tokens)\n\n"
        "    def packed(self, tokens, doc_ids):\n        assert tokens.shape[1] <= 64\n"
        "        raise NotImplementedError('one document')\n\n"
        "    def rope(self, positions):\n        assert int(positions.max()) < 64\n"
        "        raise NotImplementedError('no table')\n\n"
        "def load(c, d, v):\n    return Port(Path(c), d, plain_port.RIGHT)\n"
    )
    flags = ("--references", "meta", "--dtype", "fp32", "--checks", "rope,logits,greedy,metamorphic")
    code, report = run(checkpoint, tmp_path, f"{port}:load", *flags)
    assert code == 0, report["why"]
    assert report["tokens"]["longest"] == 64 and report["tokens"]["new_tokens"] == 4 * 32
    assert any(notice.startswith("64 positions are all that there is") for notice in report["notices"])


def test_built_in_texts_are_cut_at_words() -> None:
    encode = lambda text: [0, *text.encode()]  # a token a byte, as 740 of a text of 160 words
    found = within(built_in(), 64, encode, None)
    assert found.texts is not None
    for whole, cut in zip(BUILT_IN, found.texts, strict=True):
        assert whole.startswith(cut) and len(encode(cut)) <= 64
        assert cut == whole or whole[len(cut)].isspace()
    assert within(built_in(), 10_000, encode, None) == built_in()


def test_a_users_prompt_that_is_too_long_is_refused() -> None:
    prompts = Prompts(None, [[1, 2], [1] * 65], [])
    with pytest.raises(UsageError, match=r"--prompts p.jsonl, prompt 2: 65 tokens, .* room for 64"):
        within(prompts, 64, None, Path("p.jsonl"))
    assert within(prompts, 65, None, Path("p.jsonl")) is prompts
    assert within(prompts, 64, None, None).tokens == [[1, 2], [1] * 64]


def test_a_process_that_dies_late_keeps_the_finished_dtype(checkpoint: Path, tmp_path: Path) -> None:
    port = tmp_path / "dying_port.py"
    port.write_text(
        f"import os, sys, torch\nsys.path.insert(0, {str(PORT.parent)!r})\nimport plain_port\n\n"
        "def load(c, d, v):\n    port = plain_port.load(c, d, v)\n"
        "    def model(tokens):\n        if d == torch.bfloat16:\n            os.abort()\n"
        "        return port(tokens)\n    return model\n"
    )
    flags = ("--references", "meta", "--dtype", "fp32,bf16", "--max_new_tokens", "2", "--checks", "logits,argmax")
    code, report = run(checkpoint, tmp_path, f"{port}:load", *flags)
    assert code == 1
    assert {r["status"] for r in report["results"] if r["dtype"] == "fp32"} == {"pass"}
    (error,) = (r["reason"] for r in report["results"] if r["status"] == "error")
    assert "SIGABRT at dying_port.py:9, while it was asked model(tokens) at bf16" in error
