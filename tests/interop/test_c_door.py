"""llama2.c's files in C: a program of 150 lines, written from docs/formats.md alone, computes our logits from them.

python -m pytest tests/interop/test_c_door.py
"""

import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_cases import LLAMA2, make_weights
from nanollama.checkpoint import convert, open_checkpoint, write_bin
from nanollama.model import Transformer

TOKENS = [1, 5, 60, 33, 2, 9, 40, 40, 17]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: install gcc or clang")
    out = tmp_path_factory.mktemp("c") / "llama2c"
    source = Path(__file__).with_name("llama2c.c")
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", "-o", str(out), str(source), "-lm"], check=True)
    return out


def c_logits(program: Path, path: Path) -> torch.Tensor:
    """(T, V)"""
    done = subprocess.run([program, path, *map(str, TOKENS)], capture_output=True, check=True)
    return torch.from_numpy(np.frombuffer(done.stdout, dtype="<f4").reshape(len(TOKENS), -1).copy())


def assert_c_computes_ours(program: Path, path: Path) -> None:
    opened = open_checkpoint(path)
    model = Transformer.from_weights(opened.config, {n: opened.weights[n].clone() for n in opened.weights})
    with torch.inference_mode():
        ours = model(torch.tensor([TOKENS]))[0]
    torch.testing.assert_close(c_logits(program, path), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_c_computes_ours(program: Path, tmp_path: Path, version: int, tied: bool) -> None:
    """GQA, odd sizes; the head tied or not."""
    config = replace(LLAMA2, tied=tied, n_kv_heads=2)
    weights = {n: t / (4 if t.ndim == 2 else 1) for n, t in make_weights(config, torch.float32).items()}
    write_bin(tmp_path / "x.bin", config, weights, version=version)
    assert_c_computes_ours(program, tmp_path / "x.bin")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_trained_model(program: Path, tmp_path: Path, version: int, test_data: Callable[[str], Path]) -> None:
    """The published stories260K file and what convert makes of it."""
    assert_c_computes_ours(program, test_data("stories260K.bin"))
    convert(test_data("stories260K.bin"), tmp_path / "x.bin", "llama2c", version=version)
    assert_c_computes_ours(program, tmp_path / "x.bin")


def test_the_headers_are_as_documented(tmp_path: Path) -> None:
    """Read with struct, by the offsets of docs/formats.md."""
    weights = make_weights(LLAMA2, torch.float32)
    numbers = (48, 80, 2, 4, 4, 64, 32)
    for version in (0, 1, 2):
        write_bin(tmp_path / f"{version}.bin", LLAMA2, weights, version=version)
    v0, v1, v2 = ((tmp_path / f"{version}.bin").read_bytes() for version in (0, 1, 2))
    assert struct.unpack_from("<7i", v0) == (*numbers[:5], -64, 32)  # negative: an untied head
    assert struct.unpack_from("<I8iB", v1) == (0x616B3432, 1, *numbers, 0)
    assert struct.unpack_from("<I8iBi", v2) == (0x616B3432, 2, *numbers, 0, 16)
    assert not any(v1[37:256])
    assert not any(v2[41:256])
    first = weights["tok_embeddings.weight"].numpy().tobytes()
    assert v0[28 : 28 + len(first)] == first
    assert v1[256 : 256 + 4 * 48] == weights["layers.0.attention_norm.weight"].numpy().tobytes()
    angles = np.arange(32)[:, None] / 10_000.0 ** (np.arange(0, 12, 2) / 12)
    tables = np.frombuffer(v0[-4 * (64 * 48 + 32 * 12) : -4 * 64 * 48], dtype="<f4").reshape(2, 32, 6)
    assert np.allclose(tables, [np.cos(angles), np.sin(angles)], atol=1e-5)
