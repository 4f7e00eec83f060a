"""Every ggml type that the gguf package knows: the same numbers bit for bit, in bounded memory, or refused by name."""

import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch

from checkpoint_cases import LLAMA31, LLAMA32, make_weights, write
from gguf_cases import TYPES, WIDE, write_random, write_sparse
from nanollama import __main__ as commands
from nanollama.checkpoint import CheckpointError, convert, open_checkpoint, write_gguf
from nanollama.checkpoint.gguf_types import STEP_BYTES, writable
from nanollama.checkpoint.names import gguf_name, weight_shapes
from nanollama.model import ModelConfig
from parity.synth.shapes import SHAPES

DEQUANTIZED = [kind for kind in TYPES if kind in gguf.quants._type_traits and kind != TYPES.BF16]
NOT_DEQUANTIZED = [kind for kind in TYPES if kind not in (*DEQUANTIZED, TYPES.F32, TYPES.F16, TYPES.BF16)]


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """NaN included: a random scale may be one."""
    return found.dtype == torch.float32 and np.array_equal(found.numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_weights_are_what_the_gguf_package_dequantizes(tmp_path: Path, kind: Any) -> None:
    expected = write_random(tmp_path / "x.gguf", kind)
    opened = open_checkpoint(tmp_path / "x.gguf")
    assert len(DEQUANTIZED) >= 22  # of the types that people have; a newer package has more
    assert any(f"quantized (tensors: 16 {kind.name}, 5 F32)" in notice for notice in opened.notices)
    for name in opened.weights:
        assert same_bits(opened.weights[name], expected[gguf_name(name)]), name
        rows = opened.weights.rows(name, 3, 21)
        assert same_bits(rows, np.ascontiguousarray(expected[gguf_name(name)][3:21])), name


@pytest.mark.parametrize("name", writable())
def test_written_weights_are_what_the_gguf_package_quantizes(tmp_path: Path, name: str) -> None:
    weights = {
        n: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for n, shape in weight_shapes(WIDE).items()
    }
    write_gguf(tmp_path / "x.gguf", WIDE, weights, dtype=name)
    opened, reader = open_checkpoint(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    coarse = {"output.weight", *(["token_embd.weight"] if name.startswith("tq") else [])}
    for meta, weight in weights.items():
        tensor = stored[gguf_name(meta)]
        wanted = "F32" if weight.ndim == 1 else "Q8_0" if gguf_name(meta) in coarse else name.upper()
        assert tensor.tensor_type.name == wanted
        expected = gguf.dequantize(gguf.quantize(weight.numpy(), TYPES[wanted]), TYPES[wanted])
        assert same_bits(opened.weights[meta], expected), meta
    file_type = gguf.LlamaFileType(reader.get_field("general.file_type").contents())
    assert file_type.name.removeprefix("MOSTLY_").removesuffix("_MOE") == name.upper()


def test_the_command_names_every_type_that_can_be_written() -> None:
    named = get_args(commands.DTypes)
    assert sorted(named) == sorted(["fp32", "bf16", "fp16", *writable()])


def test_a_dtype_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no dtype 'q4_k': choose one of fp32, .*q4_0.*mxfp4"):
        convert(tmp_path / "not-there", tmp_path / "x.gguf", "gguf", dtype="q4_k")
    with pytest.raises(CheckpointError, match="hf has no dtype 'q4_0'"):
        convert(tmp_path / "not-there", tmp_path / "x", "hf", dtype="q4_0")


def test_rows_that_are_no_whole_blocks_become_f16_and_all_is_read_as_one_dtype(tmp_path: Path) -> None:
    config = replace(LLAMA32, dim=48, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=96)
    weights = make_weights(config)
    path = write(tmp_path, "gguf", config, weights, dtype="q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.attn_q.weight"], types["token_embd.weight"]) == (
        "Q4_0",
        "F16",
        "F16",
    )
    opened = open_checkpoint(path)
    assert set(opened.weights.dtypes.values()) == {torch.float32}
    assert torch.equal(opened.weights["tok_embeddings.weight"], weights["tok_embeddings.weight"].float())


def test_a_tied_head_is_q8_0(tmp_path: Path) -> None:
    path = write(tmp_path, "gguf", LLAMA32, make_weights(LLAMA32), dtype="q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["token_embd.weight"], types["blk.0.attn_q.weight"]) == ("Q8_0", "Q4_0")


def test_numbers_beyond_fp16_are_refused_where_a_matrix_becomes_f16(tmp_path: Path) -> None:
    config = replace(LLAMA31, dim=48, n_heads=4, n_kv_heads=2, head_dim=12)
    weights = make_weights(config, torch.float32)
    weights["layers.1.attention.wo.weight"][3, 4] = 1e6
    with pytest.raises(CheckpointError, match=r"attention.wo.weight: holds numbers beyond fp16's 65504"):
        write_gguf(tmp_path / "x.gguf", config, weights, dtype="q8_0")
    assert list(tmp_path.iterdir()) == []


def retyped(path: Path, tensor: str, number: int) -> None:
    """The file with another type in a tensor's entry: name, u32 dimensions, u64 each, u32 type."""
    data = bytearray(path.read_bytes())
    at = data.index(tensor.encode()) + len(tensor)
    at += 4 + 8 * int.from_bytes(data[at : at + 4], "little")
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("number", "part"),
    [
        *((int(kind), f"is {kind.name}, which the gguf package cannot dequantize") for kind in NOT_DEQUANTIZED),
        (31, "is Q4_0_4_4, which llama.cpp has removed"),
        (4, "is Q4_2, which llama.cpp has removed"),
        (999, "is of ggml's type 999, unknown to the gguf package: pip install -U gguf"),
    ],
)
def test_types_that_cannot_be_read_are_refused_by_name(tmp_path: Path, number: int, part: str) -> None:
    path = write(tmp_path, "gguf", LLAMA31, make_weights(LLAMA31))
    retyped(path, "blk.1.attn_q.weight", number)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert f"tensor blk.1.attn_q.weight {part}" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_blocks_longer_than_the_rows_are_refused_by_the_name_of_the_type(tmp_path: Path) -> None:
    path = write(tmp_path, "gguf", LLAMA31, make_weights(LLAMA31))
    retyped(path, "blk.1.attn_q.weight", TYPES.Q4_K)
    with pytest.raises(CheckpointError, match=r"attn_q.weight is Q4_K, in blocks of 256 weights, which its rows of 64"):
        open_checkpoint(path)


def test_without_the_gguf_package_floats_open_and_quantized_ones_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write(tmp_path / "a", "gguf", LLAMA31, make_weights(LLAMA31))
    quantized = write(tmp_path / "b", "gguf", LLAMA31, make_weights(LLAMA31), dtype="q4_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_checkpoint(plain).config == LLAMA31
    for action in (lambda: open_checkpoint(quantized), lambda: convert(plain, tmp_path / "x.gguf", "gguf")):
        with pytest.raises(CheckpointError, match=r"needs the gguf package: pip install 'llama-parity\[gguf\]'"):
            action()


def test_reading_a_quantized_matrix_takes_little_more_than_the_matrix(tmp_path: Path) -> None:
    config = ModelConfig(dim=1024, n_layers=1, n_heads=8, n_kv_heads=8, vocab_size=16_000, hidden_dim=1024)
    write_sparse(tmp_path / "x.gguf", config, TYPES.Q4_K)
    tracemalloc.start()
    try:
        found = open_checkpoint(tmp_path / "x.gguf").weights["tok_embeddings.weight"]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.nbytes > 8 * STEP_BYTES
    assert found.nbytes <= peak_bytes < 1.2 * found.nbytes


@pytest.mark.slow
def test_an_8b_q4_k_file_is_read_in_the_memory_of_its_largest_tensor(tmp_path: Path) -> None:
    shape = SHAPES["8B"]
    config = ModelConfig(
        shape.dim, shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.vocab_size, shape.hidden_dim, max_seq_len=8192
    )
    write_sparse(tmp_path / "x.gguf", config, TYPES.Q4_K)
    gguf.dequantize(np.zeros((1, 144), np.uint8), TYPES.Q4_K)  # imported and warm
    peak, done, before = [0], threading.Event(), anonymous_bytes()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = open_checkpoint(tmp_path / "x.gguf").weights["tok_embeddings.weight"]
    done.set()
    watcher.join()
    assert found.nbytes == 4 * 128_256 * 4096
    assert found.nbytes <= peak[0] < 1.2 * found.nbytes


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
