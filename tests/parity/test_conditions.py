"""Declared rounding is what a candidate is judged by: right ones pass and say so, wrong ones fail and are named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parity.candidates.conditions import Conditions
from parity.check import main
from parity.contract import UsageError
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

PORTS = Path(__file__).parents[1] / "support" / "condition_ports.py"
CHECKS = "config,taps,logits,kl,argmax,cache,metamorphic"
SMALL = replace(SHAPES["tiny"], vocab_size=1024, n_layers=2, n_heads=4, n_kv_heads=2)  # dim 64, head_dim 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "meta"
    synthesise(SMALL, folder)
    return folder


def run(checkpoint: Path, tmp_path: Path, candidate: str) -> tuple[int, dict]:
    out = tmp_path / "report.json"
    flags = ("--references", "hf", "--dtype", "fp32", "--checks", CHECKS, "--max_new_tokens", "4", "--json", str(out))
    code = main(["--ckpt", str(checkpoint), "--candidate", f"{PORTS}:{candidate}", *flags])
    return code, json.loads(out.read_text()) if out.is_file() else {}


@pytest.mark.parametrize(
    ("port", "verdict", "said"),
    [
        ("fp8_cache", "pass", "as declared: kv fp8"),
        ("fp16_queries_too", "pass", "as declared: kv fp16"),
        ("q8_fp16_cache", "quantized", "as declared: int8/32, activations int8/32, kv fp16"),
    ],
)
def test_honest_rounding_passes_and_is_said(
    port: str, verdict: str, said: str, checkpoint: Path, tmp_path: Path
) -> None:
    code, report = run(checkpoint, tmp_path, port)
    assert (code, report["verdict"]) == (0, verdict), report["why"]
    assert said in report["why"]
    assert {"taps", "logits", "kl", "cache"} <= {r["check"] for r in report["results"] if r["status"] == "pass"}


@pytest.mark.parametrize(
    ("port", "tap", "named"),
    [
        ("fp8_said_to_be_fp16", "layers.0.attn_mix", "keys and values are kept in fp8"),
        ("q8_wrong_base", "layers.0.q_rope", "base looks like 10,000"),
    ],
)
def test_what_is_worse_than_declared_fails_and_is_named(
    port: str, tap: str, named: str, checkpoint: Path, tmp_path: Path
) -> None:
    code, report = run(checkpoint, tmp_path, port)
    assert (code, report["verdict"]) == (1, "fail")
    assert report["first_divergence"]["tap"] == tap
    assert named in report["first_divergence"]["probable_cause"]


def test_an_unknown_condition_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(checkpoint, tmp_path, "unheard_of")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and "'fp4'" in line and "fp16, bf16, fp8 or int8" in line


def test_conditions_are_words_and_flags_of_the_oracle() -> None:
    said = Conditions(integers="int8/32", kv="fp16")
    assert str(said) == "int8/32, kv fp16" and said.quantized and not Conditions(kv="fp8").quantized
    assert said.flags == ("--integers", "int8/32", "--kv", "fp16")
    assert not Conditions() and Conditions.of({"kv": "bf16", "dtypes": {}}) == Conditions(kv="bf16")
    with pytest.raises(UsageError, match="int4/32"):
        Conditions(integers="q8_0")
