"""Added tokens whose ids a file says otherwise than the `tokenizers` library numbers them: the library's ids hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nanollama.tokenizer import open_tokenizer
from nanollama.vocabulary import read
from nanollama.vocabulary.write import hf_files

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPACED = "\u2581Once"  # a word of the model, 403
ADDED = {
    "behind a gap": [(600, "<|a|>"), (700, "<|b|>")],
    "where a word is": [(100, "<|a|>")],
    "a word by another number": [(512, SPACED), (513, "<|a|>")],
    "twice": [(512, "<|a|>"), (513, "<|a|>"), (514, "<|b|>")],
}


@pytest.fixture
def content(test_data: Callable[[str], Path]) -> dict[str, Any]:
    return json.loads(hf_files(read(test_data("tok512.bin")))["tokenizer.json"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ADDED)
def test_added_tokens_have_the_ids_that_the_library_gives_them(
    content: dict[str, Any], tmp_path: Path, what: str
) -> None:
    content["added_tokens"] += [{"id": i, "content": name, **FLAGS} for i, name in ADDED[what]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours, theirs = open_tokenizer(tmp_path / "tokenizer.json"), tokenizers.Tokenizer.from_str(json.dumps(content))
    for _, name in ADDED[what]:
        assert ours.special_ids[name] == theirs.token_to_id(name)
    text = "a<|a|> b <|b|>"
    some = ours.special_ids.keys() & {"<|a|>", "<|b|>"}
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=False, allowed_special="all") == expected
    assert [i for i in ours.encode(text, bos=False, allowed_special=set(some)) if i > 511] == [
        i for i in expected if i > 511
    ]


def test_tokens_beside_a_tokenizer_follow_without_a_gap(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 600}')
    found = open_tokenizer(tmp_path / "tokenizer.json")
    assert found.special_ids["<|im_end|>"] == 512 and 512 in found.stop_ids


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_a_text_begins_with_what_the_post_processor_puts_there(
    content: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    more = {"trim_offsets": True, "add_prefix_space": False} if kind == "RobertaProcessing" else {}
    content["post_processor"] = {"type": kind, "sep": ["</s>", 2], "cls": ["<s>", 1], **more}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content)).encode("Once").ids
    assert open_tokenizer(tmp_path / "tokenizer.json").encode("Once", bos=True) == theirs[:-1]  # a prompt does not end
