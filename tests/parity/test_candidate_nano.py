"""nanollama as a candidate: layer by layer it computes what it computes whole, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity.candidates.nano.model import Nano
from parity.contract import DTYPES
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from reference.protocol import tap_names

SEQUENCES = [list(range(5, 28)), [7], list(range(40, 90))]


class Streamed(Nano):
    def _fits_whole(self) -> bool:
        return False


@pytest.fixture(scope="module", params=["meta", "meta-8", "hf", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "ckpt"
    # More rows than one block of the head holds, and not a multiple of it.
    shape = replace(SHAPES["tiny-3.2" if request.param == "tied" else "tiny"], vocab_size=9000, n_layers=2)
    kind = request.param
    synthesise(shape, folder, format="hf" if kind in ("hf", "tied") else "meta", shards=8 if kind == "meta-8" else 1)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["exact", "fast"])
def test_streamed_equals_whole(attention: str, dtype: str, checkpoint: Path) -> None:
    whole = Nano(str(checkpoint), DTYPES[dtype], "cpu", attention)
    streamed = Streamed(str(checkpoint), DTYPES[dtype], "cpu", attention)
    assert streamed.streamed and not whole.streamed
    with torch.no_grad():
        found = {key: tensor for _, part in streamed.stream(SEQUENCES, None) for key, tensor in part.items()}
        for i, ids in enumerate(SEQUENCES):
            tokens = torch.tensor([ids])
            expected = whole.taps(tokens) | {"logits": whole(tokens)}
            assert list(expected) and set(expected) == set(tap_names(2))
            for tap, tensor in expected.items():
                assert torch.equal(found[f"{i}/{tap}"], tensor[0]), (i, tap)


def test_streamed_taps_are_kept_at_the_chosen_positions(checkpoint: Path) -> None:
    streamed = Streamed(str(checkpoint), torch.float32, "cpu", "fast")
    positions = [[0, 22], [0], [3, 4, 5]]
    with torch.no_grad():
        found = {key: t for _, part in streamed.stream(SEQUENCES, positions) for key, t in part.items()}
    assert found["2/layers.1.gate"].shape[0] == 3 and found["0/final_norm"].shape[0] == 2
    assert found["2/logits"].shape == (50, 9000)
