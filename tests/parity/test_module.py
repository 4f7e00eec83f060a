"""`torch:FILE.py:Class` and `hf:FOLDER`: modules of other names and shapes, filled and judged with no class written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutant_evidence import judge
from nanollama.checkpoint import open_checkpoint
from nanollama.model import Transformer
from parity.candidates import resolve
from parity.candidates.nano.model import taps_of
from parity.contract import UsageError
from parity.mutants import evaluate as mutants
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from ports import plain_port

MODULES = Path(plain_port.__file__).parent / "modules.py"
SMALL = replace(SHAPES["tiny"], vocab_size=64, n_layers=2)
TOKENS = torch.tensor([[3, 1, 2, 60, 7, 8, 9], [9, 8, 1, 3, 2, 1, 0]])
RIGHT = ("Plain", "Fused", "Stepwise")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ckpt")
    synthesise(SMALL, folder / "meta")
    synthesise(replace(SMALL, rope_factor=32.0, tied=True), folder / "hf", format="hf")
    return {name: folder / name for name in ("meta", "hf")}


def loaded(name: str, checkpoint: Path, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    return resolve(name)[None](str(checkpoint), dtype, "cpu")


def near(a: torch.Tensor, b: torch.Tensor, bound: float) -> bool:
    return float((a.double() - b.double()).norm()) < bound * float(b.double().norm())


@pytest.mark.parametrize("format", ["meta", "hf"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_module_computes_the_checkpoints_logits_and_taps(
    name: str, format: str, checkpoints: dict[str, Path]
) -> None:
    opened = open_checkpoint(checkpoints[format])
    truth = Transformer.from_weights(opened.config, opened.weights, dtype=torch.float32).eval()
    model = loaded(f"torch:{MODULES}:{name}", checkpoints[format])
    with torch.no_grad():
        assert near(model(TOKENS), truth(TOKENS), 1e-5)
        taps, theirs = model.taps(TOKENS[:1]), taps_of(truth, TOKENS[:1])
    assert set(theirs) - set(taps) == {f"layers.{i}.{tap}" for i in range(2) for tap in ("q_rope", "k_rope")}
    assert [tap for tap, x in taps.items() if not near(x, theirs[tap], 1e-4)] == []


def test_bfloat16_is_computed_in_bfloat16(checkpoints: dict[str, Path]) -> None:
    opened = open_checkpoint(checkpoints["meta"])
    truth = Transformer.from_weights(opened.config, opened.weights, dtype=torch.float32).eval()
    for name in ("Plain", "Fused"):
        model = loaded(f"torch:{MODULES}:{name}", checkpoints["meta"], torch.bfloat16)
        with torch.no_grad():
            logits = model(TOKENS)
            assert logits.dtype is torch.bfloat16 and near(logits, truth(TOKENS), 0.2)
            assert not near(logits, truth(TOKENS), 1e-4)


def test_what_was_decided_is_said(checkpoints: dict[str, Path]) -> None:
    said = [loaded(f"torch:{MODULES}:{name}", checkpoints["meta"]).notices for name in RIGHT]
    assert "j and j + D/2 (Hugging Face's)" in said[0][0] and "2j and 2j+1 (Meta's)" in said[1][0]
    assert len(said[0]) == 1 and "unless it has targets" in said[1][1] and "token by token" in said[2][1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Biased", r"parameter att.W_query.bias \(129,\) of a block is no weight of the checkpoint; nearest by shape"),
        (
            "Wide",
            r"no parameter of a block is feed_forward.w1.weight \(352, 128\); nearest by shape ff.fc1.weight \(360",
        ),
        ("Asking", "the module's config is asked for 'depth_of_the_sea', which no checkpoint says"),
        ("Unknown", "Unknown takes cfg, colour, sound, which no checkpoint says"),
        ("Plian", "has no callable 'Plian'; did you mean Plain"),
        ("near", "near makes a bool, no torch module"),
    ],
)
def test_what_cannot_be_matched_is_named_in_one_line(name: str, said: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        loaded(f"torch:{MODULES}:{name}", checkpoints["meta"])
    assert "\n" not in str(caught.value)


def test_a_right_module_passes() -> None:
    _, results = judge("gqa", resolve(f"torch:{MODULES}:Plain")[None])
    assert not mutants.failed(results)
    assert {r.status.value for r in results if r.check in ("taps", "logits")} == {"pass"}


def test_a_wrong_module_fails_where_it_is_wrong() -> None:
    row = mutants.row_of(*judge("gqa", resolve(f"torch:{MODULES}:WrongEps")[None]))
    assert row.killed_by == "taps" and row.found in ("layers.0.attn_norm", "layers.0.q")


def test_a_folder_of_transformers_is_a_candidate(checkpoints: dict[str, Path]) -> None:
    opened = open_checkpoint(checkpoints["hf"])
    truth = Transformer.from_weights(opened.config, opened.weights, dtype=torch.float32).eval()
    for name in (f"hf:{checkpoints['hf']}", "hf:"):
        model = loaded(name, checkpoints["hf"])
        with torch.no_grad():
            expected, first = truth(TOKENS), model.prefill(TOKENS[:, :4])
            assert near(model(TOKENS), expected, 1e-5) and near(first, expected[:, :4], 1e-5)
            assert near(model.decode(TOKENS[:, 4:]), expected[:, 4:], 1e-5)
            taps, theirs = model.taps(TOKENS[:1]), taps_of(truth, TOKENS[:1])
        assert len(taps) == 2 * 12 + 2 and [t for t, x in taps.items() if not near(x, theirs[t], 1e-4)] == []


def test_a_folder_that_is_none_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        resolve("hf:no/such/folder")
    with pytest.raises(UsageError, match="transformers does not open it"):
        loaded("hf:", checkpoints["meta"])
