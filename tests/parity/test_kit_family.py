"""python -m parity.kit --set: six kits, of the same bytes in every run and by any number of threads."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kit_cases
from parity.kit import make as command
from parity.kit.arrays import Kit
from parity.kit.family import RECIPES, write_one
from parity.kit.seeded import seeded_tokens, values
from parity.synth.shapes import weight_shapes

# Of weights and tokens of all recipes: the same on every machine, or kits made on two are two kits.
DIGEST = "d95670b3f03706ef"
DIGEST_BY_HAND = """
import hashlib, torch
from test_kit_family import digest
print(torch.backends.cpu.get_cpu_capability(), digest())
"""


def digest() -> str:
    found = hashlib.sha256()
    for recipe in RECIPES.values():
        for name, size in weight_shapes(recipe.shape).items():
            rows, columns = size if len(size) > 1 else (1, size[0])
            found.update(values(name, rows, columns).bfloat16().float().numpy().tobytes())
        found.update(repr(seeded_tokens(recipe.shape, recipe.lengths)).encode())
    return found.hexdigest()[:16]


def test_weights_and_tokens_are_the_same_on_every_machine() -> None:
    assert digest() == DIGEST


def test_weights_do_not_depend_on_the_vector_instructions() -> None:
    """torch.randn does: with AVX2 its logarithms are rounded otherwise."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), *sys.path])
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", DIGEST_BY_HAND], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DEFAULT", DIGEST]


def test_the_docs_say_what_was_measured_of_the_bytes() -> None:
    root = Path(__file__).parents[2]
    ways = json.loads((root / "benchmarks" / "results" / "kit_bytes.json").read_text())["ways"]
    assert [ways[name]["files"] for name in ("again", "2 threads")] == [[], []]
    for way in ("AVX2", "SSE4"):
        assert ways[way]["same_table"] and not {"weights.f32", "inputs.f32"} & set(ways[way]["files"])
    assert (ways["AVX2"]["inputs"], ways["SSE4"]["inputs"]) == ({"decided.bf16": 4}, {})
    page = (root / "docs" / "kit.md").read_text(encoding="utf-8")
    assert f"by {max(ways[way]['expected'] for way in ways):.1e} of an array's RMS" in page
    said = f"by up to {ways['SSE4']['bounds']:.0%} (SSE4; {ways['AVX2']['bounds']:.0%} at most with AVX2)"
    assert said in page


def test_each_kit_is_another_llama() -> None:
    shapes = {name: recipe.shape for name, recipe in RECIPES.items()}
    assert shapes["llama2"].n_kv_heads == shapes["llama2"].n_heads and shapes["llama2"].rope_theta == 10_000
    assert shapes["llama3"].rope_factor is None and shapes["llama3"].rope_theta == 500_000
    assert shapes["llama3.1"].rope_factor == 8 and not shapes["llama3.1"].tied
    assert shapes["llama3.2"].rope_factor == 32 and shapes["llama3.2"].tied
    assert shapes["70b"].n_heads // shapes["70b"].n_kv_heads == 8 and shapes["70b"].n_kv_heads > 1
    assert len(RECIPES["packed"].lengths) > 8 and RECIPES["packed"].trained


@pytest.mark.parametrize("flags", [["--ckpt", "x"], ["--dtype", "fp32"], ["--out", "y"], ["--check", "y"]])
def test_a_set_is_made_from_nothing_else(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--set", str(tmp_path / "kits"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0] in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_six_kits_and_their_manifest() -> None:
    folder = kit_cases.family()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema"] == "nanollama.kits/1" and manifest["licence"] == "MIT"
    assert list(manifest["kits"]) == list(RECIPES) and manifest["environment"]["llama_models"]
    for name, entry in manifest["kits"].items():
        kit = Kit(folder / name)  # refuses what is not as its SHA256SUMS says
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / name).iterdir()}
        assert entry["files"] == sums and entry["bytes"] < 15e6
        assert ("train.loss" in kit.arrays) == RECIPES[name].trained
        assert kit.table["decided_fraction"]["fp32"] > 0.9 and kit.table["decided_fraction"]["bf16"] > 0.5
        assert kit.table["notices"] == []
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_another_run_with_two_threads_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    (tmp_path / "packed").mkdir()
    write_one("packed", RECIPES["packed"], tmp_path / "packed")
    made = {path.name: path.read_bytes() for path in (kit_cases.family() / "packed").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
