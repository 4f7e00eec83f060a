"""Llama 3: ids equal Meta's tokenizer and transformers' fast one, built from the same file.

Known exceptions, transformers against Meta and us (docs/tokenizers.md): special-token text, which transformers parses
and Meta keeps as text unless allowed; runs above 25,000 characters and texts above 400,000, which Meta cuts.
"""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from nanollama.tokenizer import Tokenizer, TokenizerError, open_tokenizer
from nanollama.tokenizer.llama3 import split_long
from text_strategies import texts


@pytest.fixture(scope="module")
def ours(llama3_tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def meta(llama3_tokenizer_path: Path) -> MetaTokenizer:
    return MetaTokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def converted(ours: Tokenizer, llama3_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json that transformers makes of Meta's file."""
    converter = TikTokenConverter(vocab_file=str(llama3_tokenizer_path), extra_special_tokens=list(ours.special_ids))
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    converter.converted().save(str(path))
    return path


@pytest.fixture(scope="module")
def theirs(converted: Path):  # type: ignore[no-untyped-def]
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(converted))


@pytest.fixture(scope="module")
def from_json(converted: Path) -> Tokenizer:
    return open_tokenizer(converted)


def test_vocabulary_is_metas(ours: Tokenizer, meta: MetaTokenizer) -> None:
    assert ours.kind == "llama3"
    assert ours.special_ids == meta.special_tokens
    assert len(ours.special_ids) == 256
    assert ours.vocab_size == meta.n_words == 128_256
    assert (
        (ours.bos_id, ours.eos_id, ours.pad_id) == (meta.bos_id, meta.eos_id, meta.pad_id) == (128000, 128001, 128004)
    )
    assert ours.stop_ids == set(meta.stop_tokens) == {128001, 128008, 128009}


@settings(max_examples=250)
@given(text=texts(), bos=st.booleans(), eos=st.booleans(), special=st.sampled_from([(), "all", {"<|eot_id|>"}]))
def test_ids_equal_metas(ours: Tokenizer, meta: MetaTokenizer, text: str, bos: bool, eos: bool, special) -> None:  # type: ignore[no-untyped-def]
    ids = ours.encode(text, bos=bos, eos=eos, allowed_special=special)
    assert ids == meta.encode(text, bos=bos, eos=eos, allowed_special=special if special else None)
    assert ours.decode(ids) == meta.decode(ids)


@settings(max_examples=200)
@given(text=texts(lookalikes=False))
def test_ids_equal_transformers(ours: Tokenizer, theirs, text: str) -> None:  # type: ignore[no-untyped-def]
    assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)


@settings(max_examples=100)
@given(text=texts())
def test_special_token_text_is_what_transformers_parses(ours: Tokenizer, theirs, text: str) -> None:  # type: ignore[no-untyped-def]
    assert ours.encode(text, bos=False, allowed_special="all") == theirs.encode(text, add_special_tokens=False)


@settings(max_examples=200)
@given(text=texts(), special=st.sampled_from([(), "all", {"<|eot_id|>"}]))
def test_tokenizer_json_gives_the_same(ours: Tokenizer, from_json: Tokenizer, text: str, special) -> None:  # type: ignore[no-untyped-def]
    ids = from_json.encode(text, bos=True, eos=True, allowed_special=special)
    assert ids == ours.encode(text, bos=True, eos=True, allowed_special=special)
    assert from_json.decode(ids) == ours.decode(ids)


def test_tokenizer_json_has_the_same_vocabulary(ours: Tokenizer, from_json: Tokenizer) -> None:
    assert from_json.kind == "hf"
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "special_ids"):
        assert getattr(from_json, name) == getattr(ours, name)


@settings(max_examples=200)
@given(text=texts())
def test_text_round_trips(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text, bos=False)) == text


def test_special_token_text_stays_text(ours: Tokenizer) -> None:
    plain = ours.encode("a<|eot_id|>b", bos=False)
    assert not set(plain) & set(ours.special_ids.values())
    eot = ours.special_ids["<|eot_id|>"]
    assert ours.encode("a<|eot_id|>b", bos=False, allowed_special={"<|eot_id|>"}).count(eot) == 1
    with pytest.raises(TokenizerError, match="no special token"):
        ours.encode("a", bos=False, allowed_special={"<|eot|>"})


def test_lone_surrogates_encode_as_metas(ours: Tokenizer, meta: MetaTokenizer, from_json: Tokenizer) -> None:
    text = "a\ud83d\ude00b\ud83dc"  # a pair that is an emoji, then half of one
    assert ours.encode(text, bos=False) == meta.encode(text, bos=False, eos=False) == from_json.encode(text, bos=False)
    assert ours.decode(ours.encode(text, bos=False)) == "a😀b\ufffdc"


RUNS = st.tuples(
    st.sampled_from(["a", " ", "é", "\n", "ab\n"]), st.sampled_from([1, 2, 24_999, 25_000, 25_001, 70_000])
)


@settings(max_examples=40)
@given(runs=st.lists(RUNS, max_size=8))
def test_long_runs_are_cut_where_metas_are(runs: list[tuple[str, int]]) -> None:
    text = "".join(part * count for part, count in runs)
    metas = [
        part
        for start in range(0, len(text), 400_000)
        for part in MetaTokenizer._split_whitespaces_or_nonwhitespaces(text[start : start + 400_000], 25_000)
    ]
    assert list(split_long(text)) == metas


@pytest.mark.parametrize(
    "text",
    [" " * 25_000, " " * 25_001 + "x", "x" + "\n" * 60_000, ("word " * 100_000)[:400_003], "y" * 30_000 + " z"],
    ids=["run", "longer_run", "line_ends", "chunks", "letters"],
)
def test_long_texts_equal_metas(ours: Tokenizer, meta: MetaTokenizer, text: str) -> None:
    assert ours.encode(text, bos=True) == meta.encode(text, bos=True, eos=False)


@pytest.mark.parametrize("kind", ["ours", "from_json"])
@settings(max_examples=150)
@given(data=st.data())
def test_stream_equals_decode(kind: str, request: pytest.FixtureRequest, data: st.DataObject) -> None:
    """Over any ids, most of which are no valid UTF-8 together."""
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.one_of(st.integers(0, 255), st.integers(0, tokenizer.vocab_size - 1)), max_size=30))
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=150)
@given(text=texts())
def test_stream_never_shows_half_a_character(ours: Tokenizer, text: str) -> None:
    stream = ours.stream()
    shown = [stream.push(token_id) for token_id in ours.encode(text, bos=False)]
    assert "".join(shown) == text
    assert stream.flush() == ""


def test_stream_waits_for_the_last_byte(ours: Tokenizer) -> None:
    ids = ours.encode("🧿", bos=False)
    assert len(ids) > 1
    stream = ours.stream()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🧿"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.parametrize("token_id", [-1, 128_256, 2**40])
def test_ids_out_of_range_are_refused(ours: Tokenizer, from_json: Tokenizer, token_id: int) -> None:
    for tokenizer in (ours, from_json):
        with pytest.raises(TokenizerError, match="outside"):
            tokenizer.decode([token_id])
        with pytest.raises(TokenizerError, match="outside"):
            tokenizer.stream().push(token_id)


def test_the_file_is_metas(llama3_tokenizer_path: Path) -> None:
    """The file in llama_models is the one that ships with the 8B weights (its published sha256)."""
    digest = hashlib.sha256(llama3_tokenizer_path.read_bytes()).hexdigest()
    assert digest == "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
