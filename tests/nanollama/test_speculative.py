"""Speculative decoding: the same greedy tokens, and the same distribution when sampling, whatever the guesses are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from generation_cases import VOCAB, assert_same_answer, of_row, prompt_ids, tokens
from nanollama.generation.decode import Row
from nanollama.generation.llama import Llama, Sampling
from nanollama.generation.sample import Filter, make_filter
from nanollama.generation.speculative import Draft, Drafter, DraftModel, Judge, Lookup
from nanollama.model import Transformer

DRAFTERS: dict[str, Drafter] = {
    "lookup": Lookup(),
    "itself": DraftModel(tiny.model()),
    "another model": DraftModel(tiny.model(seed=1, dim=16, n_heads=2, n_kv_heads=1)),
    "short context": DraftModel(tiny.model(max_seq_len=20)),
}


class Parrot:
    """Guesses the same tokens forever."""

    def start(self) -> "Parrot":
        return self

    def propose(self, ids: list[int], n: int, row: Row, keep: Filter | None) -> Draft:
        return Draft([7] * n)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.model()


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([*DRAFTERS.values(), Parrot()]),
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.sampled_from([1.0, 1.3]),
    st.integers(1, 25),
)
def test_greedy_answers_are_those_of_plain_decoding(
    model: Transformer, drafter: Drafter, lengths: list[int], penalty: float, new_tokens: int
) -> None:
    prompts = [prompt_ids(length, i) for i, length in enumerate(lengths)]
    sampling = Sampling(max_new_tokens=new_tokens, repetition_penalty=penalty, n=2, stop_ids=frozenset([3]))
    plain = list(Llama(model).generate(prompts, sampling))
    drafted = list(Llama(model, drafter=drafter).generate(prompts, sampling))
    for i in range(len(prompts)):
        for answer in range(2):
            assert_same_answer(of_row(drafted, i, answer), of_row(plain, i, answer))


def test_right_guesses_save_passes(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda *args, **kwargs: passes.append(args[0].shape[1]) or real(*args, **kwargs)
    )
    sampling = Sampling(max_new_tokens=25)
    list(Llama(model, drafter=DraftModel(tiny.model())).generate([prompt_ids(9, 1)], sampling))
    # The prompt, and then five guesses and one token more for each pass.
    assert passes == [9, 6, 6, 6, 6]


def test_lookup_guesses_what_followed_last_time() -> None:
    row = tiny.row(context=50)
    assert Lookup().propose([1, 2, 3, 4, 5, 2, 3], 2, row, None).tokens == [4, 5]
    assert Lookup().propose([3, 9, 3, 8, 3], 1, row, None).tokens == [8]  # the latest of two places
    assert Lookup().propose([1, 2, 3], 4, row, None).tokens == []
    assert Lookup(longest=1).propose([2, 3, 4, 3, 5, 9, 3], 2, row, None).tokens == [5, 9]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, float]:
    """The statistic over tokens expected at least five times (the others together), and its bound at 1 in 100,000."""
    expected = p * counts.sum()
    common = expected >= 5
    observed = torch.cat((counts[common].double(), counts[~common].sum().double()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    keep = wanted > 0
    assert not bool(observed[~keep].any()), "a token of probability 0 was drawn"
    freedom = int(keep.sum()) - 1
    statistic = float(((observed - wanted)[keep] ** 2 / wanted[keep]).sum())
    # Wilson and Hilferty's approximation of the chi-square quantile.
    z = 4.265
    return statistic, freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("certain", [True, False], ids=["lookup", "draft model"])
def test_a_judged_token_is_distributed_as_the_models_own(certain: bool, filters: dict[str, float]) -> None:
    draws, vocab = 5_000, 12
    rng = torch.Generator().manual_seed(3)
    logits, drafted = torch.randn(2, vocab, generator=rng) * 1.5, torch.randn(vocab, generator=rng)
    sampling = Sampling(temperature=0.7, seed=11, **filters)  # type: ignore[arg-type]
    row = tiny.row(sampling=sampling, context=10)
    judge = Judge(row, sampling, None)
    q = drafted.double().softmax(-1)
    guesses = torch.multinomial(q, draws, replacement=True, generator=rng).tolist()
    counts, following = torch.zeros(vocab, dtype=torch.long), torch.zeros(vocab, dtype=torch.long)
    for guess in guesses:
        draft = Draft([4 if certain else guess], None if certain else q.unsqueeze(0))
        decided = [token for token, *_ in judge.decide(logits, draft)]
        counts[decided[0]] += 1
        if len(decided) == 2:
            following[decided[1]] += 1
    keep = make_filter(0.7, **filters)  # type: ignore[arg-type]
    p = keep(logits).double().softmax(-1)
    for found, wanted in ((counts, p[0]), (following, p[1])):
        statistic, bound = chi_square(found, wanted)
        assert statistic < bound


@pytest.mark.parametrize("name", ["lookup", "another model"])
def test_sampled_answers_have_the_distribution_of_plain_ones(model: Transformer, name: str) -> None:
    """The second token of many answers, whose guesses depend on the first: against the exact mixture."""
    prompt, n = [5, 9, 5, 9, 5], 400
    sampling = Sampling(max_new_tokens=2, temperature=1.0, top_k=4, n=n, seed=2)
    events = Llama(model, drafter=DRAFTERS[name]).generate([prompt], sampling)
    counts = torch.zeros(VOCAB, dtype=torch.long)
    for event in list(events)[1::2]:
        counts[event.token] += 1
    keep = make_filter(1.0, top_k=4)
    with torch.inference_mode():
        first = keep(model(torch.tensor([prompt]))[:, -1]).double().softmax(-1)[0]  # (V,)
        after = torch.stack([keep(model(torch.tensor([[*prompt, i]]))[:, -1])[0] for i in range(VOCAB)])  # (V, V)
    statistic, bound = chi_square(counts, first @ after.double().softmax(-1))
    assert statistic < bound


def test_a_seed_repeats_its_answer(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=4)
    llama = Llama(model, drafter=DRAFTERS["another model"])
    assert tokens(llama.generate([prompt_ids(7, 2)], sampling)) == tokens(llama.generate([prompt_ids(7, 2)], sampling))
