"""parity.kit --unpack: weights as programs open them, sequences as llm.c's states, and a C program that reads both."""

import struct
import subprocess
from pathlib import Path

import pytest
import torch

import kit_cases
from benchmarks.kit_ports import Missing, departs, found
from nanollama.checkpoint import open_checkpoint
from parity.candidates.nano.folder import write_each
from parity.kit import make as command
from parity.kit.arrays import Kit

SOURCE = Path(__file__).parents[1] / "ports" / "kit_bin.c"
LLAMA2 = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "hidden_dim": 16, "vocab_size": 11,
          "norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": None, "tied": False}  # fmt: skip


def test_checkpoints_hold_the_kits_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit = Kit(kit_cases.made()[1])
    assert command.main(["--unpack", str(kit.folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "model.bin    not written: norm_eps is 2e-05, llama2.c's programs compute with 1e-05" in printed
    assert not (tmp_path / "out" / "model.bin").exists()
    for name in ("hf", "meta"):
        opened = open_checkpoint(tmp_path / "out" / name).weights
        held = {n: kit.get(n) for n, array in kit.arrays.items() if array.file == "weights.f32"}
        assert set(opened) == set(held) and all(torch.equal(opened[n], held[n]) for n in held)


def test_a_state_is_laid_out_as_llm_c_reads_it(tmp_path: Path) -> None:
    kit = Kit(kit_cases.made()[1])
    assert command.main(["--unpack", str(kit.folder), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("state.*.bin"))) == len(kit.table["sequences"])
    data, begin, length = (tmp_path / "out" / "state.1.bin").read_bytes(), kit.starts[1], kit.table["sequences"][1]
    assert struct.unpack_from("<4i", data) == (20240327, 2, 1, length)
    numbers = torch.frombuffer(bytearray(data[1024:]), dtype=torch.int32)
    x, y, rest = numbers[:length], numbers[length : 2 * length], numbers[2 * length :].view(torch.float32)
    assert torch.equal(x, kit.get("tokens")[begin : begin + length])
    assert y.tolist() == [*x[1:].tolist(), -100]
    exact = kit.get("logits")[begin : begin + length]
    assert torch.equal(rest[:-1].view(length, -1), exact.float())
    loss = torch.nn.functional.cross_entropy(exact[:-1], x[1:].long())
    assert float(rest[-1]) == pytest.approx(float(loss), rel=1e-6)


def test_model_bin_is_written_where_llama2_c_computes_the_same(tmp_path: Path) -> None:
    kv, generator = 4, torch.Generator().manual_seed(0)
    sizes = {"attention.wq": (8, 8), "attention.wk": (kv, 8), "attention.wv": (kv, 8), "attention.wo": (8, 8),
             "feed_forward.w1": (16, 8), "feed_forward.w2": (8, 16), "feed_forward.w3": (16, 8),
             "attention_norm": (8,), "ffn_norm": (8,)}  # fmt: skip
    shapes = {f"layers.0.{name}.weight": size for name, size in sizes.items()}
    shapes |= {"tok_embeddings.weight": (11, 8), "norm.weight": (8,), "output.weight": (11, 8)}
    weights = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    assert write_each(tmp_path, LLAMA2, weights, 5) == {"hf": "", "meta": "", "model.bin": ""}
    assert struct.unpack_from("<7i", (tmp_path / "model.bin").read_bytes()) == (8, 16, 1, 2, 1, -11, 5)
    lacking = write_each(tmp_path / "again", LLAMA2 | {"rope_theta": 500_000.0}, weights, 5)
    assert lacking["hf"] == "" and "rope_theta is 500000.0" in lacking["model.bin"]


BAD_USAGE = [
    ([], "--out DIR"),
    (["--out", "x", "--ckpt", "y"], "--ckpt"),
    (["--out", "x", "--check", "y"], "--check"),
    (["--out", "x", "--unpack", "/nowhere"], "--unpack /nowhere: is no kit"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_USAGE)
def test_bad_usage_is_one_line(
    flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main([*([] if "--unpack" in flags else ["--unpack", "kit"]), *flags]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_program_that_reads_as_llama2_c_and_llm_c_passes_and_its_mistakes_fail(tmp_path: Path) -> None:
    kit = Kit(kit_cases.family() / "llama2")
    try:
        compiler = found(("cc", "gcc", "clang"))
    except Missing as missing:
        pytest.skip(str(missing))
    program, files = tmp_path / "kit_bin", tmp_path / "files"
    subprocess.run(
        [compiler, "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE, "-lm"], check=True
    )
    assert command.main(["--unpack", str(kit.folder), "--out", str(files)]) == 0
    for mistake in ("", "eps", "pairing", "swapped", "position", "cache", "residual"):
        out = tmp_path / f"out {mistake}"
        out.mkdir()
        done = subprocess.run(
            [program, files, out, *filter(None, [mistake])], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("4 states: logits within ")
        assert departs(kit, out) == (("fail", "logits") if mistake else ("pass", None)), mistake
