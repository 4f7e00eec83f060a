"""Sampling: every filter's distribution against one computed here token by token; rows that do not touch each other."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanollama.generation.sample import draw, make_filter, make_sampler, penalize_repetition, row_generator

DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, -3.0, 0.5, 1.2, -0.3, 0.0, -8.0, 1.0, -math.inf])


def direct(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """The distribution by its definition, in plain Python: no code shared with what it judges."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    alive = set(range(len(logits)))
    if top_k:
        limit = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        alive = {i for i in alive if weights[i] >= limit}
    if top_p < 1:
        total, reached, limit = sum(weights[i] for i in alive), 0.0, 0.0
        for weight in sorted((weights[i] for i in alive), reverse=True):
            if reached / total >= top_p:
                break
            limit = weight
            reached += weight
        alive = {i for i in alive if weights[i] >= limit}
    if min_p:
        best = max(weights[i] for i in alive)
        alive = {i for i in alive if weights[i] >= min_p * best}
    total = sum(weights[i] for i in alive)
    return [weights[i] / total if i in alive else 0.0 for i in range(len(weights))]


def chi_square_p_value(ids: Tensor, expected: list[float]) -> float:
    """Probability of a deviation at least this large; impossible tokens that were drawn make it 0."""
    counts = torch.bincount(ids, minlength=len(expected)).double()
    probs = torch.tensor(expected, dtype=torch.float64)
    if counts[probs == 0].any():
        return 0.0
    wanted = probs[probs > 0] * counts.sum()
    statistic = ((counts[probs > 0] - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(wanted) > 1 else 1.0


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 0.7, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "top_p": 0.35},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_direct_distribution(setting: dict[str, Any]) -> None:
    sampler = make_sampler(**setting)
    ids = sampler(LOGITS.expand(DRAWS, -1), torch.Generator().manual_seed(1))
    assert chi_square_p_value(ids, direct(LOGITS.tolist(), **setting)) > 1e-3


def test_the_chi_square_test_can_fail() -> None:
    ids = make_sampler(1.0)(LOGITS.expand(DRAWS, -1), torch.Generator().manual_seed(1))
    assert chi_square_p_value(ids, direct(LOGITS.tolist(), temperature=1.05)) < 1e-3
    assert chi_square_p_value(ids, direct(LOGITS.tolist(), top_k=8)) == 0.0


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(-150, 150).map(lambda n: n / 10), min_size=1, max_size=40),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.integers(0, 45),
    st.floats(0.05, 0.99),
    st.floats(0, 0.99),
)
def test_filters_are_the_direct_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    wanted, tighter, looser = (
        torch.tensor(direct(logits, temperature, top_k, top_p * change, min_p * change), dtype=torch.float64)
        for change in (1, 1 - 1e-5, 1 + 1e-5)
    )
    # Whether a token within rounding of a threshold is kept is nobody's error.
    assume(bool(((tighter > 0) == (looser > 0)).all()))
    kept = make_filter(temperature, top_k=top_k, top_p=top_p, min_p=min_p)(torch.tensor([logits]))
    torch.testing.assert_close(kept.double().softmax(-1)[0], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_row_draws_the_same_wherever_it_stands(setting: dict[str, Any]) -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(3))
    sampler = make_sampler(**setting)
    together = [row_generator(seed) for seed in range(5)]
    batch = torch.stack([sampler(logits, together) for _ in range(20)], dim=1)
    for row in range(5):
        alone = [row_generator(row)]
        assert batch[row].tolist() == [int(sampler(logits[row : row + 1], alone)) for _ in range(20)]


def test_rows_with_their_own_generators_follow_the_distribution() -> None:
    # First draws of neighbouring seeds and of the streams of one seed: poorly mixed seeds would show here.
    expected = direct(LOGITS.tolist())
    for generators in (
        [row_generator(seed) for seed in range(DRAWS)],
        [row_generator(0, stream) for stream in range(DRAWS)],
    ):
        assert chi_square_p_value(draw(LOGITS.expand(DRAWS, -1), generators), expected) > 1e-3


def test_streams_of_one_seed_differ() -> None:
    seeds = {row_generator(seed, stream).initial_seed() for seed in range(50) for stream in range(50)}
    assert len(seeds) == 2500


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    assert make_sampler(0.0)(logits, []).tolist() == [1, 0]
    assert make_sampler(0.0, top_p=0.5)(logits, []).tolist() == [1, 0]


def test_rare_tokens_of_a_large_vocabulary_are_drawn() -> None:
    # Half of the mass on one token, half spread over 128,000 others: a float32 running sum loses some of it.
    logits = torch.zeros(128_001)
    logits[0] = math.log(128_000)
    ids = draw(logits.expand(60, -1), torch.Generator().manual_seed(0))
    assert 15 < int((ids == 0).sum()) < 45
    assert int(ids.max()) > 100_000


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_is_the_direct_distribution(scale: float, top_p: float) -> None:
    # 5,000 distinct logits, flat or peaked: from one kept token to nearly all, beyond the first guess of how many.
    logits = torch.linspace(0, 1, 5000)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))] * scale * 10
    kept = make_filter(1.0, top_p=top_p)(torch.stack([logits, logits + 1, logits.flip(0)]))
    wanted = torch.tensor(direct(logits.tolist(), top_p=top_p), dtype=torch.float64)
    probs = kept.double().softmax(-1)
    for row, expected in zip(probs, (wanted, wanted, wanted.flip(0)), strict=True):
        assert abs(int((row > 0).sum()) - int((expected > 0).sum())) <= 1  # one at the threshold, by rounding
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)


def test_repetition_penalty_lowers_what_was_seen() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-30}, "temperature is 1e-30: expected 0 \\(greedy\\), or 1e-06 and more"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 0.0, "min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**setting)
