"""GGUF files as people have them: keys of every converter, models in several parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_cases import TYPES, WIDE, finish, new_writer, write_random
from nanollama.checkpoint import CheckpointError, open_checkpoint
from nanollama.checkpoint.names import gguf_name, weight_shapes


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "rope.scaling.type is 'yarn', by a factor of 4",
        ),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "rope.scaling.type is 'linear'"),
        ({"llama.rope.scale_linear": 2.0}, "rope.scaling.type is 'linear', by a factor of 2"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor is 1.5"),
        ({"llama.attention.causal": False}, "attention.causal is false"),
        ({"llama.attention.sliding_window": 32}, "attention.sliding_window is 32"),
        ({"llama.attention.clamp_kqv": 8.0}, "attention.clamp_kqv is 8"),
        ({"llama.logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ({"llama.expert_count": 8}, "expert_count is 8: mixtures of experts"),
        ({"llama.attention.value_length": 32}, "attention.value_length differs from the head dimension"),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"general.architecture": "qwen2"}, "architecture 'qwen2': only llama"),
    ],
)
def test_keys_that_change_the_computation_are_refused_by_name(tmp_path: Path, keys: dict[str, Any], part: str) -> None:
    make_plain(tmp_path / "x.gguf", keys)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.tensor_data_layout": "Meta AI original pth"},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0, "llama.rope.scaling.finetuned": True},
        {"llama.rope.scale_linear": 1.0},
        {"llama.expert_count": 0, "llama.expert_used_count": 0, "llama.logit_scale": 0.0},
        {"llama.attention.causal": True, "llama.attention.layer_norm_epsilon": 1e-5},
        {"llama.attention.head_count_kv": [1, 1], "llama.feed_forward_length": [256, 256]},
        {"llama.pooling_type": 1, "llama.note_of_the_converter": "x", "quantize.imatrix.file": "x"},
    ],
)
def test_keys_that_change_nothing_open(tmp_path: Path, keys: dict[str, Any]) -> None:
    make_plain(tmp_path / "x.gguf", keys)
    assert open_checkpoint(tmp_path / "x.gguf").config == WIDE


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "output.bias", "rope_factors_long.weight", "blk.0.attn_q_norm.weight"]
)
def test_tensors_that_no_llama_has_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make_plain(tmp_path / "x.gguf", {}, extra=name)
    with pytest.raises(CheckpointError, match=f"tensor {name} is unknown: no Llama has it"):
        open_checkpoint(tmp_path / "x.gguf")


def test_a_vocabulary_alone_is_called_one(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "x.gguf", WIDE)
    finish(writer)
    with pytest.raises(CheckpointError, match="a vocabulary and no weights"):
        open_checkpoint(tmp_path / "x.gguf")


def make_plain(path: Path, keys: dict[str, Any], extra: str | None = None) -> None:
    """A file of ones, in F32."""
    writer = new_writer(path, WIDE, keys)
    for meta, shape in weight_shapes(WIDE).items():
        writer.add_tensor(gguf_name(meta), np.ones(shape, np.float32))
    if extra:
        writer.add_tensor(extra, np.ones(256, np.float32))
    finish(writer)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    """A model in four files, as gguf's writer splits it, and its weights."""
    expected = write_random(tmp_path / "x.gguf", TYPES.Q4_0, split_max_tensors=6)
    return [tmp_path / f"x-{i:05d}-of-00004.gguf" for i in range(1, 5)], expected


def test_a_split_model_opens_by_any_of_its_parts(parts: tuple[list[Path], dict[str, np.ndarray]]) -> None:
    files, expected = parts
    for path in (*files, files[0].parent):
        opened = open_checkpoint(path)
        assert opened.config == WIDE
        for name in opened.weights:
            assert np.array_equal(opened.weights[name], expected[gguf_name(name)], equal_nan=True)


def rekeyed(path: Path, key: str, value: int, n_bytes: int) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4  # behind the value's type
    data[at : at + n_bytes] = value.to_bytes(n_bytes, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f[2].unlink(), ["x-00003-of-00004.gguf: is missing", "part 3 of a split model of 4 files"]),
        (lambda f: f[2].rename(f[2].with_suffix(".gguf.part")), ["x-00003-of-00004.gguf.part", "unfinished download"]),
        (lambda f: f[2].write_bytes(f[3].read_bytes()), ["x-00003-of-00004.gguf", "part 3", "split.no 3"]),
        (lambda f: f[2].write_text("version https://git-lfs.github.com/spec/v1\n"), ["x-00003", "git lfs pull"]),
        (lambda f: rekeyed(f[2], "split.count", 5, 2), ["x-00003", "split.no 2 of 5"]),
        (lambda f: rekeyed(f[0], "split.tensors.count", 22, 4), ["22 tensors (split.tensors.count)", "hold 21"]),
        (lambda f: f[1].write_bytes(f[1].read_bytes().replace(b"ffn_up", b"attn_v")), ["x-00002", "blk.0.attn_v"]),
    ],
)
def test_a_split_model_that_is_not_whole(
    parts: tuple[list[Path], dict[str, np.ndarray]], damage: Callable[[list[Path]], Any], words: list[str]
) -> None:
    files, _ = parts
    damage(files)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(files[3])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["model.gguf", "x-00002-of-00004.gguf", "x-00001-of-00005.gguf"])
def test_a_renamed_part_says_which_name_it_needs(parts: tuple[list[Path], dict[str, np.ndarray]], name: str) -> None:
    renamed = parts[0][0].rename(parts[0][0].with_name(name))
    with pytest.raises(CheckpointError, match=r"one part of a split model .*split.no 0.*NAME-00001-of-00003.gguf"):
        open_checkpoint(renamed)
