"""Vocabularies in GGUF headers as converters of all ages wrote them: the same ids, or a line with what to give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanollama.tokenizer import Tokenizer, open_tokenizer
from nanollama.vocabulary import TokenizerError, read
from nanollama.vocabulary.write import gguf_keys

TEXT = "Once upon a time,\n  Lily saw 3 balls. é 漢"


@pytest.fixture
def opened(test_data: Callable[[str], Path], tmp_path: Path) -> Callable[..., Tokenizer]:
    """Opens the 512 words in a header with these keys changed; ... leaves one out."""
    gguf = pytest.importorskip("gguf")
    keys = gguf_keys(read(test_data("tok512.bin")), 512)

    def make(**changes: Any) -> Tokenizer:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        for key, value in (keys | {f"tokenizer.{name}": value for name, value in changes.items()}).items():
            if value is not ...:
                add[type(value)](key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return open_tokenizer(tmp_path / "x.gguf")

    return make


@pytest.mark.parametrize("types", [..., [1] * 512])
def test_token_types_that_are_not_there_are_known_by_the_names(
    opened: Callable[..., Tokenizer], test_data: Callable[[str], Path], types: Any
) -> None:
    found, expected = opened(**{"ggml.token_type": types}), open_tokenizer(test_data("tok512.bin"))
    ids = expected.encode(TEXT, bos=True)
    assert found.encode(TEXT, bos=True) == ids
    assert found.decode(ids) == expected.decode(ids)
    assert found.special_ids == expected.special_ids


@pytest.mark.parametrize("role", ["bos", "eos", "padding"])
def test_an_id_of_minus_one_says_that_there_is_none(opened: Callable[..., Tokenizer], role: str) -> None:
    found = opened(**{f"ggml.{role}_token_id": 2**32 - 1})
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, None)  # by their usual names


def test_templates_with_names_are_kept(opened: Callable[..., Tokenizer]) -> None:
    found = opened(chat_template="D", **{"chat_template.tool_use": "T", "chat_templates": ["tool_use"]})
    assert (found.vocabulary.chat_template, found.vocabulary.named_templates) == ("D", {"tool_use": "T"})


@pytest.mark.parametrize("changes", [{"ggml.scores": ...}, {"ggml.model": "bert"}, {"ggml.tokens": ...}])
def test_a_header_without_a_tokenizer_says_what_to_give(opened: Callable[..., Tokenizer], changes: Any) -> None:
    with pytest.raises(TokenizerError, match="give the model's own tokenizer with --tokenizer"):
        opened(**changes)


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("midm-2.0", True), ("smaug-bpe", False)])
def test_names_of_llama3s_pattern_differ_in_whole_words(
    opened: Callable[..., Tokenizer], pre: str, whole: bool
) -> None:
    """llama.cpp takes a word that is a token as it is for the one, and merges for the other; both cut by threes."""
    letters = [chr(33 + i) for i in range(94)] + ["Ġ", "123", "99", "ab"]
    tokens = list(dict.fromkeys(letters))
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [1] * len(tokens), "merges": ["9 9"]}
    gone = dict.fromkeys(("scores", "unknown_token_id", "bos_token_id", "eos_token_id", "add_space_prefix"), ...)
    found = opened(**{f"ggml.{name}": value for name, value in (keys | gone).items()})
    ids = found.encode("ab 123", bos=False)
    spelled = [found.vocabulary.tokens[i] for i in ids]
    assert spelled == ([b"ab"] if whole else [b"a", b"b"]) + [b" "] + ([b"123"] if whole else [b"1", b"2", b"3"])
