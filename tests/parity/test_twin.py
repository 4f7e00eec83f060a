"""The seeded twin of a checkpoint: what it is in each format."""

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import FAMILIES, FORMATS, LLAMA2, LLAMA31, LLAMA32, holds, make_weights, write
from nanollama.checkpoint import Checkpoint, open_checkpoint
from nanollama.model import ModelConfig
from parity.candidates.nano import twin
from parity.candidates.nano.checkpoint import describe
from parity.contract import UsageError
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

HELD = [(family, format) for family, config in FAMILIES.items() for format in FORMATS if holds(format, config)]


def made(tmp_path: Path, format: str, config: ModelConfig, **options: Any) -> tuple[Path, Path, Checkpoint]:
    """A checkpoint of six layers, its twin, and the twin opened."""
    config = replace(config, n_layers=6)
    path = write(tmp_path, format, config, make_weights(config), **options)
    written = twin.write(describe(str(path), None), tmp_path / "twin")
    return path, written, open_checkpoint(written)


@pytest.mark.parametrize(("family", "format"), HELD)
def test_a_twin_has_its_checkpoints_format_name_and_config_but_four_layers(
    family: str, format: str, tmp_path: Path
) -> None:
    path, written, opened = made(tmp_path, format, FAMILIES[family])
    original = open_checkpoint(path)
    assert written.name == path.name and opened.format == original.format
    assert opened.config == replace(original.config, n_layers=4)
    assert opened.weights.dtypes == {n: original.weights.dtypes[n] for n in opened.weights}


@pytest.mark.parametrize("format", ["meta", "hf"])
def test_a_twins_weights_are_those_of_synth_with_quiet_blocks(format: str, tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny"], vocab_size=300)
    synthesise(shape, tmp_path / "synth", format=format)
    weights = open_checkpoint(tmp_path / "synth").weights
    found = twin.stimulus(open_checkpoint(tmp_path / "synth").config, torch.bfloat16, 0)
    assert list(found) == list(weights)
    for name in weights:
        expected = weights[name] / 8 if name.endswith(("wo.weight", "w2.weight")) else weights[name]
        assert torch.equal(found[name], expected), name
        assert torch.equal(found.rows(name, 3, 7), expected[3:7]), name


def test_a_block_of_rows_is_the_same_however_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parity.synth.checkpoint.BLOCK_ELEMENTS", 7 * LLAMA31.dim)  # blocks of seven rows
    found = twin.stimulus(LLAMA31, torch.float32, 0)
    whole = found["tok_embeddings.weight"]
    assert whole.shape == (LLAMA31.vocab_size, LLAMA31.dim)
    assert torch.equal(found.rows("tok_embeddings.weight", 5, 30), whole[5:30])


def test_synths_own_checkpoints_are_recognised_whatever_their_seed(tmp_path: Path) -> None:
    for seed, format in ((0, "meta"), (9, "hf")):
        synthesise(replace(SHAPES["tiny"], vocab_size=300, n_layers=1), tmp_path / format, format=format, seed=seed)
        assert twin.is_seeded(describe(str(tmp_path / format), None))
    path = write(tmp_path / "trained", "hf", LLAMA31, make_weights(LLAMA31))
    assert not twin.is_seeded(describe(str(path), None))


def test_a_folders_own_keys_and_files_come_along_and_its_weights_do_not(tmp_path: Path) -> None:
    config = replace(LLAMA31, n_layers=6)
    path = write(tmp_path, "hf", config, make_weights(config), max_shard_bytes=100_000)
    own = json.loads((path / "config.json").read_text())
    own |= {"rope_parameters": own.pop("rope_scaling") | {"rope_theta": own.pop("rope_theta")}, "_name_or_path": "me"}
    (path / "config.json").write_text(json.dumps(own))
    (path / "generation_config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"weights")
    written = twin.write(describe(str(path), None), tmp_path / "twin")
    assert json.loads((written / "config.json").read_text()) == own | {"num_hidden_layers": 4}
    names = {file.name for file in written.iterdir()}
    assert {"generation_config.json", "model.safetensors.index.json"} <= names and "pytorch_model.bin" not in names
    files = json.loads((written / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 1 and set(files.values()) <= names


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_a_meta_twin_is_sharded_as_its_checkpoint(split: str, tmp_path: Path) -> None:
    path, written, _ = made(tmp_path, "meta", LLAMA2, shards=2, embedding_split=split)
    shapes = [
        torch.load(f / "consolidated.01.pth", weights_only=True)["tok_embeddings.weight"].shape for f in (path, written)
    ]
    assert shapes[0] == shapes[1] == ((32, 48) if split == "rows" else (64, 24))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_twin_of_llama2c_has_its_version(version: int, tmp_path: Path) -> None:
    path, written, _ = made(tmp_path, "llama2c", LLAMA2, version=version)
    assert written.read_bytes()[:8] == path.read_bytes()[:8] or version == 0
    assert (
        open_checkpoint(written).notices
        == open_checkpoint(path).notices
        == [f"llama2.c version {version}: norm_eps 1e-5 is run.c's"]
    )


@pytest.mark.parametrize(("dtype", "types"), [("q4_1", {"q4_1", "q8_0", "f32"}), ("q8_0", {"q8_0", "f32"})])
def test_a_quantized_gguf_has_a_quantized_twin(dtype: str, types: set[str], tmp_path: Path) -> None:
    config = replace(LLAMA31, dim=128, hidden_dim=160)
    _, written, opened = made(tmp_path, "gguf", config, dtype=dtype)
    header = twin.gguf_header.read(written)
    kinds = [twin.gguf_types.type_of(written, name, tensor.type) for name, tensor in header.tensors.items()]
    assert {kind.name.lower() for kind in kinds} == types
    assert opened.config.rope_scaling == config.rope_scaling


def test_a_training_checkpoint_of_llama2c_has_a_twin(tmp_path: Path) -> None:
    config, args = replace(LLAMA2, n_layers=5), {"dim": 48, "n_layers": 5, "n_heads": 4, "vocab_size": 64}
    args |= {"hidden_dim": 80, "max_seq_len": 32}
    torch.save({"model": make_weights(config, torch.float32), "model_args": args}, tmp_path / "ckpt.pt")
    written = twin.write(describe(str(tmp_path / "ckpt.pt"), None), tmp_path / "twin")
    assert open_checkpoint(written).config == replace(config, n_layers=4)


def test_a_tokenizer_lies_as_near_to_the_twin_as_to_its_checkpoint(llama3_tokenizer_path: Path, tmp_path: Path) -> None:
    config = replace(LLAMA32, vocab_size=128_256, dim=16, n_heads=2, n_kv_heads=1)
    for name in ("inside", "above"):
        path = write(tmp_path / name, "meta", config, make_weights(config))
        at = path if name == "inside" else path.parent
        (at / "tokenizer.model").write_bytes(llama3_tokenizer_path.read_bytes())
        written = twin.write(describe(str(path), None), tmp_path / f"{name}-twin")
        found = open_checkpoint(written).tokenizer
        assert found == (written if name == "inside" else written.parent) / "tokenizer.model"


def test_large_models_get_two_layers() -> None:
    large = ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128_256, hidden_dim=14336)
    small = ModelConfig(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49_152, hidden_dim=1536)
    assert [twin.layers_of(c, torch.bfloat16) for c in (large, small, replace(small, n_layers=1))] == [2, 4, 1]


def test_what_the_file_does_not_say_has_no_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanollama.checkpoint.meta.FACTOR_32_SHAPES", ((64, 6, 8, 2),))  # as 3.2's 1B and 3B
    config = replace(LLAMA32, tied=False)
    path = write(tmp_path, "meta", replace(config, n_layers=6), make_weights(replace(config, n_layers=6)))
    params = json.loads((path / "params.json").read_text())
    del params["rope_scaling_factor"]
    (path / "params.json").write_text(json.dumps(params))
    described = describe(str(path), None)
    assert described.config["rope_scaling"]["factor"] == 32
    with pytest.raises(UsageError, match="rope_scaling is not in the file and would be another with 4 layers"):
        twin.write(described, tmp_path / "twin")


def test_a_full_disk_has_no_room_for_a_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda where: usage(1000))
    with pytest.raises(UsageError, match="GB free"):
        twin.write(describe(str(path), None), tmp_path / "twin")
