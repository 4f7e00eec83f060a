"""Generation: a row in a batch is the row alone, a prompt in chunks the prompt whole; answers end where they should."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from generation_cases import VOCAB, assert_same_answer, of_row, prompt_ids, tokens
from nanollama.generation import decode as generate
from nanollama.generation.decode import AnswerText, prefill
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import Transformer
from nanollama.speed.static import StaticStep
from nanollama.tokenizer import Tokenizer, open_tokenizer


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(tiny.model())


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> Llama:
    """A small model over the Llama 3 vocabulary: its answers are noise, but they are text."""
    return Llama(tiny.model(tokenizer.vocab_size, dim=16, n_heads=2, n_kv_heads=1), tokenizer)


def test_greedy_answers_are_the_argmax_of_the_full_forward_pass(llama: Llama) -> None:
    prompt = prompt_ids(9, 1)
    events = list(llama.generate([prompt], Sampling(max_new_tokens=12)))
    with torch.inference_mode():
        logits = llama.model(torch.tensor([prompt + tokens(events)]))[0, len(prompt) - 1 : -1]
    assert tokens(events) == logits.argmax(-1).tolist()
    logprobs = logits.log_softmax(-1).amax(-1)
    assert [event.logprob for event in events] == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert [event.finish for event in events] == [None] * 11 + ["length"]


@settings(max_examples=15)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 3), st.sampled_from([0.0, 1.0]))
def test_a_row_in_a_ragged_batch_is_the_row_alone(
    llama: Llama, lengths: list[int], seed: int, temperature: float
) -> None:
    prompts = [prompt_ids(length, 10 * seed + i) for i, length in enumerate(lengths)]
    # Several stop tokens, so that rows leave the batch at different steps.
    sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=seed, stop_ids=frozenset(range(0, VOCAB, 7)))
    together = list(llama.generate(prompts, sampling))
    for i, prompt in enumerate(prompts):
        assert_same_answer(of_row(together, i), list(llama.generate([prompt], sampling)))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 3), st.booleans())
def test_the_static_step_of_gpus_decodes_the_same(llama: Llama, lengths: list[int], seed: int, compile: bool) -> None:
    prompts = [prompt_ids(length, 10 * seed + i) for i, length in enumerate(lengths)]
    sampling = Sampling(max_new_tokens=8, stop_ids=frozenset(range(0, VOCAB, 7)))
    static = Llama(llama.model)
    static.steps.choose = lambda rows, tokens: StaticStep(llama.model, compile=compile)  # type: ignore[method-assign]
    got, wanted = list(static.generate(prompts, sampling)), list(llama.generate(prompts, sampling))
    for i in range(len(prompts)):
        assert_same_answer(of_row(got, i), of_row(wanted, i))


def test_rows_that_stop_leave_the_batch(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=1.0, stop_ids=frozenset(range(0, VOCAB, 7)))
    sizes: list[int] = []
    real = llama.model.hidden

    def spy(ids, positions, cache):  # type: ignore[no-untyped-def]
        sizes.append(ids.shape[0])
        return real(ids, positions, cache=cache)

    monkeypatch.setattr(llama.model, "hidden", spy)
    prompts = [prompt_ids(5 + i, i) for i in range(6)]
    events = list(llama.generate(prompts, sampling))
    lengths = [len(of_row(events, i)) for i in range(6)]
    assert len(set(lengths)) > 2
    assert sizes[6:] == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(1, 90))
def test_a_prompt_in_chunks_is_the_prompt_whole(llama: Llama, length: int, chunk: int) -> None:
    row = [tiny.row(prompt_ids(length, length))]
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        _, whole = prefill(llama.model, row)
        patch.setattr(generate, "PREFILL_CHUNK_TOKENS", chunk)
        _, chunked = prefill(llama.model, row)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_a_seed_gives_the_same_tokens_at_every_place_in_the_batch(llama: Llama) -> None:
    prompt, sampling = prompt_ids(7, 2), Sampling(max_new_tokens=20, temperature=1.0, seed=5)
    others = [prompt_ids(3, 3), prompt_ids(50, 4)]
    first = of_row(llama.generate([prompt, *others], sampling), 0)
    last = of_row(llama.generate([*others, prompt], sampling), 2)
    assert_same_answer(first, last)
    other_seed = list(llama.generate([prompt], Sampling(max_new_tokens=20, temperature=1.0, seed=6)))
    assert tokens(first) != tokens(other_seed)


def test_n_answers_differ_and_the_first_is_the_only_one_of_n_1(llama: Llama) -> None:
    prompts = [prompt_ids(7, 2), prompt_ids(11, 3)]
    three = list(llama.generate(prompts, Sampling(max_new_tokens=15, temperature=1.0, n=3)))
    one = list(llama.generate(prompts, Sampling(max_new_tokens=15, temperature=1.0)))
    for i in range(2):
        assert_same_answer(of_row(three, i, 0), of_row(one, i))
        assert len({tuple(tokens(of_row(three, i, answer))) for answer in range(3)}) == 3


def test_the_model_dtype_and_the_exact_path_generate_too() -> None:
    model = Transformer.from_weights(tiny.model().config, tiny.model().state_dict(), attention="exact")
    prompt = prompt_ids(9, 1)
    exact = list(Llama(model).generate([prompt, prompt_ids(4, 2)], Sampling(max_new_tokens=6)))
    fast = list(Llama(tiny.model()).generate([prompt, prompt_ids(4, 2)], Sampling(max_new_tokens=6)))
    assert_same_answer(exact, fast)
    half = Llama(tiny.model().to(torch.bfloat16))
    assert len(list(half.generate([prompt], Sampling(max_new_tokens=6)))) == 6


def test_repetition_penalty_leaves_no_token_twice(llama: Llama) -> None:
    prompts = [prompt_ids(3, 8), prompt_ids(6, 9)]
    events = list(llama.generate(prompts, Sampling(max_new_tokens=25, repetition_penalty=1e9)))
    for i, prompt in enumerate(prompts):
        answer = tokens(of_row(events, i))
        assert len(set(answer)) == 25
        assert not set(answer) & set(prompt)


def test_answers_end_where_the_context_does(llama: Llama) -> None:
    context = llama.config.max_seq_len
    lengths = [context - 4, context - 1, context]
    events = list(llama.generate([prompt_ids(n, n) for n in lengths], Sampling(max_new_tokens=50)))
    # The token after a full context can still be decided; it cannot be read.
    assert [len(of_row(events, i)) for i in range(3)] == [5, 2, 1]
    assert all(of_row(events, i)[-1].finish == "length" for i in range(3))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [2] * 401], r"^prompt 1 has 401 tokens and the context holds 400: shorten it$"),
        ([[]], "^prompt 0 is empty"),
        ([[1, VOCAB]], "^prompt 0 has a token id outside of the model's 0..60$"),
        ([[-1]], "^prompt 0 has a token id outside"),
        (["text"], "no tokenizer beside it"),
    ],
)
def test_unusable_prompts_are_refused_before_the_first_token(
    llama: Llama, prompts: list[str | list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llama.generate(prompts)


def test_no_prompts_no_events(llama: Llama) -> None:
    assert list(llama.generate([])) == []


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"n": 0}, {"repetition_penalty": 0.0}, {"stop": [""]}, {"stop": "text"}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_pieces_join_to_the_decoded_answer(talker: Llama, tokenizer: Tokenizer) -> None:
    events = list(talker.generate(["Once upon", "ไทย 🙂"], Sampling(max_new_tokens=40, temperature=1.0)))
    for i in range(2):
        row = of_row(events, i)
        assert "".join(event.text for event in row) == tokenizer.decode(tokens(row))


def test_a_character_that_the_limit_cuts_is_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙🦒", bos=False)
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    row = tiny.row(sampling=Sampling(max_new_tokens=len(ids) - 1), tokenizer=tokenizer, context=100)
    assert "".join(row.add(token, 0.0).text for token in ids[:-1]) == "🦙"


def test_stop_texts_end_an_answer_and_are_not_shown(talker: Llama, tokenizer: Tokenizer) -> None:
    whole = list(talker.generate(["Once upon"], Sampling(max_new_tokens=30, temperature=1.0)))
    text = tokenizer.decode(tokens(whole))
    # Texts that start within one token and end within a later one.
    for start, end in ((20, 26), (33, 34), (41, 60)):
        stop = text[start:end]
        cut = list(talker.generate(["Once upon"], Sampling(max_new_tokens=30, temperature=1.0, stop=["§§", stop])))
        assert "".join(event.text for event in cut) == text[: text.index(stop)]
        assert cut[-1].finish == "stop"
        assert len(cut) < len(whole)


def test_a_stop_token_ends_an_answer_without_text(talker: Llama, tokenizer: Tokenizer) -> None:
    whole = list(talker.generate(["Once upon"], Sampling(max_new_tokens=9)))
    sampling = Sampling(max_new_tokens=9, stop_ids=frozenset([whole[4].token]))
    cut = list(talker.generate(["Once upon"], sampling))
    first = tokens(whole).index(whole[4].token)
    assert tokens(cut) == tokens(whole)[: first + 1]
    assert (cut[-1].text, cut[-1].finish) == ("", "stop")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_held_back_text_is_never_lost_nor_early(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    shown = AnswerText(tokenizer, [], stop)
    out = ""
    for token in tokenizer.encode(text, bos=False):
        out += shown.push(token)
        if shown.stopped:
            break
    out += shown.flush()
    # The stream stops at the first character that completes a stop text; what is shown ends before that text.
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    assert not any(s in out for s in stop)
    assert text.startswith(out)
    assert out == text if not ends else len(out) <= min(ends)[1]


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="128,256 tokens and the model 61"):
        Llama(tiny.model(), tokenizer)
