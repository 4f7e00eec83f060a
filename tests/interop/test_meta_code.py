"""Exported Meta folders in `llama_models`: its Transformer, its argument class, one process per shard, strict loading.

python -m pytest tests/interop/test_meta_code.py
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import meta_rank
from checkpoint_cases import FAMILIES, LLAMA31, make_weights, write
from nanollama.checkpoint import convert
from nanollama.model import ModelConfig, Transformer


def meta_logits(folder: Path, shards: int, scratch: Path) -> torch.Tensor:
    """(40, V) from as many processes as there are shards."""
    store, out = scratch / "store", scratch / "logits.pt"
    ranks = [
        subprocess.Popen(
            [sys.executable, meta_rank.__file__, str(folder), str(rank), str(shards), str(store), str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(shards)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * shards, errors[0]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("family", "shards"), [("llama2", 1), ("llama3.1", 4), ("tied", 2)])
def test_meta_computes_what_we_do(tmp_path: Path, family: str, shards: int) -> None:
    """4 shards of 2 kv heads: each head stands in two shards, as in the 16-shard 405B."""
    config: ModelConfig = replace(LLAMA31, tied=True) if family == "tied" else FAMILIES[family]
    weights = {n: t / (4 if t.ndim == 2 else 1) for n, t in make_weights(config, torch.float32).items()}
    path = write(tmp_path, "meta", config, weights, shards=shards)
    with torch.inference_mode():
        ours = Transformer.from_weights(config, weights, dtype=torch.float32, attention="exact")(meta_rank.TOKENS)[0]
    torch.testing.assert_close(meta_logits(path, shards, tmp_path), ours, rtol=1e-4, atol=2e-4)


def test_meta_runs_a_llama2c_model(tmp_path: Path, test_data: Callable[[str], Path]) -> None:
    opened = convert(test_data("stories260K.bin"), tmp_path / "meta", "meta", tokenizer=test_data("tok512.bin"))
    with torch.inference_mode():
        ours = Transformer.from_weights(opened.config, dict(opened.weights), attention="exact")(meta_rank.TOKENS)[0]
    torch.testing.assert_close(meta_logits(tmp_path / "meta", 1, tmp_path), ours, rtol=1e-5, atol=1e-5)
