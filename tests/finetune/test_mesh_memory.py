"""What a rank of a sharded run holds: its share of the states and one block, however large the model."""

import math

import pytest

from finetune.config import TrainConfig
from finetune.mesh import MeshSizes
from nanollama.checkpoint.names import layer_shapes, weight_shapes
from nanollama.model import ModelConfig
from peaks import resident_peak

RANKS = 4
STATE_BYTES = 16  # of a parameter: itself, its gradient and AdamW's two moments in float32
SHAPE = ModelConfig(dim=768, n_layers=57, n_heads=12, n_kv_heads=12, vocab_size=2000, hidden_dim=2048, max_seq_len=64)


def numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.slow
def test_a_rank_holds_its_share_of_400_million_parameters_and_one_block() -> None:
    config = TrainConfig(seq_len=4, batch_size=1, lr=1e-3, max_steps=10, warmup_steps=0, eval_tokens=1)
    parameters = numbers(weight_shapes(SHAPE))
    assert 400e6 < parameters < 410e6
    peak = resident_peak(SHAPE, config, MeshSizes(fsdp=RANKS))
    ideal = STATE_BYTES * parameters / RANKS + 4 * numbers(layer_shapes(SHAPE))
    print(f"{peak / 2**20:.0f} MiB, {peak / ideal:.3f} of the share and a block")
    assert 0.9 < peak / ideal < 1.1
