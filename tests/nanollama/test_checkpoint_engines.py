"""Exports in the programs that users open them with: transformers, Meta's code, safetensors and torch themselves."""

import json
import random
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoint_cases import FAMILIES, LLAMA31, make_weights, write
from nanollama import gguf_header
from nanollama.checkpoint import open_checkpoint, write_hf
from nanollama.checkpoint.meta import FACTOR_32_SHAPES, ffn_hidden_dim, make_params
from nanollama.gguf_header import shortest
from nanollama.model import ModelConfig, RopeScaling, Transformer
from nanollama.tokenizer import TokenizerError, open_tokenizer
from nanollama.vocabulary import read
from nanollama.vocabulary import write as write_files

TOKENS = torch.tensor([[1, 5, 60, 33, 2, 9, 40]])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_the_export_and_computes_the_same(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]
    weights = {name: tensor.float() / 20 for name, tensor in make_weights(config).items()}
    path = write(tmp_path, "hf", config, weights)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.device("meta"):
        ours = Transformer(config)
    ours.load_state_dict(dict(open_checkpoint(path).weights), assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_meta_code_takes_the_export(tmp_path: Path) -> None:
    """Its argument class reads params.json; torch.load without memory-mapping, as Meta calls it, reads the shards."""
    from llama_models.llama3.args import ModelArgs

    weights = make_weights(LLAMA31)
    path = write(tmp_path, "meta", LLAMA31, weights)
    arguments = ModelArgs(**json.loads((path / "params.json").read_text()))
    assert (arguments.dim, arguments.n_kv_heads, arguments.use_scaled_rope) == (64, 2, True)
    assert ffn_hidden_dim(64, arguments.multiple_of, arguments.ffn_dim_multiplier) == LLAMA31.hidden_dim
    state = torch.load(path / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_pth_records_are_aligned_and_sound(tmp_path: Path) -> None:
    path = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31)) / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # dim, n_layers, n_heads, n_kv_heads, hidden_dim -> multiple_of, ffn_dim_multiplier as published, or the like
        ((4096, 32, 32, 32, 11008), (256, None)),
        ((4096, 32, 32, 8, 14336), (1024, 1.3)),
        ((8192, 80, 64, 8, 28672), (4096, 1.3)),
        ((16384, 126, 128, 8, 53248), (4096, 1.2)),
        ((2048, 16, 32, 8, 8192), (256, 1.5)),
        ((3072, 28, 24, 8, 8192), (256, 1.0)),
    ],
)
def test_params_of_published_shapes(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, float | None]) -> None:
    dim, n_layers, n_heads, n_kv_heads, hidden_dim = shape
    scaling = RopeScaling(32.0) if shape[:4] in FACTOR_32_SHAPES else None
    config = ModelConfig(dim, n_layers, n_heads, n_kv_heads, 128_256, hidden_dim, rope_scaling=scaling)
    params = make_params(tmp_path, config)
    found = params["multiple_of"], params.get("ffn_dim_multiplier")
    assert ffn_hidden_dim(dim, *found) == hidden_dim
    assert ffn_hidden_dim(dim, *expected) == hidden_dim
    assert params.get("rope_scaling_factor") == (32.0 if scaling else None)


def corpus(seed: int) -> list[str]:
    rng = random.Random(seed)
    letters = "abe rst  \n\t€กขü😀12.,'!"
    return ["", " ", "  two  spaces ", "สวัสดีชาวโลก", "\r\n\r\n x", "a" * 40, "it's 3.14"] + [
        "".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(200)
    ]


@pytest.mark.parametrize("name", ["llama3", "llama2_tokenizer.model", "tok512.bin"])
def test_a_vocabulary_keeps_its_ids_in_every_file(tmp_path: Path, name: str, test_data, llama3_tokenizer_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    source = llama3_tokenizer_path if name == "llama3" else test_data(name)
    vocabulary = read(source)
    for file_name, data in write_files.hf_files(vocabulary).items():
        (tmp_path / file_name).write_bytes(data)
    is_bpe = vocabulary.kind == "bpe"
    files = {"model": write_files.ranks(vocabulary) if is_bpe else write_files.sentencepiece(vocabulary)}
    if not is_bpe:
        files["bin"] = write_files.llama2c(vocabulary)
    for suffix, data in files.items():
        (tmp_path / f"rebuilt.{suffix}").write_bytes(data)
        assert read(tmp_path / f"rebuilt.{suffix}").tokens == vocabulary.tokens
    assert (source.read_bytes() in files.values()) == (name != "llama2_tokenizer.model")  # its trainer's notes are lost
    reference, theirs = open_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path)
    # A file equal to the source needs no second look.
    rebuilt = [open_tokenizer(tmp_path / f"rebuilt.{s}") for s, data in files.items() if data != source.read_bytes()]
    for text in corpus(seed=0):
        expected = reference.encode(text, bos=True)
        assert theirs.encode(text) == expected
        assert all(tokenizer.encode(text, bos=True) == expected for tokenizer in rebuilt)
    assert reference.decode(reference.encode(text, bos=False)) == theirs.decode(expected, skip_special_tokens=True)


def test_gguf_vocabulary_survives(tmp_path: Path, test_data, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=520, hidden_dim=32)
    path = write(tmp_path, "gguf", config, make_weights(config), tokenizer=test_data("tok512.bin"))
    found = open_checkpoint(path).tokenizer
    assert found is not None
    named = gguf_header.read(path).keys["tokenizer.ggml.tokens"]
    assert named[512:] == [f"[PAD{i}]" for i in range(512, 520)]  # rows without a token have names, as llama.cpp needs
    assert read(found).tokens == read(test_data("tok512.bin")).tokens
    with pytest.raises(TokenizerError, match="has 512 tokens and the model 96"):
        write_hf(tmp_path / "x", LLAMA31, make_weights(LLAMA31), tokenizer=test_data("tok512.bin"))


def test_chat_template_travels(tmp_path: Path, test_data) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(test_data("llama2_tokenizer.model").read_bytes())
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    assert read(tmp_path / "a" / "tokenizer.model").chat_template == "{{ messages }}"


def test_float32_keys_read_back_as_written() -> None:
    for value in (1e-5, 2e-5, 1e-6, 500_000.0, 10_000.0, 8.0, 1.5, 0.1):
        assert shortest(torch.tensor(value).item()) == value
