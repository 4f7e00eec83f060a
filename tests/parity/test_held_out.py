"""Held-out ports (tests/ports/held_out.py): no alarm at right ones, wrong ones killed at the tap of their mistake."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity.measure.evidence import Evidence
from parity.mutants import family
from parity.mutants.evaluate import evaluate, failed, measure_references, row_of
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from ports.held_out import RIGHT, WRONG, bare, loader

pytestmark = pytest.mark.slow

TINY = replace(SHAPES["tiny"], vocab_size=512, n_layers=2)
MODELS = {
    "3.1": TINY,
    "llama2": replace(SHAPES["tiny-llama2"], vocab_size=512, n_layers=2),
    "3.2-tied": replace(SHAPES["tiny-3.2"], vocab_size=512, n_layers=2),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Evidence]:
    folder, shape = tmp_path_factory.mktemp("held-out"), MODELS[request.param]
    synthesise(shape, folder / "checkpoint")
    ev = family.of_checkpoint(folder / "checkpoint", folder / "run")
    torch.set_num_threads(1)
    measure_references(ev)
    return request.param, ev


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("alone", [False, True])
def test_a_right_port_passes(name: str, alone: bool, model: tuple[str, Evidence], tmp_path: Path) -> None:
    load = loader(RIGHT[name])
    _, results = evaluate(model[1], bare(load) if alone else load, tmp_path / "candidate")
    assert [(r.check, r.metric, r.dtype, r.value, r.where) for r in failed(results)] == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_port_is_killed_at_its_mistake(name: str, model: tuple[str, Evidence], tmp_path: Path) -> None:
    shape = MODELS[model[0]]
    if (name == "hard_bands" and shape.rope_factor is None) or (
        name == "transposed_output" and shape.head_dim * shape.n_heads != shape.dim
    ):
        pytest.skip("this shape has nothing to get wrong there")
    kind, tap = WRONG[name]
    row = row_of(*evaluate(model[1], loader(kind), tmp_path / "candidate"))
    assert row.killed_by is not None and row.by_logits["fp32"]
    assert row.found == tap.format(last=shape.n_layers - 1)
