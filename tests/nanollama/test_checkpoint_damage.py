"""Writers that refuse, checksums, damaged headers, and hundreds of damaged files."""

import random
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fuzz_readers
from checkpoint_cases import LLAMA31, make_weights, write
from nanollama import __main__ as commands
from nanollama.checkpoint import (
    CheckpointError,
    convert,
    open_checkpoint,
    verify,
    write_bin,
    write_meta,
)
from nanollama.checkpoint.integrity import MANIFESTS, file_digest
from parity.synth.checkpoint import write_manifest

READERS = ("pth", "params.json", "safetensors", "config.json", "index.json", "gguf", "gguf q4_1")
READERS += ("bin v0", "bin v1", "bin v2", "pt")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31))


def refused(path: Path, part: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert part in str(caught.value)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_checksums(meta: Path, algorithm: str) -> None:
    assert verify(meta) == []
    write_manifest(meta)
    names = ["consolidated.00.pth", "params.json"]
    if algorithm == "md5":
        (meta / "SHA256SUMS").unlink()
        (meta / "checklist.chk").write_text("".join(f"{file_digest(meta / n, 'md5')}  {n}\n" for n in names))
    assert verify(meta) == names
    (manifest,) = [n for n, a in MANIFESTS.items() if a == algorithm]
    with open(meta / "consolidated.00.pth", "r+b") as file:
        file.seek(-3000, 2)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=f"consolidated.00.pth: has {algorithm} .* {manifest}"):
        verify(meta)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match="is listed in"):
        verify(meta)
    (meta / manifest).write_text("0" * 64 + "  ../../etc/passwd\n")
    with pytest.raises(CheckpointError, match="digest and file name"):
        verify(meta)


def test_writers_refuse_what_their_format_cannot_say(tmp_path: Path) -> None:
    weights = make_weights(LLAMA31)
    with pytest.raises(CheckpointError, match=r"norm_eps is 2e-05, llama2.c's programs compute with 1e-05"):
        write_bin(tmp_path / "x.bin", LLAMA31, weights)
    with pytest.raises(CheckpointError, match="3 shards"):
        write_meta(tmp_path / "x", LLAMA31, weights, shards=3)
    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight has shape \(96, 64\)"):
        write_meta(tmp_path / "x", replace(LLAMA31, vocab_size=95), weights)
    with pytest.raises(CheckpointError, match="head_dim 10"):
        write_meta(tmp_path / "x", replace(LLAMA31, head_dim=10), weights)
    with pytest.raises(CheckpointError, match=r"norm.weight: holds numbers beyond fp16's 65504"):
        write_meta(tmp_path / "x", LLAMA31, weights | {"norm.weight": torch.full((64,), 1e6)}, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left
    path = write(tmp_path, "meta", LLAMA31, weights)
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        write_meta(path, LLAMA31, weights)
    for options in ({"dtype": "q8_0"}, {"version": 1}, {"dtype": "int8"}):
        with pytest.raises(CheckpointError):
            convert(path, tmp_path / "y", "meta", **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"must end in \.gguf"):
        convert(path, tmp_path / "y", "gguf")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (struct.pack("<7i", -64, 172, 5, 8, 4, 512, 512), "dim -64"),
        (struct.pack("<7i", 64, 172, 2**31 - 1, 8, 4, 512, 512), "its header asks for"),
        (struct.pack("<7i", 2**31 - 1, 2**31 - 1, 2**31 - 1, 1, 1, 2**31 - 1, 2**31 - 1), "odd|multiple|asks for"),
        (struct.pack("<Ii", 0x616B3432, 9).ljust(256, b"\0"), "version 9"),
        (struct.pack("<Ii7iBi", 0x616B3432, 2, 64, 172, 5, 8, 4, 512, 512, 1, -4).ljust(256, b"\0"), "group size -4"),
        (b"abc", "truncated"),
    ],
)
def test_llama2c_headers(tmp_path: Path, header: bytes, part: str) -> None:
    (tmp_path / "x.bin").write_bytes(header + bytes(100) if len(header) > 3 else header)
    with pytest.raises(CheckpointError, match=part):
        open_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors cannot fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "keys cannot fit"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**50) + bytes(40), "bytes of text cannot fit"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**55) + bytes(40), "texts cannot fit"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGML" + bytes(30), "begins with"),
        (b"GGUF", "truncated"),
        (b"", "is empty"),
    ],
)
def test_gguf_headers(tmp_path: Path, data: bytes, part: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    refused(tmp_path / "x.gguf", part)


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_refused_or_unharmed_or_caught_by_the_manifest(tmp_path: Path, reader: str) -> None:
    """60 of each kind; a planted pickle payload is in test_checkpoint_strict."""
    target = fuzz_readers.targets(tmp_path)[reader]
    folder = target.path if target.path.is_dir() else target.path.parent
    expected = fuzz_readers.attempt(target.path)
    assert expected is not None
    weights = {name: tensor.clone() for name, tensor in expected.weights.items()}
    write_manifest(folder)
    original = target.file.read_bytes()
    for i in range(60):
        target.file.write_bytes(fuzz_readers.damage(original, target, random.Random(f"{reader} {i}")))
        opened = fuzz_readers.attempt(target.path)
        if opened is None:
            continue
        same = opened.config == expected.config and all(torch.equal(opened.weights[n], t) for n, t in weights.items())
        if not same:
            with pytest.raises(CheckpointError, match=target.file.name):
                verify(target.path)


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS)
def test_fuzz_20000_inputs(reader: str) -> None:
    """In its own process, whose memory is limited: an allocation by an absurd count would fail there."""
    command = [sys.executable, fuzz_readers.__file__, "--readers", reader, "--inputs", "20000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_inspect_compares_files_with_their_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))
    write_manifest(path)
    commands.inspect(str(path))
    assert "verified: config.json, model.safetensors match their checksums" in capsys.readouterr().out
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: has sha256 .* download it again"):
        commands.inspect(str(path))
