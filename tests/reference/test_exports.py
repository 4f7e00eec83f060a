"""Our exports in the reader that feeds the references, which shares no code with ours: same config, same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_cases import FAMILIES, LLAMA2, LLAMA31, make_weights, write
from nanollama.checkpoint import open_checkpoint
from nanollama.model import ModelConfig, RopeScaling
from nanollama.tokenizer import open_tokenizer
from parity.candidates.nano.checkpoint import describe, has_tokenizer, reference_files
from parity.candidates.nano.model import config_echo
from reference.files import open_folder
from reference.files.weights import Unusable
from reference.hf_text import HfText
from reference.meta_text import open_text


def assert_both_read_the_same(path: Path, config: ModelConfig) -> None:
    ours, theirs = open_checkpoint(path), open_folder(path)
    assert config_echo(ours.config) == config_echo(config) == theirs.config
    assert set(ours.weights) == set(theirs.weights)
    for name in ours.weights:
        assert torch.equal(ours.weights[name], theirs.weights[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["meta", "hf"])
def test_every_family(tmp_path: Path, family: str, format: str) -> None:
    config = FAMILIES[family]
    assert_both_read_the_same(write(tmp_path, format, config, make_weights(config)), config)


@pytest.mark.parametrize("shards", [2, 8, 16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_shards_repeated_kv_heads_and_tied_heads(tmp_path: Path, shards: int, tied: bool, split: str) -> None:
    config = replace(LLAMA31, n_heads=16, n_kv_heads=8, head_dim=4, tied=tied)  # 16 shards hold each kv head twice
    path = write(tmp_path, "meta", config, make_weights(config), shards=shards, embedding_split=split)
    assert_both_read_the_same(path, config)


def test_a_scaling_that_meta_has_no_keys_for(tmp_path: Path) -> None:
    config = replace(LLAMA31, rope_scaling=RopeScaling(4.0, 1.5, 3.5, 64), max_seq_len=512)
    assert_both_read_the_same(write(tmp_path, "meta", config, make_weights(config)), config)


def test_a_head_that_departs_from_the_embedding_in_one_number_is_untied(tmp_path: Path) -> None:
    weights = make_weights(LLAMA31)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    weights["output.weight"][7, 3] += 1
    assert_both_read_the_same(write(tmp_path, "meta", LLAMA31, weights), LLAMA31)
    weights["output.weight"][7, 3] -= 1
    assert_both_read_the_same(write(tmp_path / "b", "meta", LLAMA31, weights), replace(LLAMA31, tied=True))


@pytest.mark.parametrize("format", ["llama2c", "gguf"])
def test_files_that_no_reference_opens_reach_them_converted(
    tmp_path: Path, format: str, test_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What parity.check hands to its references: the same numbers, and no vocabulary that nanollama read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(LLAMA2, vocab_size=512)
    path = write(tmp_path, format, config, make_weights(config, torch.float32), tokenizer=test_data("tok512.bin"))
    files = reference_files(describe(str(path), str(test_data("tok512.bin"))), tmp_path / "work", texts=["Once", " x"])
    assert "they get the weights that nanollama read" in files.notices[0]
    theirs, ours = open_folder(files.checkpoint), open_checkpoint(path)
    assert theirs.config == config_echo(ours.config)
    assert all(torch.equal(theirs.weights[name], ours.weights[name]) for name in ours.weights)
    assert theirs.find("tokenizer.json", "tokenizer.model") is None
    ids = [open_tokenizer(test_data("tok512.bin")).encode(text, bos=True) for text in ("Once", " x")]
    assert files.as_case()["spare_prompts"] == ids
    for module in (HfText, open_text):
        with pytest.raises(Unusable, match=r"tok512\.bin|no tokenizer"):
            module(theirs, str(files.tokenizer))


def test_folders_are_opened_by_the_references_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, "meta", LLAMA31, make_weights(LLAMA31))
    files = reference_files(describe(str(path), None), tmp_path / "work")
    assert (files.checkpoint, files.tokenizer, files.notices) == (path.resolve(), None, [])


@pytest.mark.parametrize(("rows", "said"), [(576, "the rows behind them are padding"), (500, "have no row"), (512, "")])
def test_more_rows_than_tokens_and_fewer_are_said_and_legal(
    tmp_path: Path, rows: int, said: str, test_data: Callable[[str], Path]
) -> None:
    config = replace(LLAMA2, vocab_size=rows)
    path = write(tmp_path, "hf", config, make_weights(config))
    notices = describe(str(path), str(test_data("tok512.bin"))).notices
    assert (f"tok512.bin has 512 tokens, the model {rows} rows" in " ".join(notices)) is bool(said)
    assert said in " ".join(notices)


def test_the_first_reference_is_one_that_has_a_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))
    assert [has_tokenizer(name, None, path) for name in ("meta", "hf")] == [False, False]
    (path / "tokenizer.json").write_text("{}")
    assert [has_tokenizer(name, None, path) for name in ("meta", "hf")] == [False, True]
    (path / "original").mkdir()
    (path / "original" / "tokenizer.model").touch()
    assert has_tokenizer("meta", None, path)
    for name, content, metas in (("x.model", b"ranks", True), ("x.gguf", b"GGUF", False), ("x.json", b"{}", False)):
        (tmp_path / name).write_bytes(content)
        assert [has_tokenizer(reference, tmp_path / name, path) for reference in ("meta", "hf")] == [metas, True]
