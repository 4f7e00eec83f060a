"""RoPE's rounding is rounding: tables that are right in another way pass, coarse ones are named, wrong ones fail."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mutant_evidence import base, judge
from nanollama.model import ModelConfig, RopeScaling, rope_table
from parity.checks.forward import kl_explained
from parity.checks.ops import coarse_rotation, op_noise
from parity.explain.localise import first_divergence
from parity.measure.evidence import Pair
from parity.measure.metrics import TapError, relative
from parity.measure.rope_table import cause, grades, of_table, worst
from parity.mutants import evaluate as mutants
from parity.mutants.edits import benign, forward
from parity.mutants.edits.edit import Load, edited, with_table
from parity.report.summary import fails_behind_rope
from parity.run.runner import ROPE_POSITIONS, in_doubt

POSITIONS = list(ROPE_POSITIONS)
PAIR = Pair("meta", "fp32", None)
SHAPES = {
    "llama2": {"rope_theta": 10_000.0},
    "3": {},
    "3.1": {"rope_scaling": RopeScaling()},
    "3.2": {"rope_scaling": RopeScaling(factor=32.0)},
}
RIGHT = {
    "float64": benign.table_from(benign.float64_frequencies),
    "products": benign.table_from(benign.repeated_products),
    "2 ulp": benign.table_from(benign.coarse_pow(2)),
    "4 ulp": benign.table_from(benign.coarse_pow(4)),
    "cos and sin": benign.cos_sin_table,
}
WRONG = {
    "RoPE base looks like": forward.table_of(forward.theta_off),
    "kept in bf16": forward.bf16_table,
    "kept in fp16": forward.fp16_table,
    "the RoPE frequencies are kept in bf16": forward.bf16_frequencies,
    "positions are kept in bf16": forward.bf16_positions,
}


def config(name: str, head_dim: int) -> ModelConfig:
    return ModelConfig(2 * head_dim, 1, 2, 1, 32, 64, **SHAPES[name])  # type: ignore[arg-type]


def share(table: Any, cfg: ModelConfig) -> float:
    """Of what G1 allows against the references' own table."""
    found, own = (dict(zip(("cos", "sin"), t(cfg, torch.tensor(POSITIONS)), strict=True)) for t in (table, rope_table))
    return worst(found, own, benign.as_config(cfg), POSITIONS).share


def logits_alone(load: Load) -> Load:
    """A candidate of which nothing but logits is known."""

    def loaded(checkpoint: str, dtype: torch.dtype, device: str) -> Any:
        nano = load(checkpoint, dtype, device)
        return lambda tokens: nano(tokens)

    return loaded


def with_frequencies(change: Any) -> Load:
    return edited(with_table(benign.table_from(change)))


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_right_tables_are_within_what_float32_explains_and_wrong_ones_are_not(shape: str, head_dim: int) -> None:
    cfg = config(shape, head_dim)
    assert share(rope_table, cfg) == 0
    assert {name for name, table in RIGHT.items() if not share(table, cfg) <= 1} == set()
    assert {name for name, table in WRONG.items() if not share(table, cfg) > 2} == set()


def test_a_wrong_scaling_is_no_rounding() -> None:
    cfg = config("3.2", 64)
    for change in (forward.factor_8, forward.low_factor_2, forward.high_factor_2, forward.no_scaling):
        assert share(forward.table_of(change), cfg) > 100


def test_a_number_that_is_none_never_passes() -> None:
    for index, bad in ((0, math.nan), (1, math.nan), (0, math.inf)):

        def table(cfg: ModelConfig, positions: Tensor, index: int = index, bad: float = bad) -> tuple[Tensor, Tensor]:
            made = [t.clone() for t in rope_table(cfg, positions)]
            made[index][3, 1] = bad
            return made[0], made[1]

        assert not share(table, config("3", 16)) <= 1


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_named(name: str) -> None:
    cfg = config("3.1", 64)
    table = dict(zip(("cos", "sin"), WRONG[name](cfg, torch.tensor(POSITIONS)), strict=True))
    assert name in cause(table, benign.as_config(cfg), POSITIONS)


@pytest.mark.parametrize(("name", "words"), [("products", "repeated products"), ("4 ulp", "a coarse pow")])
def test_a_coarse_table_is_named_and_measured(name: str, words: str) -> None:
    cfg = config("3", 128)
    table = dict(zip(("cos", "sin"), RIGHT[name](cfg, torch.tensor(POSITIONS)), strict=True))
    assert words in cause(table, benign.as_config(cfg), POSITIONS)
    angles = of_table(table, benign.as_config(cfg), POSITIONS)
    assert 3 < float(angles.ulp().abs().max()) < 40
    assert 1e-4 < angles.radians() < 1e-2


@pytest.mark.parametrize("load", [logits_alone, lambda load: load], ids=["logits alone", "everything"])
def test_frequencies_in_float64_pass(load: Any) -> None:
    ev, results = judge("gqa", load(with_frequencies(benign.float64_frequencies)))
    assert [(r.check, r.metric, r.value) for r in mutants.failed(results)] == []
    assert not any("coarse pow" in found["text"] for found in grades(ev, False))


def test_a_pow_that_is_4_ulp_off_passes_with_its_grade() -> None:
    ev, results = judge("gqa", with_frequencies(benign.coarse_pow(4)))
    assert mutants.failed(results) == []
    (found,) = grades(ev, ev.lenient)
    assert found["ulp"] > 3.5 and found["context_tokens"] > 50
    assert "a coarse pow" in found["text"] and "rad at position 8191" in found["text"]
    assert in_doubt(ev, ["fp32"])


def test_the_references_own_table_needs_no_allowance() -> None:
    ev, results = judge("gqa", edited(forward.NOTHING))
    assert not ev.lenient and not fails_behind_rope(results) and grades(ev, False) == []
    assert not in_doubt(ev, ["fp32"])


@pytest.mark.parametrize("table", [forward.fp16_table, forward.bf16_table, forward.table_of(forward.theta_off)])
def test_a_wrong_table_fails_by_logits_alone(table: Any) -> None:
    ev, results = judge("gqa", logits_alone(edited(with_table(table))))
    assert ev.lenient and "logits" in {r.check for r in mutants.failed(results)}


def test_a_frequency_20_ulp_off_is_found_where_it_is() -> None:
    """Beyond the bound by more than any library's pow, in the pair that turns fastest."""
    ev, results = judge("gqa", with_frequencies(benign.coarse_pow(40)))
    assert "rope" in {r.check for r in mutants.failed(results)}
    place = first_divergence(ev)
    assert place is not None and place["tap"] == "layers.0.q_rope"


def test_an_allowance_that_grows_with_the_position_is_no_room_at_its_start() -> None:
    noise = TapError([torch.ones(100)], [torch.ones(100)], width=1, drift=[torch.arange(100.0) ** 2])
    late, early = (TapError([torch.zeros(100)], [torch.ones(100)], width=1) for _ in range(2))
    late.error[0][90], early.error[0][1] = 8000.0, 8000.0
    assert relative(late, noise, "fp32") < 0.2
    assert relative(early, noise, "fp32") > 5
    assert relative(early, replace(noise, drift=[]), "fp32") == pytest.approx(math.sqrt(80.0))


def test_a_large_kl_is_explained_by_the_noise_at_its_position_or_fails() -> None:
    ev, _ = judge("gqa", edited(forward.NOTHING))
    logits = ev.reference(PAIR).taps["logits"]
    typical = logits.rms() ** 2 / 2
    kl = torch.full((sum(x.numel() for x in logits.error),), typical, dtype=torch.float64)
    assert kl_explained(logits, PAIR.dtype, kl) < 1
    kl[40] = 1e4 * float(logits.error[0].numel() and torch.cat(logits.error)[40] / logits.width) + 100 * typical
    assert kl_explained(logits, PAIR.dtype, kl) > 9


def test_an_operation_is_judged_by_the_larger_error_of_both_references() -> None:
    ev = base("gqa")
    own = op_noise(ev, PAIR, "layers.0.attn_mix")
    twice = TapError([2 * x for x in own.error], own.expected, own.worst, own.width)
    known = {("meta", "fp32", "layers.0.attn_mix"): own, ("hf", "fp32", "layers.0.attn_mix"): twice}
    both = replace(ev, ops=ev.ops | {"hf": ev.ops["meta"]}, op_noise={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parity.checks.ops._own_error", lambda ev, reference, dtype, tap: known[reference, dtype, tap])
        for reference in ("meta", "hf"):
            found = op_noise(both, Pair(reference, "fp32", None), "layers.0.attn_mix")
            assert all(torch.equal(a, b) for a, b in zip(found.error, twice.error, strict=True))


def test_the_error_of_a_coarse_rotation_is_that_of_its_angles() -> None:
    config = {"head_dim": 4, "rope_theta": 10_000.0, "rope_scaling": None}
    x = torch.tensor([3.0, 0.0, 0.0, 2.0]).expand(1001, 1, 4)
    angle = 1000 * 0.01 * 4 * 2.0**-23  # the first pair is never off
    assert float(coarse_rotation(x, config)[1000]) == pytest.approx((2 * angle) ** 2)
