"""What people give in place of a checkpoint: it opens where it holds one, else one line says what to give instead."""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import LLAMA2, LLAMA31, make_weights, write
from nanollama.checkpoint import CheckpointError, open_checkpoint, sniff, write_gguf
from nanollama.checkpoint.adapter import Adapter, write_adapter
from nanollama.checkpoint.names import hf_name, to_hf_rows, weight_shapes
from nanollama.model import ModelConfig

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n"
PAGE = "<!doctype html>\n<html class=''><head><title>Hugging Face</title></head></html>\n"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write(tmp_path, "gguf", LLAMA31, make_weights(LLAMA31))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "damaged" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["sha256-61ed3f9e", "model", "model.bin", "model.pt", "x.Q4_K_M.gguf.1"])
def test_a_gguf_file_opens_whatever_its_name(gguf: Path, name: str) -> None:
    assert open_checkpoint(gguf.rename(gguf.with_name(name))).config == LLAMA31


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_llama2c_file_opens_whatever_its_name(tmp_path: Path, version: int) -> None:
    path = write(tmp_path, "llama2c", LLAMA2, make_weights(LLAMA2, torch.float32), version=version)
    assert open_checkpoint(path.rename(tmp_path / "stories")).config == LLAMA2


def test_a_training_checkpoint_opens_whatever_its_name(tmp_path: Path) -> None:
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")
    args = {key: getattr(LLAMA2, key) for key in keys}
    torch.save({"model": make_weights(LLAMA2), "model_args": args}, tmp_path / "ckpt.pth")
    assert open_checkpoint(tmp_path / "ckpt.pth").config == LLAMA2


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "model.bin", "model"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS.encode(), ["git-lfs pointer", "`git lfs pull`"]),
        (PAGE.encode(), ["web page", "download it again"]),
        (b"\xef\xbb\xbf\n  <HTML>", ["web page"]),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ["web page"]),
        (b"Entry not found", ["server's refusal", "download it again"]),
        (b'{"error":"Invalid credentials"}', ["server's refusal"]),
        (b"", ["is empty", "download it again"]),
        (b"lmgg" + bytes(100), ["before GGUF", "get a GGUF"]),
        (b"tjgg\3\0\0\0" + bytes(100), ["before GGUF"]),
        (b"\x1f\x8b\x08" + bytes(100), ["packed archive", "unpack it"]),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian", "gguf-convert-endian"]),
        (b"GGUF" + struct.pack("<IIIQ", 1, 0, 0, 0), ["GGUF version 1", "get a newer file"]),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), ["GGUF version 4"]),
    ],
)
def test_files_that_are_no_model_say_what_they_are(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, *words)


@pytest.mark.parametrize("suffix", [".part", ".incomplete", ".crdownload", ".download"])
def test_an_unfinished_download_is_called_one(gguf: Path, tmp_path: Path, suffix: str) -> None:
    half = gguf.rename(tmp_path / f"model.gguf{suffix}")
    refused(half, "unfinished download")
    (tmp_path / "folder").mkdir()
    half.rename(tmp_path / "folder" / half.name)
    refused(tmp_path / "folder", half.name, "unfinished download")


def test_a_half_file_in_a_folder_is_an_unfinished_download(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").rename(hf / "model.safetensors.incomplete")
    refused(hf, "model.safetensors.incomplete", "unfinished download")
    meta = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31))
    (meta / "params.json").rename(meta / "params.json.part")
    refused(meta, "params.json.part", "unfinished download")


@pytest.mark.parametrize("content", [LFS, PAGE, ""])
@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "tokenizer.json", "tokenizer.model"])
def test_files_inside_a_folder_that_are_none_say_so(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, "meta" if name.endswith("pth") else "hf", LLAMA31, make_weights(LLAMA31))
    (path / name).write_text(content)
    refused(path, name, {LFS: "git lfs pull", PAGE: "web page", "": "is empty"}[content])


def test_one_file_of_a_folder_names_the_folder(hf: Path, tmp_path: Path) -> None:
    refused(hf / "model.safetensors", f"give its folder, {hf}")
    refused(hf / "config.json", f"give its folder, {hf}")
    (hf / "model.safetensors").rename(tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "config.json")
    meta = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31))
    refused(meta / "consolidated.00.pth", "params.json", "give its folder")


def test_a_folder_with_one_gguf_opens_it(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "._x.gguf").write_bytes(b"written by macOS")
    (tmp_path / "config.json").write_text("{}")  # as many repositories have it beside the .gguf
    assert sniff(tmp_path) == "gguf"
    assert open_checkpoint(tmp_path).path == gguf
    shutil.copy(gguf, tmp_path / "y.gguf")
    refused(tmp_path, "holds 2 models", "x.gguf, y.gguf")


def test_a_folder_of_pickles_says_the_command_that_converts_it(tmp_path: Path, capfd: Any) -> None:
    """The command is run as it stands; what it writes opens."""
    hf = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))
    weights = make_weights(LLAMA31)
    renamed = {
        hf_name(n): to_hf_rows(t, LLAMA31.head_dim) if n.endswith(("wq.weight", "wk.weight")) else t
        for n, t in weights.items()
    }
    torch.save(renamed, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    refused(hf, "pytorch_model.bin", "safetensors", "python -c")
    refused(hf / "pytorch_model.bin", "python -c")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(hf)
    code = str(caught.value).split('"')[1]
    exec(code.rpartition("; T.")[0])  # without the tokenizer, which this model lacks
    opened = open_checkpoint(f"{hf}-safetensors")
    assert all(torch.equal(opened.weights[name], weights[name]) for name in weights)


def test_a_zip_that_is_no_torch_file_is_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model/config.json", "{}")
    refused(tmp_path / "model.zip", "packed archive", "unpack it")


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-1B", ""])
def test_an_adapter_given_as_the_checkpoint_names_its_base(tmp_path: Path, base: str) -> None:
    name = "layers.0.attention.wq.weight"
    pairs = {name: (torch.ones(2, 64), torch.ones(weight_shapes(LLAMA31)[name][0], 2))}
    write_adapter(tmp_path / "adapter", Adapter(pairs, dict.fromkeys(pairs, 4.0)), LLAMA31, base=base)
    refused(tmp_path / "adapter", "LoRA adapter", f"--ckpt {base or 'BASE'} --adapter {tmp_path / 'adapter'}")
    refused(tmp_path / "adapter" / "adapter_model.safetensors", "give its folder")


def test_a_finetuning_folder_names_its_final_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = out / "checkpoints" / "step_00000010"
    state.mkdir(parents=True)
    (out / "config.json").write_text('{"entry": "tinystories"}')
    (state / "model.safetensors").write_bytes(b"")
    (state / "state.json").write_text("{}")
    refused(out, "has not ended", "--resume")
    refused(state, "state of a finetuning run", "final")
    write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31)).rename(out / "final")
    refused(out, f"give its model, {out / 'final'}")


@pytest.fixture
def cache(tmp_path: Path, hf: Path) -> Path:
    """A hub cache: one repository with one whole snapshot, linked to its blobs, and one of the config alone."""
    folder = tmp_path / "hub" / "models--org--name"
    for name in ("blobs", "refs", "snapshots/aaaa", "snapshots/bbbb"):
        (folder / name).mkdir(parents=True)
    for i, path in enumerate(sorted(hf.iterdir())):
        os.replace(path, folder / "blobs" / str(i))
        (folder / "snapshots" / "aaaa" / path.name).symlink_to(Path("../../blobs") / str(i))
    (folder / "snapshots" / "bbbb" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("main", ["aaaa", "bbbb", None])
def test_a_folder_of_the_hub_cache_opens_its_snapshot(cache: Path, main: str | None) -> None:
    if main:
        (cache / "refs" / "main").write_text(main)
    opened = open_checkpoint(cache)
    assert (opened.config, opened.path.name) == (LLAMA31, "aaaa")


def test_a_folder_of_the_hub_cache_without_a_whole_snapshot_says_what_to_do(cache: Path) -> None:
    shutil.copytree(cache / "snapshots" / "aaaa", cache / "snapshots" / "cccc", symlinks=True)
    refused(cache, "2 snapshots with weights", "aaaa, cccc")
    refused(cache.parent, "holds no model itself", str(cache))
    shutil.rmtree(cache / "blobs")
    refused(cache, "0 snapshots with weights", "`hf download org/name`")


def test_a_folder_of_folders_names_the_models_in_it(tmp_path: Path) -> None:
    inner = write(tmp_path / "7b", "meta", LLAMA31, make_weights(LLAMA31))
    refused(tmp_path / "7b", f"give {inner}")


TOKENS = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=32_000, hidden_dim=256)


def test_llama_2_has_its_tokenizer_one_folder_above(tmp_path: Path, test_data: Callable[[str], Path]) -> None:
    path = write(tmp_path, "meta", TOKENS, make_weights(TOKENS))
    shutil.copy(test_data("llama2_tokenizer.model"), tmp_path / "tokenizer.model")
    opened = open_checkpoint(path)
    assert opened.tokenizer == tmp_path / "tokenizer.model"
    assert any("one above" in notice for notice in opened.notices)
    other = write(tmp_path / "other", "meta", LLAMA31, make_weights(LLAMA31))
    shutil.copy(test_data("llama2_tokenizer.model"), tmp_path / "other" / "tokenizer.model")
    assert open_checkpoint(other).tokenizer is None  # of another vocabulary
    shutil.copy(test_data("llama2_tokenizer.model"), path / "tokenizer.model")
    assert open_checkpoint(path).tokenizer == path / "tokenizer.model"


@pytest.mark.parametrize(("more", "expected"), [(0, "tokenizer.model"), (3, "tokenizer.json")])
def test_a_tokenizer_json_with_more_tokens_goes_before_the_model(
    tmp_path: Path, test_data: Callable[[str], Path], more: int, expected: str
) -> None:
    path = write(tmp_path, "hf", TOKENS, make_weights(TOKENS), tokenizer=test_data("llama2_tokenizer.model"))
    shutil.copy(test_data("llama2_tokenizer.model"), path / "tokenizer.model")
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] += [{"id": 32_000 + i, "content": f"<x{i}>", "special": True} for i in range(more)]
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert open_checkpoint(path).tokenizer == path / expected


def test_keys_that_nothing_reads_open_with_a_notice(tmp_path: Path) -> None:
    path = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31))
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps({**params, "release": "x", "max_batch_size": 4}))
    opened = open_checkpoint(path)
    assert opened.config == LLAMA31
    assert [notice for notice in opened.notices if "release" in notice and "max_batch" not in notice]


def test_a_gguf_of_a_file_name_with_spaces_and_no_suffix_is_converted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "my model", LLAMA31, make_weights(LLAMA31))
    assert sniff(tmp_path / "my model") == "gguf"
