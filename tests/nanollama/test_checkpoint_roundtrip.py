"""Every format into every other and back: weights bit-equal, config equal, tokenizer ids equal."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint_cases import FAMILIES, FORMATS, LLAMA2, LLAMA31, assert_same, holds, make_weights, write
from nanollama import __main__ as commands
from nanollama.checkpoint import CheckpointError, convert, open_checkpoint
from nanollama.checkpoint.adapter import Adapter, merged, write_adapter
from nanollama.checkpoint.llama2c import quantize_groups
from nanollama.checkpoint.names import to_hf_rows, to_meta_rows
from nanollama.model import ModelConfig, RopeScaling
from nanollama.tokenizer import open_tokenizer

DESTINATION = {"meta": "out", "hf": "out", "gguf": "out.gguf", "llama2c": "out.bin"}


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# llama2.c's programs fix the epsilon and the RoPE base, so only Llama 2 goes there; the refusal is tested elsewhere.
@pytest.mark.parametrize(
    ("family", "source", "target"),
    [
        (family, source, target)
        for family, config in FAMILIES.items()
        for source, target in itertools.permutations(FORMATS, 2)
        if holds(source, config) and holds(target, config)
    ],
)
def test_every_pair_of_formats(tmp_path: Path, family: str, source: str, target: str) -> None:
    config = FAMILIES[family]
    dtype = torch.float32 if "llama2c" in (source, target) else torch.bfloat16
    weights = make_weights(config, dtype)
    path = write(tmp_path, source, config, weights)
    assert_same(open_checkpoint(path), config, weights, dtype)
    assert_same(convert(path, tmp_path / DESTINATION[target], target), config, weights, dtype)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    n_kv_heads = draw(st.sampled_from([1, 2, 4]))
    n_heads = n_kv_heads * draw(st.sampled_from([1, 2, 4]))
    scaling = st.builds(
        RopeScaling,
        factor=st.sampled_from([2.0, 8.0, 32.0]),
        low_freq_factor=st.sampled_from([1.0, 1.5]),
        high_freq_factor=st.sampled_from([4.0, 3.25]),
        original_context=st.sampled_from([64, 8192]),
    )
    return ModelConfig(
        dim=n_heads * 2 * draw(st.integers(1, 5)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=draw(st.integers(1, 70)),
        hidden_dim=draw(st.integers(1, 90)),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6, 2e-5])),
        rope_theta=draw(st.sampled_from([10_000.0, 500_000.0, 1_234_567.0])),
        rope_scaling=draw(st.none() | scaling),
        tied=draw(st.booleans()),
        max_seq_len=draw(st.integers(1, 200_000)),
    )


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_shape_survives_a_tour_of_the_formats(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, dtype: torch.dtype
) -> None:
    weights, folder = make_weights(config, dtype), tmp_path_factory.mktemp("tour")
    first = write(folder, "meta", config, weights)
    assert_same(convert(first, folder / "hf", "hf"), config, weights, dtype)
    assert_same(convert(folder / "hf", folder / "x.gguf", "gguf"), config, weights, dtype)
    assert_same(convert(folder / "x.gguf", folder / "back", "meta"), config, weights, dtype)


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("split", ["rows", "columns"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_merge_bit_for_bit(tmp_path: Path, shards: int, split: str, tied: bool) -> None:
    config = replace(LLAMA31, n_heads=16, head_dim=4, tied=tied)
    weights = make_weights(config)
    path = write(tmp_path, "meta", config, weights, shards=shards, embedding_split=split)
    assert len(list(path.glob("*.pth"))) == shards
    assert_same(open_checkpoint(path), config, weights, None)


def test_small_safetensors_shards_carry_an_index(tmp_path: Path) -> None:
    weights = make_weights(LLAMA31)
    path = write(tmp_path, "hf", LLAMA31, weights, max_shard_bytes=30_000)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 3
    assert_same(open_checkpoint(path), LLAMA31, weights, None)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("format", ["meta", "hf", "gguf"])
def test_conversion_changes_the_dtype(tmp_path: Path, format: str, dtype: str) -> None:
    weights = make_weights(LLAMA31)
    opened = convert(write(tmp_path, "hf", LLAMA31, weights), tmp_path / DESTINATION[format], format, dtype=dtype)
    expected = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert_same(opened, LLAMA31, weights, expected)


def test_q8_0_error_is_within_half_a_step(tmp_path: Path) -> None:
    weights = make_weights(LLAMA31, torch.float32)
    opened = open_checkpoint(write(tmp_path, "gguf", LLAMA31, weights, dtype="q8_0"))
    for name, expected in weights.items():
        found = opened.weights[name]
        assert torch.equal(opened.weights.rows(name, 3, 21), found[3:21])
        if expected.ndim == 1:
            assert torch.equal(found, expected)
            continue
        step = expected.view(-1, 32).abs().amax(dim=1) / 127
        # Half a step of the int8 grid, and the rounding of the scale to fp16 (2^-11) over up to 127 steps.
        bound = step * (0.5 + 127 * 2**-11) + 1e-6
        assert ((found - expected).abs().view(-1, 32) <= bound[:, None]).all(), name


@pytest.mark.parametrize("tied", [False, True])
def test_llama2c_version_2_error_is_within_half_a_scale(tmp_path: Path, tied: bool) -> None:
    config = replace(LLAMA2, tied=tied)
    weights = make_weights(config, torch.float32)
    opened = open_checkpoint(write(tmp_path, "llama2c", config, weights, version=2))
    assert opened.config == config
    for name, expected in weights.items():
        _, scale = quantize_groups(expected, 16)
        error = (opened.weights[name] - expected).abs().view(-1, 16)
        assert (error <= (scale[:, None] * 0.5 * 1.0001 if expected.ndim == 2 else 0)).all(), name
        assert torch.equal(opened.weights.rows(name, 3, 21), opened.weights[name][3:21])


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_llama2c_versions_are_lossless(tmp_path: Path, version: int, tied: bool) -> None:
    config = replace(LLAMA2, tied=tied)
    weights = make_weights(config, torch.float32)
    assert_same(open_checkpoint(write(tmp_path, "llama2c", config, weights, version=version)), config, weights, None)


def test_llama2c_training_checkpoint(tmp_path: Path) -> None:
    config = replace(LLAMA2, tied=True)
    weights = make_weights(config, torch.float32)
    state = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    state["_orig_mod.output.weight"] = state["_orig_mod.tok_embeddings.weight"]
    args = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 64, "multiple_of": 80}
    saved = {"model": state, "model_args": {**args, "max_seq_len": 32, "dropout": 0.1}, "iter_num": 7, "config": {}}
    torch.save(saved, tmp_path / "ckpt.pt")
    config = replace(config, hidden_dim=160)  # the rule with multiple_of 80, against the weights' 80: refused
    with pytest.raises(CheckpointError, match=r"w1.weight has shape \(80, 48\), model_args asks for \(160, 48\)"):
        open_checkpoint(tmp_path / "ckpt.pt")
    saved["model_args"]["hidden_dim"] = 80  # type: ignore[index]
    torch.save(saved, tmp_path / "ckpt.pt")
    assert_same(open_checkpoint(tmp_path / "ckpt.pt"), replace(config, hidden_dim=80), weights, None)


def test_real_llama2c_model_comes_back_byte_for_byte(tmp_path: Path, test_data) -> None:  # type: ignore[no-untyped-def]
    source, tokenizer = test_data("stories260K.bin"), test_data("tok512.bin")
    convert(source, tmp_path / "meta", "meta", tokenizer=tokenizer)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "x.gguf", "gguf")
    opened = convert(tmp_path / "x.gguf", tmp_path / "bin" / "x.bin", "llama2c")
    assert (tmp_path / "bin" / "x.bin").read_bytes() == source.read_bytes()
    assert (tmp_path / "bin" / "tokenizer.bin").read_bytes() == tokenizer.read_bytes()
    assert opened.tokenizer == tmp_path / "bin" / "tokenizer.bin"
    text = "Once upon a time, there was a little girl named Lily. สวัสดี 😀\n"
    expected = open_tokenizer(tokenizer).encode(text, bos=True)
    for path in (tmp_path / "meta", tmp_path / "hf", tmp_path / "x.gguf"):
        found = open_checkpoint(path).tokenizer
        assert found is not None
        assert open_tokenizer(found).encode(text, bos=True) == expected


@pytest.mark.parametrize("head_dim", [2, 6, 16])
def test_row_orders_are_inverse(head_dim: int) -> None:
    weight = torch.arange(head_dim * 3 * 2.0).view(head_dim * 3, 2)
    # Meta's rows (2i, 2i + 1) of a head are Hugging Face's (i, i + head_dim / 2).
    places = [
        head * head_dim + i + half * head_dim // 2 for head in range(3) for i in range(head_dim // 2) for half in (0, 1)
    ]
    assert torch.equal(to_hf_rows(weight, head_dim)[places], weight)
    assert torch.equal(to_meta_rows(weight, head_dim), weight[places])
    assert torch.equal(to_meta_rows(to_hf_rows(weight, head_dim), head_dim), weight)


@pytest.mark.parametrize("format", ["meta", "hf", "gguf"])
def test_weights_are_views_of_the_file_where_they_can_be(tmp_path: Path, format: str) -> None:
    opened = open_checkpoint(write(tmp_path, format, LLAMA31, make_weights(LLAMA31)))
    name = "layers.1.feed_forward.w1.weight"
    assert opened.weights[name].data_ptr() == opened.weights[name].data_ptr()
    assert opened.weights.rows(name, 7, 9).data_ptr() == opened.weights[name][7:9].data_ptr()


@pytest.mark.parametrize(("format", "dtype"), [("hf", None), ("gguf", "q4_0")])
def test_convert_merges_an_adapter_on_the_way(tmp_path: Path, format: str, dtype: str | None) -> None:
    """What is written is what the merged weights themselves would be written as."""
    weights, generator = make_weights(LLAMA31), torch.Generator().manual_seed(3)
    base = write(tmp_path / "base", "meta", LLAMA31, weights)
    shapes = {name: weight.shape for name, weight in weights.items() if name.endswith("wq.weight")}
    pairs = {
        n: (torch.randn(2, s[1], generator=generator), torch.randn(s[0], 2, generator=generator))
        for n, s in shapes.items()
    }
    adapter = Adapter(pairs, dict.fromkeys(pairs, 4.0))
    write_adapter(tmp_path / "adapter", adapter, LLAMA31, base=str(base))
    commands.convert(
        str(base), tmp_path / DESTINATION[format], format=format, dtype=dtype, adapter=tmp_path / "adapter"
    )
    made = open_checkpoint(tmp_path / DESTINATION[format])
    options = {"dtype": dtype} if dtype else {}
    expected = open_checkpoint(write(tmp_path / "x", format, LLAMA31, dict(merged(weights, adapter)), **options))
    for name in weights:
        assert torch.equal(made.weights[name], expected.weights[name]), name
    assert not any(torch.equal(made.weights[name], weights[name]) for name in pairs)
