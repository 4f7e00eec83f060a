"""llama.cpp's default cache and its Q8_0 pass as declared; undeclared, or worse than declared, they fail and are named.

python -m pytest tests/interop -k conditions
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanollama.checkpoint import convert
from parity.check import main
from parity.mutants.family import FAMILY
from parity.synth.checkpoint import write_meta

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'llama-parity[interop]'")

PORT = Path(__file__).parent / "llama_cpp_port.py"
# At dim 256 the rounding of Q8_0's activations shows: by its weights alone it failed.
SHAPE = replace(FAMILY["gqa"].shape, dim=256, n_layers=4, hidden_dim=704, vocab_size=2048)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "meta").mkdir()
    write_meta(folder / "meta", SHAPE, 0, "bf16", 1)
    for kind in ("fp32", "q8_0", "q4_0"):
        convert(folder / "meta", folder / f"x.{kind}.gguf", "gguf", dtype=kind)
    return folder / "x.fp32.gguf"


def run(gguf: Path, tmp_path: Path, port: str) -> dict:
    out = tmp_path / "report.json"
    flags = ("--references", "hf", "--dtype", "fp32", "--max_new_tokens", "4", "--json", str(out))
    flags += ("--checks", "logits,kl,argmax,cache,metamorphic")
    main(["--ckpt", str(gguf), "--candidate", f"{PORT}:{port}", *flags])
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("port", "verdict"),
    [("default_declared", "pass"), ("q8_0_declared", "quantized"), ("q8_0_default_declared", "quantized")],
)
def test_what_is_declared_passes(port: str, verdict: str, gguf: Path, tmp_path: Path) -> None:
    report = run(gguf, tmp_path, port)
    assert report["verdict"] == verdict, report["why"]


@pytest.mark.parametrize(
    ("port", "named"),
    [
        ("default", "attention (queries, keys, values, weights) is in fp16"),
        (
            "q8_0",
            "the nearest are weights and embedding are ggml's Q8_0",
        ),
        ("q4_0_said_to_be_q8_0", "Q4_0"),
    ],
)
def test_what_is_not_declared_fails_and_is_told(port: str, named: str, gguf: Path, tmp_path: Path) -> None:
    report = run(gguf, tmp_path, port)
    assert report["verdict"] == "fail"
    assert named in report["first_divergence"]["probable_cause"]
