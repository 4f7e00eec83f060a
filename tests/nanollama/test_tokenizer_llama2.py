"""Llama 2 and llama2.c: ids equal the sentencepiece package's, transformers' LlamaTokenizer's and run.c's merging.

Known exceptions (docs/tokenizers.md): "▁" in a text is a space to sentencepiece; transformers puts no space before a
text that starts with one; text before and after a parsed special token.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from nanollama.tokenizer import Tokenizer, TokenizerError, open_tokenizer
from text_strategies import texts

TestData = Callable[[str], Path]
NO_LOWER_BAR = "▁"  # U+2581, sentencepiece's space


@pytest.fixture(scope="module")
def package(test_data: TestData) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(test_data("llama2_tokenizer.model")))


@pytest.fixture(scope="module")
def llama2(test_data: TestData) -> Tokenizer:
    return open_tokenizer(test_data("llama2_tokenizer.model"))


@pytest.fixture(scope="module")
def theirs(package: sentencepiece.SentencePieceProcessor) -> LlamaTokenizer:
    """transformers' tokenizer from the same vocabulary; its own reader of .model files needs protobuf."""
    vocab = {package.id_to_piece(i): i for i in range(package.vocab_size())}
    scores = {package.id_to_piece(i): package.get_score(i) for i in range(259, package.vocab_size())}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))


@pytest.fixture(scope="module")
def from_json(theirs: LlamaTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.json"
    theirs._tokenizer.save(str(path))
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def published_json(theirs: LlamaTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In the form of the tokenizer.json that lies beside Llama 2's published weights: a normalizer puts the space."""
    content = json.loads(theirs._tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    content["pre_tokenizer"] = None
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path = tmp_path_factory.mktemp("published") / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def llama2_bin(package: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's vocabulary as llama2.c's tokenizer.py exports it."""
    entries = []
    for i in range(package.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, package.id_to_piece(i)).replace("▁", " ").encode()
        entries.append(struct.pack("<fi", package.get_score(i), len(piece)) + piece)
    path = tmp_path_factory.mktemp("bin") / "tokenizer.bin"
    path.write_bytes(struct.pack("<I", max(map(len, entries)) - 8) + b"".join(entries))
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def tok512(test_data: TestData) -> Tokenizer:
    return open_tokenizer(test_data("tok512.bin"))


def test_llama2_vocabulary(llama2: Tokenizer) -> None:
    assert (llama2.kind, llama2.vocab_size, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (
        "llama2",
        32000,
        1,
        2,
        None,
    )
    assert llama2.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert llama2.stop_ids == {2}


@settings(max_examples=250)
@given(text=texts(), bos=st.booleans(), eos=st.booleans())
def test_ids_equal_sentencepieces(
    llama2: Tokenizer, package: sentencepiece.SentencePieceProcessor, text: str, bos: bool, eos: bool
) -> None:
    ids = llama2.encode(text, bos=bos, eos=eos)
    assert ids == package.encode(text, add_bos=bos, add_eos=eos)
    assert llama2.decode(ids) == package.decode(ids)


@settings(max_examples=200)
@given(text=texts(lookalikes=False, exclude=NO_LOWER_BAR))
@example(" two")
def test_ids_equal_transformers(llama2: Tokenizer, theirs: LlamaTokenizer, from_json: Tokenizer, text: str) -> None:
    text = text.lstrip(" ")  # transformers adds no space of its own before one
    expected = llama2.encode(text, bos=False)
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == expected
    assert from_json.encode(text, bos=False) == expected


@settings(max_examples=200)
@given(text=texts(), bos=st.booleans(), special=st.sampled_from([(), {"</s>"}]))
def test_published_json_equals_sentencepiece(
    llama2: Tokenizer, published_json: Tokenizer, text: str, bos: bool, special: set[str]
) -> None:
    ids = published_json.encode(text, bos=bos, allowed_special=special)
    assert ids == llama2.encode(text, bos=bos, allowed_special=special)
    assert published_json.decode(ids) == llama2.decode(ids)


@settings(max_examples=200)
@given(text=texts(exclude=NO_LOWER_BAR))
def test_run_c_merging_equals_sentencepiece(llama2: Tokenizer, llama2_bin: Tokenizer, text: str) -> None:
    """Two algorithms over one vocabulary: best score first, and sentencepiece's own."""
    ids = llama2_bin.encode(text, bos=True, eos=True)
    assert ids == llama2.encode(text, bos=True, eos=True)
    assert llama2_bin.decode(ids) == llama2.decode(ids)


@pytest.mark.parametrize("kind", ["llama2", "llama2_bin", "tok512"])
@settings(max_examples=200)
@given(data=st.data())
def test_text_round_trips(kind: str, request: pytest.FixtureRequest, data: st.DataObject) -> None:
    tokenizer = request.getfixturevalue(kind)
    text = data.draw(texts(exclude=NO_LOWER_BAR))
    assert tokenizer.decode(tokenizer.encode(text, bos=data.draw(st.booleans()), eos=True)) == text


@pytest.mark.parametrize("kind", ["llama2", "llama2_bin", "tok512", "from_json"])
def test_special_token_text_stays_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    text = "a</s>b<s><unk><0x41>"
    ids = tokenizer.encode(text, bos=False)
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.decode(ids) == text
    assert 2 in tokenizer.encode(text, bos=False, allowed_special={"</s>"})
    assert {0, 1, 2} <= set(tokenizer.encode(text, bos=False, allowed_special="all"))


def test_lower_bar_is_a_space_to_sentencepiece(llama2: Tokenizer) -> None:
    assert llama2.decode(llama2.encode("a▁b", bos=False)) == "a b"


def test_lone_surrogates_become_replacement_characters(llama2: Tokenizer, llama2_bin: Tokenizer) -> None:
    for tokenizer in (llama2, llama2_bin):
        assert tokenizer.decode(tokenizer.encode("a\ud83db", bos=False)) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["llama2", "llama2_bin", "published_json"])
@settings(max_examples=200)
@given(data=st.data())
def test_decode_and_stream_equal_sentencepieces_decode(
    kind: str, request: pytest.FixtureRequest, package: sentencepiece.SentencePieceProcessor, data: st.DataObject
) -> None:
    """Over any ids: half characters, control pieces within them, spaces in front."""
    tokenizer = request.getfixturevalue(kind)
    unknown = 1 if kind == "llama2_bin" else 0  # run.c shows <unk> as it is spelled
    space, byte = st.sampled_from([29871, 259, 1, 2, unknown]), st.integers(3, 258)
    ids = data.draw(st.lists(st.one_of(space, byte, byte, st.integers(unknown, 31999)), max_size=25))
    expected = package.decode(ids)
    assert tokenizer.decode(ids) == expected
    stream = tokenizer.stream()
    for _ in range(2):  # a flushed stream is as new
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == expected


@settings(max_examples=150)
@given(text=texts(exclude=NO_LOWER_BAR))
def test_stream_never_shows_half_a_character(llama2: Tokenizer, text: str) -> None:
    stream = llama2.stream()
    shown = [stream.push(token_id) for token_id in llama2.encode(text, bos=True)]
    assert "".join(shown) == text
    assert all(part.count("\ufffd") == 0 for part in shown) or "\ufffd" in text


def test_generated_text_keeps_its_space_after_the_prompt(llama2: Tokenizer) -> None:
    stream = llama2.stream()
    for token_id in llama2.encode("Once upon", bos=True):
        stream.push(token_id)
    assert stream.push(263) == " a"


@pytest.mark.parametrize("kind", ["llama2", "llama2_bin", "tok512", "from_json"])
def test_ids_out_of_range_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match="outside"):
            tokenizer.decode([token_id])


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "ab " * 60_000], ids=["letters", "spaces", "words"])
def test_long_runs_take_seconds(llama2: Tokenizer, llama2_bin: Tokenizer, text: str) -> None:
    ids = llama2.encode(text, bos=False)
    assert llama2_bin.encode(text, bos=False) == ids
    assert llama2.decode(ids) == text


def test_tok512_splits_as_llama2_c_does(tok512: Tokenizer) -> None:
    assert (tok512.kind, tok512.vocab_size, tok512.pad_id) == ("llama2c", 512, None)
    ids = tok512.encode("Once upon a time", bos=True)
    assert ids == [1, 403, 407, 261, 378]  # the four tokens that stories260K's greedy text begins with
    assert [tok512.shown[i] for i in ids[1:]] == [" Once", " upon", " a", " time"]


def test_tok512_falls_back_to_bytes(tok512: Tokenizer) -> None:
    ids = tok512.encode("ก", bos=False)
    assert ids[1:] == [3 + byte for byte in "ก".encode()]
    stream = tok512.stream()
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "ก"]


def test_tok512_reads_a_story(tok512: Tokenizer, test_data: TestData) -> None:
    stories = test_data("tinystories_valid_excerpt.txt").read_text(encoding="utf-8")
    ids = tok512.encode(stories, bos=True)
    assert tok512.decode(ids) == stories
    assert len(ids) < 0.6 * len(stories)  # one token a character would be no merging


def test_own_vocabulary_opens(tmp_path: Path, test_data: TestData) -> None:
    """Trained as llama2.c trains its own."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(test_data("tinystories_valid_excerpt.txt")),
        model_prefix=str(tmp_path / "own"),
        model_type="bpe",
        vocab_size=400,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_surface=r" \342\201\207 ",
        minloglevel=2,
    )
    own = open_tokenizer(tmp_path / "own.model")
    package = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    assert (own.vocab_size, own.bos_id, own.eos_id, own.pad_id) == (400, 1, 2, None)
    for text in ["Once upon a time", "  two  spaces ", "ภาษา 😀\n"]:
        assert own.encode(text, bos=True) == package.encode(text, add_bos=True)
        assert own.decode(own.encode(text, bos=True)) == text
