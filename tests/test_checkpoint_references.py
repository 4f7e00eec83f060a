"""Our exports in the reader that feeds the references, which shares no code with ours: same config, same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_cases import FAMILIES, LLAMA31, make_weights, write
from nanollama.checkpoint import open_checkpoint
from nanollama.model import ModelConfig, RopeScaling
from parity.candidates.nano import config_echo
from reference.files import open_folder


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
