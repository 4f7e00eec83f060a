"""Every exported form passes parity.check: what a user converted can be proved where it stands.

`pytest -m slow` runs all forms; the default suite one of a reference's own and one that is read for the references.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanollama.checkpoint import convert
from parity.check import main as check
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES, Shape

LLAMA31 = replace(SHAPES["tiny"], vocab_size=1024, n_layers=2)
# llama2.c's files have no word for epsilon, RoPE scaling or its base.
LLAMA2 = replace(LLAMA31, norm_eps=1e-5, rope_factor=None, rope_theta=10_000.0)
SLOW = pytest.mark.slow

FORMS = [
    pytest.param(LLAMA31, "meta", {"shards": 4}, marks=SLOW, id="meta-4"),
    pytest.param(LLAMA31, "hf", {}, marks=SLOW, id="hf"),
    pytest.param(LLAMA31, "gguf", {"dtype": "fp32"}, marks=SLOW, id="gguf-f32"),
    pytest.param(LLAMA31, "gguf", {"dtype": "fp16"}, marks=SLOW, id="gguf-f16"),
    pytest.param(LLAMA31, "gguf", {"dtype": "bf16"}, marks=SLOW, id="gguf-bf16"),
    pytest.param(LLAMA31, "gguf", {"dtype": "q8_0"}, id="gguf-q8_0"),
    pytest.param(LLAMA2, "llama2c", {"version": 0}, marks=SLOW, id="bin-v0"),
    pytest.param(LLAMA2, "llama2c", {"version": 1}, marks=SLOW, id="bin-v1"),
    pytest.param(LLAMA2, "llama2c", {"version": 2}, marks=SLOW, id="bin-v2"),
]
ENDINGS = {"gguf": "model.gguf", "llama2c": "model.bin", "meta": "meta", "hf": "hf"}


@pytest.mark.parametrize(("shape", "format_", "options"), FORMS)
def test_an_export_passes(shape: Shape, format_: str, options: dict, tmp_path: Path) -> None:
    synthesise(shape, tmp_path / "source")
    exported = tmp_path / ENDINGS[format_]
    convert(tmp_path / "source", exported, format_, **options)
    code = check(["--ckpt", str(exported), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and report["verdict"] == "pass", report["why"]
    assert {r["dtype"] for r in report["results"] if r["check"] == "logits"} == {"fp32", "bf16"}
    read_by_us = any("nanollama read from it" in notice for notice in report["notices"])
    assert read_by_us == exported.is_file()
