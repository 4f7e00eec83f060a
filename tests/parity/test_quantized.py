"""Integer weights are judged by what such rounding costs the oracle: right ones, wrong ones, braggarts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity.check import main
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from reference.files.weights import Unusable
from reference.oracle.rounding import Integers

PORTS = Path(__file__).parents[1] / "ports" / "integer_ports.py"
CHECKS = "config,taps,logits,kl,argmax,greedy,cache,metamorphic"
SMALL = replace(SHAPES["tiny"], vocab_size=1024, n_layers=2, n_heads=16, n_kv_heads=4)  # head_dim 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "meta"
    synthesise(SMALL, folder)
    return folder


def run(checkpoint: Path, tmp_path: Path, candidate: str, dtype: str = "fp32") -> tuple[int, dict]:
    out = tmp_path / "report.json"
    flags = ("--references", "hf", "--dtype", dtype, "--checks", CHECKS, "--max_new_tokens", "8", "--json", str(out))
    code = main(["--ckpt", str(checkpoint), "--candidate", candidate, *flags])
    return code, json.loads(out.read_text()) if out.is_file() else {}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_right_integers_are_quantized_and_not_a_pass(
    scheme: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run(checkpoint, tmp_path, f"parity.candidates.quantized:{scheme}", "fp32,bf16")
    assert (code, report["verdict"]) == (0, "quantized"), report["why"]
    judged = {r["check"] for r in report["results"] if r["status"] == "pass"}
    assert {"config", "taps", "logits", "kl", "argmax", "cache", "metamorphic"} <= judged
    fp32, bf16 = report["quantized"]
    assert (fp32["dtype"], bf16["dtype"]) == ("fp32", "bf16") and fp32["scheme"].startswith(scheme)
    assert 0.2 < fp32["kl_mean"] / fp32["rounding"]["kl_mean"] < 2  # independent roundings of one size
    assert fp32["flips"] <= fp32["positions"] // 2 and (fp32["flip_margin"] or 0) >= 0
    assert f"{fp32['scheme']:12} fp32 candidate: KL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("port", "tap"),
    [
        ("wrong_rows", "layers.1.gate"),
        ("wrong_groups", "layers.1.gate"),
        ("claims_int8", "layers.0.q"),
    ],
)
def test_wrong_integers_fail_where_they_are_wrong(port: str, tap: str, checkpoint: Path, tmp_path: Path) -> None:
    code, report = run(checkpoint, tmp_path, f"{PORTS}:{port}")
    assert (code, report["verdict"]) == (1, "fail")
    assert report["first_divergence"]["tap"] == tap
    assert "taps" in {r["check"] for r in report["results"] if r["status"] == "fail"}


def test_integers_that_say_nothing_of_it_fail_as_any_candidate(checkpoint: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text(
        "from parity.candidates.quantized import int8\n"
        "def load(*args):\n"
        "    candidate = int8(*args)\n"
        "    candidate.integers = None\n"
        "    return candidate\n"
    )
    code, report = run(checkpoint, tmp_path, f"{silent}:load")
    assert (code, report["verdict"], report["quantized"]) == (1, "fail", [])


def test_unknown_integers_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(checkpoint, tmp_path, f"{PORTS}:unheard_of")
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'nf4'" in line and "int8" in line


def test_the_oracle_rounds_to_the_nearest_representable_number() -> None:
    rows = torch.tensor([[1.27, -0.634, 0.0, 0.006, 0.005, 0.004], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    whole = Integers.parse("int8").round(rows)
    assert torch.allclose(whole[0], torch.tensor([1.27, -0.63, 0.0, 0.01, 0.0, 0.0], dtype=torch.float64))
    assert (whole[1] == 0).all()
    groups = Integers.parse("int4/3").round(rows)[0]
    assert torch.allclose(groups[3:], torch.tensor([0.006, 6 * 0.006 / 7, 5 * 0.006 / 7], dtype=torch.float64))
    with pytest.raises(Unusable, match="int4/32"):
        Integers.parse("q8_0")
