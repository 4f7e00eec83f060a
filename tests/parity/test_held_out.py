"""Held-out ports (tests/ports/held_out.py): no alarm at right ones, wrong ones killed at the tap of their mistake."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanollama.checkpoint import open_checkpoint
from parity.measure.evidence import Evidence
from parity.mutants import family
from parity.mutants.evaluate import evaluate, failed, measure_references, row_of
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from ports import held_out, held_out_right, held_out_wrong
from ports.held_out import Port, Wrong, bare, loader

pytestmark = pytest.mark.slow

TINY = replace(SHAPES["tiny"], vocab_size=512, n_layers=2)
MODELS = {
    "3.1": TINY,
    "llama2": replace(SHAPES["tiny-llama2"], vocab_size=512, n_layers=2),
    "3.2-tied": replace(SHAPES["tiny-3.2"], vocab_size=512, n_layers=2),
}

SEEN_BY_SEVERAL = {"batch_rows_mixed", "stale_cache", "documents_leak"}  # sequences, and not by one


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Evidence]:
    folder, shape = tmp_path_factory.mktemp("held-out"), MODELS[request.param]
    synthesise(shape, folder / "checkpoint")
    return request.param, judge_of(folder)


def judge_of(folder: Path, sequences: int = 1) -> Evidence:
    ev = family.of_checkpoint(folder / "checkpoint", folder / "run", sequences=sequences)
    torch.set_num_threads(1)
    measure_references(ev)
    return ev


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Evidence]:
    """Three sequences: a batch, packed documents, and a cache that is used again."""
    folder = tmp_path_factory.mktemp("several")
    synthesise(TINY, folder / "checkpoint")
    return "3.1", judge_of(folder, sequences=3)


@pytest.mark.parametrize("name", held_out.RIGHT)
@pytest.mark.parametrize("alone", [False, True])
def test_a_right_port_passes(name: str, alone: bool, model: tuple[str, Evidence], tmp_path: Path) -> None:
    assert alarms(held_out.RIGHT[name], alone, model[1], tmp_path) == []


@pytest.mark.parametrize("name", held_out.WRONG)
def test_a_wrong_port_is_killed_at_its_mistake(name: str, model: tuple[str, Evidence], tmp_path: Path) -> None:
    found_at_its_mistake(held_out.WRONG[name], model, tmp_path)


# The others on one shape: `python -m benchmarks.held_out` takes all of them to all.


@pytest.mark.parametrize("model", ["3.1"], indirect=True)
@pytest.mark.parametrize("name", held_out_right.RIGHT)
def test_another_right_port_passes(name: str, model: tuple[str, Evidence], tmp_path: Path) -> None:
    assert alarms(held_out_right.RIGHT[name], False, model[1], tmp_path) == []


@pytest.mark.parametrize("model", ["3.1"], indirect=True)
@pytest.mark.parametrize("name", sorted(held_out_wrong.WRONG.keys() - SEEN_BY_SEVERAL))
def test_another_wrong_port_is_killed_at_its_mistake(name: str, model: tuple[str, Evidence], tmp_path: Path) -> None:
    found_at_its_mistake(held_out_wrong.WRONG[name], model, tmp_path)


@pytest.mark.parametrize("name", sorted(SEEN_BY_SEVERAL))
def test_a_port_that_is_wrong_from_the_second_sequence_on_is_killed(
    name: str, several: tuple[str, Evidence], tmp_path: Path
) -> None:
    found_at_its_mistake(held_out_wrong.WRONG[name], several, tmp_path)


def alarms(kind: type[Port], alone: bool, ev: Evidence, folder: Path) -> list[tuple[object, ...]]:
    load = loader(kind)
    _, results = evaluate(ev, bare(load) if alone else load, folder / "candidate")
    return [(r.check, r.metric, r.dtype, r.value, r.where) for r in failed(results)]


def found_at_its_mistake(wrong: Wrong, model: tuple[str, Evidence], folder: Path) -> None:
    shape = MODELS[model[0]]
    if not wrong.fits(open_checkpoint(model[1].case.checkpoint).config):
        pytest.skip("this shape has nothing to get wrong there")
    row = row_of(*evaluate(model[1], loader(wrong.kind), folder / "candidate"))
    assert row.killed_by is not None and (row.by_logits["fp32"] or "@" in wrong.tap)
    assert row.found == wrong.tap.format(last=shape.n_layers - 1)
