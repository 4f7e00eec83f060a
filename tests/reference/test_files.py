"""The references' own reader: what real releases contain is read, what is broken is refused in one line."""

import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.files import Checkpoint, open_folder
from reference.files.hf import hf_name, meta_name
from reference.files.weights import Unusable, half_split_rows, interleaved_rows
from reference_checkpoints import Shape, make_weights, params_json, write_hf, write_meta

SHAPE = Shape()
SHARDED = Shape(n_heads=16, n_kv_heads=8, head_dim=4, vocab_size=320)


def assert_holds(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    assert set(checkpoint.weights) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.weights[name], weight), name
        assert checkpoint.weights.crc32(name) == zlib.crc32(weight.contiguous().view(torch.uint8).numpy().tobytes())
        assert torch.equal(checkpoint.weights.rows(name, 3, 11), weight[3:11]), name


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("llama2", [False, True])
def test_shards_merge_to_the_weights_that_were_split(tmp_path: Path, shards: int, llama2: bool) -> None:
    weights = make_weights(SHARDED)
    checkpoint = open_folder(write_meta(tmp_path / "meta", SHARDED, weights, shards=shards, llama2=llama2))
    assert_holds(checkpoint, weights)
    assert checkpoint.config["rope_theta"] == (10000.0 if llama2 else 500000.0)
    assert checkpoint.config["vocab_size"] == 320


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("old_rope", [False, True])
def test_hugging_face_rows_come_back_in_metas_order(tmp_path: Path, files: int, old_rope: bool) -> None:
    weights = make_weights(SHAPE)
    checkpoint = open_folder(write_hf(tmp_path / "hf", SHAPE, weights, files=files, old_rope=old_rope))
    assert_holds(checkpoint, weights)
    meta = open_folder(write_meta(tmp_path / "meta", SHAPE, weights))
    assert checkpoint.config == meta.config
    wanted = checkpoint.weights.load("layers.0.attention.wq.weight", torch.float32, layout="hf")
    assert torch.equal(meta.weights.load("layers.0.attention.wq.weight", torch.float32, layout="hf"), wanted)


@given(n_heads=st.integers(1, 6), pairs=st.integers(1, 9))
def test_row_orders_are_inverse(n_heads: int, pairs: int) -> None:
    rows = torch.arange(n_heads * pairs * 2)
    assert torch.equal(half_split_rows(n_heads, 2 * pairs)[interleaved_rows(n_heads, 2 * pairs)], rows)


def test_names_translate_both_ways() -> None:
    for name in make_weights(SHAPE):
        assert meta_name(hf_name(name)) == name


def test_tied_files_have_one_matrix(tmp_path: Path) -> None:
    shape = replace(SHAPE, tied=True)
    checkpoint = open_folder(write_hf(tmp_path / "hf", shape, make_weights(shape)))
    assert checkpoint.config["tied"] is True
    assert "output.weight" not in checkpoint.weights
    assert checkpoint.head == "tok_embeddings.weight"


def test_the_original_folder_of_a_hub_copy_is_found(tmp_path: Path) -> None:
    write_meta(tmp_path / "copy" / "original", SHAPE, make_weights(SHAPE))
    (tmp_path / "copy" / "original" / "tokenizer.model").touch()
    checkpoint = open_folder(tmp_path / "copy")
    assert checkpoint.format == "meta"
    assert checkpoint.find("tokenizer.model") == tmp_path / "copy" / "original" / "tokenizer.model"


@pytest.mark.parametrize(
    ("dim", "n_layers", "n_heads", "factor"), [(2048, 16, 32, 32), (3072, 28, 24, 32), (2048, 2, 32, 8)]
)
def test_published_32_shapes_scale_by_32(tmp_path: Path, dim: int, n_layers: int, n_heads: int, factor: int) -> None:
    shape = Shape(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8, vocab_size=16, head_dim=dim // n_heads)
    params = params_json(shape, ffn_dim_multiplier=0.01)
    hidden = 16 * -(-int(0.01 * int(8 * dim / 3)) // 16)
    shapes = {name: weight.shape for name, weight in make_weights(Shape(n_layers=n_layers)).items()}
    sizes = {64: dim, 176: hidden, 32: 8 * shape.head_dim, 301: 16}  # of the tiny shape -> of this one
    one = torch.ones(1, dtype=torch.bfloat16)  # expanded weights take no room in the file
    weights = {name: one.expand([sizes[size] for size in shape]) for name, shape in shapes.items()}
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(weights, folder / "consolidated.00.pth")
    checkpoint = open_folder(folder)
    assert checkpoint.config["rope_scaling"]["factor"] == factor
    assert len(checkpoint.notices) == (factor == 32)


def test_a_factor_in_params_json_wins(tmp_path: Path) -> None:
    shape = replace(SHAPE, factor=4.0)
    assert open_folder(write_meta(tmp_path / "m", shape, make_weights(shape))).config["rope_scaling"]["factor"] == 4


def test_shards_that_should_repeat_a_head_and_differ_are_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", SHARDED, make_weights(SHARDED), shards=16)
    edit_shard(folder, lambda shard: shard["layers.0.attention.wk.weight"].add_(1), shard=3)
    with pytest.raises(Unusable, match="shards 2 and 3"):
        open_folder(folder).weights["layers.0.attention.wk.weight"]


class Payload:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, ("open('executed', 'w')",)


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_shard(folder: Path, edit: Callable[[dict[str, Tensor]], object], shard: int = 0) -> None:
    path = folder / f"consolidated.{shard:02d}.pth"
    weights = torch.load(path, weights_only=True)
    edit(weights)
    torch.save(weights, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


BROKEN_META: dict[str, tuple[Callable[[Path], object], str]] = {
    "params not JSON": (lambda f: (f / "params.json").write_text("{dim: 4"), "is not JSON"),
    "params a list": (lambda f: (f / "params.json").write_text("[]"), "expected an object"),
    "params not text": (lambda f: (f / "params.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "no dim": (lambda f: edit_json(f / "params.json", dim=...), "'dim'"),
    "no norm_eps": (lambda f: edit_json(f / "params.json", norm_eps=...), "'norm_eps'"),
    "dim a string": (lambda f: edit_json(f / "params.json", dim="64"), "dim should be a positive integer"),
    "negative layers": (lambda f: edit_json(f / "params.json", n_layers=-2), "n_layers"),
    "odd heads": (lambda f: edit_json(f / "params.json", n_heads=5), "n_heads"),
    "uneven kv heads": (lambda f: edit_json(f / "params.json", n_kv_heads=3), "kv heads"),
    "unknown key": (lambda f: edit_json(f / "params.json", moe_args={"experts": 8}), "'moe_args'"),
    "quantized": (lambda f: edit_json(f / "params.json", quantization_args={"group_size": 32}), "quantization_args"),
    "truncated": (lambda f: truncate(f / "consolidated.00.pth"), "is truncated or not a .pth"),
    "empty": (lambda f: (f / "consolidated.00.pth").write_bytes(b""), "is empty"),
    "no shard": (lambda f: (f / "consolidated.00.pth").unlink(), "no consolidated.NN.pth"),
    "second shard alone": (lambda f: (f / "consolidated.00.pth").rename(f / "consolidated.01.pth"), "is missing"),
    "missing tensor": (lambda f: edit_shard(f, lambda w: w.pop("norm.weight")), "tensor norm.weight is missing"),
    "extra tensor": (lambda f: edit_shard(f, lambda w: w.update({"bias": torch.ones(2)})), "tensor bias"),
    "misshapen": (
        lambda f: edit_shard(f, lambda w: w.update({"norm.weight": torch.ones(63)})),
        "norm.weight has shape",
    ),
    "integers": (lambda f: edit_shard(f, lambda w: w.update({"norm.weight": torch.ones(64).long()})), "torch.int64"),
    "not a dict": (lambda f: torch.save([1], f / "consolidated.00.pth"), "not a plain state dict"),
    "not tensors": (lambda f: torch.save({"model": {}}, f / "consolidated.00.pth"), "not a plain tensor"),
    "payload": (
        lambda f: torch.save({"a": Payload()}, f / "consolidated.00.pth"),
        "it asks for builtins.eval|__builtin__.eval",
    ),
    "old pickle": (lambda f: (f / "consolidated.00.pth").write_bytes(pickle.dumps(Payload())), "not a .pth"),
    "two formats": (lambda f: (f / "config.json").write_text("{}"), "both params.json and config.json"),
}

BROKEN_HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "config not JSON": (lambda f: (f / "config.json").write_text(""), "is not JSON"),
    "no width": (lambda f: edit_json(f / "config.json", intermediate_size=...), "'intermediate_size'"),
    "other model": (lambda f: edit_json(f / "config.json", model_type="mistral"), "model_type"),
    "biased": (lambda f: edit_json(f / "config.json", attention_bias=True), "attention_bias"),
    "quantized": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "quantization_config"),
    "unknown scaling": (lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    "scaling lacks a number": (
        lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "llama3"}),
        "factor",
    ),
    "scalings disagree": (lambda f: edit_json(f / "config.json", rope_scaling={"rope_type": "linear"}), "disagree"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "not a readable safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no such file"),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "index leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "leads out of the folder",
    ),
    "tied in name only": (lambda f: edit_json(f / "config.json", tie_word_embeddings=True), "ties the embeddings"),
    "other vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=302), "tok_embeddings.weight has shape"),
}


@pytest.mark.parametrize("broken", BROKEN_META)
def test_broken_meta_folder_is_refused_in_one_line(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_meta(tmp_path / "meta", SHAPE, make_weights(SHAPE))
    breaking, message = BROKEN_META[broken]
    breaking(folder)
    with pytest.raises(Unusable, match=message) as refusal:
        open_folder(folder)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("broken", BROKEN_HF)
def test_broken_hugging_face_folder_is_refused_in_one_line(tmp_path: Path, broken: str) -> None:
    folder = write_hf(tmp_path / "hf", SHAPE, make_weights(SHAPE))
    breaking, message = BROKEN_HF[broken]
    breaking(folder)
    with pytest.raises(Unusable, match=message) as refusal:
        open_folder(folder)
    assert "\n" not in str(refusal.value)


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(Unusable, match=r"neither params\.json"):
        open_folder(tmp_path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact")
    write_meta(root / "meta", SHAPE, make_weights(SHAPE))
    write_hf(root / "hf", SHAPE, make_weights(SHAPE))
    return root


@settings(max_examples=80)
@given(data=st.data())
def test_any_damaged_byte_is_refused_or_readable(
    intact: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Neither a crash nor another exception: a flipped byte or a cut is refused, or the tensors can still be read."""
    kind, name = data.draw(
        st.sampled_from(
            [
                ("meta", "params.json"),
                ("meta", "consolidated.00.pth"),
                ("hf", "config.json"),
                ("hf", "model.safetensors"),
            ]
        )
    )
    content = bytearray((intact / kind / name).read_bytes())
    near_edges = st.one_of(
        st.integers(0, min(4000, len(content) - 1)), st.integers(max(0, len(content) - 4000), len(content) - 1)
    )
    place = data.draw(st.one_of(near_edges, st.integers(0, len(content) - 1)))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    folder = tmp_path_factory.mktemp("damaged")
    for path in (intact / kind).iterdir():
        (folder / path.name).write_bytes(bytes(content) if path.name == name else path.read_bytes())
    try:
        checkpoint = open_folder(folder)
    except Unusable:
        return
    for weight in checkpoint.weights:
        checkpoint.weights.crc32(weight)
