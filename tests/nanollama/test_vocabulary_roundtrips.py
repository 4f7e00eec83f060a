"""Ten vocabularies through every format: ids, names, EOS and template stay, or the format refuses by name.

transformers opens each of the folders beside us: its ids are the truth for those that it has files for.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nanollama import gguf_header
from nanollama.checkpoint import convert, open_checkpoint
from nanollama.tokenizer import Tokenizer, open_tokenizer
from nanollama.vocabulary import TokenizerError
from nanollama.vocabulary.write import LLAMA3_TEMPLATE
from vocabularies import VOCABULARIES, facts

DESTINATIONS = {"meta": "meta", "hf": "hf", "gguf": "x.gguf", "llama2c": "bin/x.bin"}
# What a tokenizer.bin cannot say, and the word that says so.
REFUSED = {
    "Llama 3": "byte tokens",
    "ChatML Llama 3": "byte tokens",
    "DeepSeek names": "byte tokens",
    "GPT-2-style BPE": "byte tokens",
    "Llama 2 by transformers 5": "space before every text",
    "tokens in tokenizer_config": "special token <|im_start|>",
    "tokens in added_tokens.json": "special token <|im_start|>",
}
# What is carried in a form that the format's own programs do not read, which is said.
SAID = {(name, "meta"): ["tokenizer.json is written"] for name in [*REFUSED][1:5]}
SAID[("Llama 2 by transformers 5", "gguf")] = ["carried whole"]
LETTERS = "abe rst  \n\t€กขü😀12.,'!▁"


def corpus(seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = [
        "",
        " ",
        "  two  spaces ",
        "สวัสดีชาวโลก",
        "\r\n\r\n x",
        "a" * 40,
        "it's 3.14",
        "1234567",
        "Once upon a time",
    ]
    texts += ["<|im_end|> is text, </s> too", "<｜User｜>"]
    return texts + ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 40))) for _ in range(150)]


@pytest.fixture(scope="module")
def sources(test_data: Callable[[str], Path], llama3_tokenizer_path: Path) -> Callable[[str], Path]:
    return lambda name: llama3_tokenizer_path if name == "llama3" else test_data(name)


@pytest.fixture(scope="module", params=VOCABULARIES)
def source(request: pytest.FixtureRequest, sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("v") / "source"
    return request.param, VOCABULARIES[request.param](folder, sources)


def opened(checkpoint: Path) -> tuple[Path, Tokenizer]:
    path = open_checkpoint(checkpoint).tokenizer
    assert path is not None
    return path, open_tokenizer(path)


@pytest.mark.parametrize("format", DESTINATIONS)
def test_a_vocabulary_keeps_ids_names_ends_and_template(source: tuple[str, Path], format: str, tmp_path: Path) -> None:
    name, folder = source
    target = tmp_path / DESTINATIONS[format]
    if format == "llama2c" and name in REFUSED:
        with pytest.raises(TokenizerError, match=REFUSED[name]):
            convert(folder, target, format)
        assert not target.exists()
        return
    notices = convert(folder, target, format).notices
    assert [word for word in ("tokenizer.json is written", "carried whole") if word in str(notices)] == SAID.get(
        (name, format), []
    )
    before, ours = opened(folder)
    after, again = opened(target)
    expected, found = facts(before), facts(after)
    if name == "Llama 3" and format in ("hf", "gguf"):  # Meta's files have no place for the template that is theirs
        assert found.pop("chat_template") == LLAMA3_TEMPLATE
        expected.pop("chat_template")
    assert found == expected
    for text in corpus(0):
        assert again.encode(text, bos=True) == ours.encode(text, bos=True), text
        assert again.encode(text, bos=False, allowed_special="all") == ours.encode(
            text, bos=False, allowed_special="all"
        )
        ids = ours.encode(text, bos=True, eos=True)
        assert again.decode(ids) == ours.decode(ids)


def test_a_tour_of_the_formats_ends_where_it_began(source: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = source
    convert(folder, tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    before, ours = opened(folder)
    after, again = opened(tmp_path / "hf")
    expected, found = facts(before), facts(after)
    if expected["chat_template"] is None:
        assert found.pop("chat_template") in (None, LLAMA3_TEMPLATE)
        expected.pop("chat_template")
    assert found == expected
    for text in corpus(1):
        assert again.encode(text, bos=True) == ours.encode(text, bos=True)


def test_transformers_gives_the_same_ids(source: tuple[str, Path], tmp_path: Path) -> None:
    """It opens the folder as it is, or, of Meta's, what we make of it."""
    from transformers import AutoTokenizer

    _, folder = source
    if not (folder / "tokenizer.json").exists():
        convert(folder, tmp_path / "hf", "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf" if (tmp_path / "hf").exists() else folder)
    _, ours = opened(folder)
    for text in corpus(2):
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, bos=False) == plain, text
        assert ours.encode(text, bos=False, allowed_special="all") == theirs.encode(text, add_special_tokens=False)
    assert ours.encode("Once", bos=True) == theirs("Once").input_ids


def test_gguf_names_the_ends_of_a_turn_and_of_a_message(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp stops at each of them."""
    folder = VOCABULARIES["Llama 3"](tmp_path / "llama3", sources)
    convert(folder, tmp_path / "x.gguf", "gguf")
    keys = gguf_header.read(tmp_path / "x.gguf").keys
    names = {
        role: keys["tokenizer.ggml.tokens"][keys[f"tokenizer.ggml.{role}_token_id"]] for role in ("eot", "eom", "eos")
    }
    assert names == {"eot": "<|eot_id|>", "eom": "<|eom_id|>", "eos": "<|end_of_text|>"}
