"""`pytest -m slow`: the whole check on an 8B-shaped checkpoint, on other large shapes, and on every tiny family.

$NANOLLAMA_CKPT names a real Meta-Llama-3.1-8B; without it the 8B shape is synthesised in a temporary folder (16 GB).
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from parity.check import main
from parity.synth.checkpoint import parameters, synthesise
from parity.synth.shapes import SHAPES

pytestmark = pytest.mark.slow
NEEDED_BYTES = 20 * 10**9


def room_for(n_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        pytest.skip(f"{folder} has {free / 1e9:.0f} GB free, {n_bytes / 1e9:.0f} GB are needed")


@pytest.fixture(scope="module")
def eight_b(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    if "NANOLLAMA_CKPT" in os.environ:
        yield Path(os.environ["NANOLLAMA_CKPT"])
        return
    folder = tmp_path_factory.mktemp("8B")
    room_for(NEEDED_BYTES, folder)
    synthesise(SHAPES["8B"], folder / "ckpt")
    yield folder / "ckpt"
    shutil.rmtree(folder)


def run(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    out = tmp_path / "report.json"
    code = main([*argv, "--json", str(out)])
    return code, json.loads(out.read_text())


@pytest.mark.large
def test_8b_passes_within_a_laptop(eight_b: Path, tmp_path: Path) -> None:
    code, report = run(tmp_path, "--ckpt", str(eight_b))
    assert code == 0, report["why"]
    assert report["checkpoint"]["parameters"] == 8_030_261_248 and report["checkpoint"]["config"]["n_layers"] == 32
    assert report["tokens"]["new_tokens"] >= 4 * 32 and report["tokens"]["longest"] >= 256
    assert report["peak_anonymous_bytes"] <= 6 * 2**30


@pytest.mark.large
def test_8b_without_scaling_is_found(eight_b: Path, tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text(
        "from dataclasses import replace\n"
        "from parity.candidates import nano\n"
        "opened = nano.open_checkpoint\n"
        "def without_scaling(path):\n"
        "    checkpoint = opened(path)\n"
        "    return replace(checkpoint, config=replace(checkpoint.config, rope_scaling=None))\n"
        "nano.open_checkpoint = without_scaling\n"
        "load = nano.fast\n"
    )
    code, report = run(tmp_path, "--ckpt", str(eight_b), "--candidate", f"{port}:load", "--references", "meta")
    assert code == 1 and report["first_divergence"]["tap"] == "layers.0.q_rope"


@pytest.mark.large
@pytest.mark.parametrize(("shape", "shards", "depths"), [("70B", 8, (2, 4)), ("405B", 8, (1, 2)), ("405B", 16, (1, 2))])
def test_memory_does_not_grow_with_depth(
    shape: str, shards: int, depths: tuple[int, int], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(list(range(1000, 1024))) + "\n" + json.dumps(list(range(5))) + "\n")
    peaks = []
    for depth in depths:
        folder = tmp_path_factory.mktemp(shape)
        sized = replace(SHAPES[shape], n_layers=depth)
        room_for(int(2.2 * parameters(sized)), folder)
        synthesise(sized, folder / "ckpt", shards=shards)
        short = ("--prompts", str(prompts)) if shape == "405B" else ()
        code, report = run(tmp_path, "--ckpt", str(folder / "ckpt"), *short)
        shutil.rmtree(folder)
        assert code == 0, report["why"]
        peaks.append(report["peak_anonymous_bytes"])
    assert abs(peaks[1] - peaks[0]) <= 0.05 * peaks[0]


@pytest.mark.parametrize("format_", ["meta", "meta-8", "hf"])
@pytest.mark.parametrize("name", ["tiny", "tiny-3", "tiny-3.2", "tiny-llama2"])
def test_every_family_passes(name: str, format_: str, tmp_path: Path) -> None:
    shape = replace(SHAPES[name], vocab_size=2048, n_layers=2)
    synthesise(shape, tmp_path / "ckpt", format=format_[:4].rstrip("-"), shards=8 if format_ == "meta-8" else 1)
    code, report = run(tmp_path, "--ckpt", str(tmp_path / "ckpt"), "--dtype", "fp32,bf16,fp16")
    assert code == 0, report["why"]
    assert (name == "tiny-3.2") == bool(report["errata"])
