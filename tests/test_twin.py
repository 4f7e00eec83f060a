"""The seeded twin of a checkpoint: what it is in each format, and what a check does with it."""

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
from parity import twin as report_of_both
from parity.candidates import twin
from parity.candidates.describe import describe
from parity.check import main
from parity.contract import UsageError
from parity.shapes import SHAPES
from parity.synth import synthesise

PORT = Path(__file__).parent / "ports" / "plain_port.py"
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
def test_a_twins_weights_are_those_of_synth(format: str, tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny"], vocab_size=300)
    synthesise(shape, tmp_path / "synth", format=format)
    weights = open_checkpoint(tmp_path / "synth").weights
    found = twin.stimulus(open_checkpoint(tmp_path / "synth").config, torch.bfloat16, 0)
    assert list(found) == list(weights)
    for name in weights:
        assert torch.equal(found[name], weights[name]), name
        assert torch.equal(found.rows(name, 3, 7), weights[name][3:7]), name


def test_a_block_of_rows_is_the_same_however_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parity.synth.BLOCK_ELEMENTS", 7 * LLAMA31.dim)  # blocks of seven rows
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
    assert {tensor.type.name.lower() for tensor in header.tensors.values()} == types
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


# --- The check -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Meta folder whose states are as large as a trained model's: each embedding row has RMS 64."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shape = replace(SHAPES["tiny"], vocab_size=512, n_layers=5, dim=64, hidden_dim=192)
    synthesise(shape, folder)
    (folder / "SHA256SUMS").unlink()
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    rows = weights["tok_embeddings.weight"].float()
    weights["tok_embeddings.weight"] = (64 * rows / rows.square().mean(-1, keepdim=True).sqrt()).bfloat16()
    weights["layers.0.attention_norm.weight"] *= 2
    torch.save(weights, folder / "consolidated.00.pth")
    return folder


def checked(tmp_path: Path, ckpt: Path, candidate: str, *more: str) -> tuple[int, dict[str, Any]]:
    out, quick = tmp_path / "report.json", ("--references", "meta", "--dtype", "fp32", "--max_new_tokens", "2")
    flags = ("--ckpt", str(ckpt), "--candidate", candidate, "--json", str(out))
    code = main([*flags, *quick, "--checks", "taps,logits,kl,argmax,greedy", *more])
    return code, json.loads(out.read_text())


def test_a_mistake_that_trained_weights_hide_is_found_on_the_twin(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = checked(tmp_path, trained, f"{PORT}:wrong_eps", "--junit", str(tmp_path / "junit.xml"))
    said = capsys.readouterr().out
    failed = {(r["checkpoint"], r["check"]) for r in report["results"] if r["status"] == "fail"}
    assert {("twin", "taps"), ("twin", "logits")} <= failed and {where for where, _ in failed} == {"twin"}
    assert (code, report["verdict"]) == (1, "fail") and report["why"].startswith("on its seeded twin")
    first = report["first_divergence"]
    assert (first["checkpoint"], first["tap"]) == ("twin", "layers.0.attn_norm") and "eps" in first["probable_cause"]
    assert report["twin"]["status"] == "run" and report["twin"]["checkpoint"]["config"]["n_layers"] == 4
    assert "first departs, in the twin, at layers.0.attn_norm" in said
    assert "twin, fp32" in (tmp_path / "junit.xml").read_text()


def test_without_the_twin_it_passes_and_the_report_says_what_goes_unseen(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = checked(tmp_path, trained, f"{PORT}:wrong_eps", "--twin", "off")
    assert (code, report["verdict"]) == (0, "pass")
    assert {r["checkpoint"] for r in report["results"]} == {"given"} and report["twin"]["status"] == "off"
    assert "--twin off: the candidate was not asked for seeded weights; unseen without it" in capsys.readouterr().out


def test_a_right_port_passes_on_both(trained: Path, tmp_path: Path) -> None:
    code, report = checked(tmp_path, trained, f"{PORT}:load")
    assert code == 0, report["why"]
    passed = [r["checkpoint"] for r in report["results"] if r["status"] == "pass"]
    assert report["why"] == f"{len(passed)} results passed, {passed.count('twin')} of them on the seeded twin"
    assert passed.count("twin") == passed.count("given") > 0 and report["first_divergence"] is None


STUBBORN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {ports!r})
from plain_port import load as plain

def fixed(checkpoint, dtype, device):
    return plain({ckpt!r}, dtype, device)

def five(checkpoint, dtype, device):
    if json.loads((Path(checkpoint) / "params.json").read_text())["n_layers"] != 5:
        raise RuntimeError("layer 4 is not there")
    return plain(checkpoint, dtype, device)
"""


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("fixed", "it does not load the checkpoint that it is given"),
        ("five", "load(checkpoint, fp32, cpu) raised RuntimeError: layer 4 is not there (stubborn.py:12)"),
    ],
)
def test_a_candidate_that_has_no_twin_gets_a_plain_word(
    attribute: str, said: str, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.format(ports=str(PORT.parent), ckpt=str(trained)))
    code, report = checked(tmp_path, trained, f"{tmp_path}/stubborn.py:{attribute}")
    assert (code, report["verdict"], report["twin"]["status"]) == (0, "pass", "none")
    assert said in report["twin"]["why"] and any(said in note for note in report["notices"])


@pytest.mark.parametrize(
    ("candidate", "ckpt", "needed"),
    [("http://127.0.0.1:1/v1", "x", True), ("nanollama", "x", False), (f"{PORT}:load", None, False)],
)
def test_servers_nanollama_and_the_embedded_default_have_no_twin(
    candidate: str, ckpt: str | None, needed: bool, tmp_path: Path
) -> None:
    args = type("Args", (), {"ckpt": ckpt, "candidate": candidate, "twin": "on"})()
    path = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))
    found = report_of_both.absent(args, ["logits"], describe(str(path), None))
    assert found is not None and (found.status, found.needed) == ("none", needed)


def bare(verdict: str) -> dict[str, Any]:
    keys = ("seconds", "seconds_in_forward", "peak_anonymous_bytes")
    return {"verdict": verdict, "why": verdict, "results": [], "notices": [], "first_divergence": None} | dict.fromkeys(
        keys, 0
    )


@pytest.mark.parametrize(
    ("own", "other", "both"),
    [
        ("pass", "pass", "pass"), ("pass", "fail", "fail"), ("fail", "pass", "fail"), ("limited", "pass", "limited"),
        ("pass", "limited", "limited"), ("quantized", "quantized", "quantized"), ("quantized", "fail", "fail"),
    ],
)  # fmt: skip
def test_the_worse_verdict_is_that_of_both(own: str, other: str, both: str) -> None:
    assert report_of_both.merge(bare(own), bare(other))["verdict"] == both


def test_a_twin_that_came_to_no_end_limits_the_verdict() -> None:
    ended = report_of_both.Absent("error", "meta ended with signal 9")
    found = report_of_both.merge(bare("pass"), ended)
    assert found["verdict"] == "limited" and found["results"][0]["checkpoint"] == "twin"
    assert report_of_both.merge(bare("fail"), ended)["verdict"] == "fail"
