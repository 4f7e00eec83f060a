"""parity.kit --check kit --candidate: a candidate of parity.check judged in seconds, by what a kit holds."""

from pathlib import Path

import pytest

import kit_cases
from parity.kit.make import main

PORT = Path(__file__).parents[1] / "ports" / "plain_port.py"


@pytest.fixture(scope="module")
def kit() -> Path:
    return kit_cases.made()[1]


def run(kit: Path, candidate: str, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = main(["--check", str(kit), "--candidate", candidate, *flags])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_right_port_passes(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(kit, f"{PORT}:load", capsys)
    assert code == 0 and "verdict      PASS" in text
    assert f"candidate    {PORT}:load" in text


def test_nanollama_passes_with_its_rope_and_gradients(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(kit, "nanollama", capsys)
    assert code == 0 and "verdict      PASS" in text
    assert all(f"\n{check} " in text for check in ("taps", "logits", "rope", "training"))


@pytest.mark.parametrize(
    ("attribute", "tap"), [("wrong_base", "layers.0.q_rope"), ("wrong_eps", "layers.0.attn_norm"), ("swapped", "gate")]
)
def test_a_wrong_port_fails_where_it_is_wrong(
    attribute: str, tap: str, kit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(kit, f"{PORT}:{attribute}", capsys)
    assert code == 1 and f"{tap} (fp32, against the kit)" in text


def test_a_lower_precision_is_limited(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(kit, f"{PORT}:bare", capsys, "--dtype", "bf16")
    assert code == 3 and "LIMITED: fp32 was not among the dtypes" in text


BROKEN = """
import torch

def raises(checkpoint, dtype, device):
    def model(tokens):
        raise RuntimeError("no kernel\\nat all")
    return model

def wide(checkpoint, dtype, device):
    return lambda tokens: torch.zeros(*tokens.shape, 600)

def nan(checkpoint, dtype, device):
    return lambda tokens: torch.full((*tokens.shape, 512), torch.nan)

def declines(checkpoint, dtype, device):
    raise NotImplementedError("not here")
"""


@pytest.mark.parametrize(
    ("attribute", "code", "said"),
    [
        ("raises", 1, "broken_port.py:6; model(tokens) raised RuntimeError: no kernel"),
        ("wide", 1, "model(tokens) returned logits (1, 7, 600): expected (1, 7, 512)"),
        ("nan", 1, "logits (fp32): rho nan beyond 2"),
        ("declines", 3, "not here"),
        ("load", 2, "has no callable 'load'"),
    ],
)
def test_what_goes_wrong_is_said(
    attribute: str, code: int, said: str, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_port.py").write_text(BROKEN)
    found, text = run(kit, f"{tmp_path / 'broken_port.py'}:{attribute}", capsys)
    assert found == code and said in text, text


@pytest.mark.parametrize("flags", [[], ["--port", ".", "--candidate", "nanollama"]])
def test_one_of_port_and_candidate_is_given(flags: list[str], kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(kit), *flags]) == 2
    assert "--check: give either --port DIR" in capsys.readouterr().err
