"""Tokenizers of strangers on both ways: what would not end, fill the memory or panic is refused by its file."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from nanollama.gate import CheckpointError, tokenizers
from nanollama.tokenizer import TokenizerError, open_tokenizer
from reference.files import Checkpoint
from reference.files.guard import TEMPLATE_BYTES, limited
from reference.files.weights import Unusable, Weights
from reference.hf_text import HfText
from reference.meta_text import open_text
from vocabularies import words512

Edit = Callable[[dict[str, Any]], object]


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replaced(content: str, times: int, pattern: str = "o") -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [rule] * times}


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        made = {"type": "Sequence", "normalizers": [made]}
    return made


KINDS: dict[str, tuple[Edit, str]] = {
    "normalizers nested 300 deep": (lambda t: t.update(normalizer=nested(300)), "nested more than 32 deep"),
    "pre-tokenizers nested 40 deep": (lambda t: t.update(pre_tokenizer=nested(40)), "nested more than 32 deep"),
    "50 rules that double a text": (lambda t: t.update(normalizer=replaced("oo", 50)), "8 times its length|makes"),
    "rules behind a list that is not read": (
        lambda t: t.update(normalizer={"type": "Sequence", "a": [], **replaced("oo", 50)}),
        "8 times its length|makes",
    ),
    "a step that is a number": (lambda t: t.update(pre_tokenizer=2), "its pre_tokenizer is 2, not an object"),
    "a kind that is an object": (lambda t: t.update(normalizer={"type": {}}), "not a usable|cannot read"),
    "one rule that makes a thousand": (lambda t: t.update(normalizer=replaced("o" * 4000, 1)), "makes"),
    "a thousand steps": (lambda t: t.update(normalizer=replaced("o", 1000)), "at most 64"),
    "a prefix of 10^6 letters": (
        lambda t: t.update(normalizer={"type": "Prepend", "prepend": "a" * 10**6}),
        "a text of 1,000,000",
    ),
    "a prefix of a model of 10^6 letters": (
        lambda t: t["model"].update(continuing_subword_prefix="a" * 10**6),
        "continuing_subword_prefix has 1,000,000",
    ),
    "a regular expression that backtracks": (
        lambda t: t.update(normalizer=None, pre_tokenizer=split(r"(?=(\w+)*\1\1\1\1,)(?:\w|\w\w)*,")),
        "takes more than|backtrack|retry|panic|unwrap",
    ),
    "a broken regular expression": (lambda t: t.update(pre_tokenizer=split("(")), "not a usable tokenizer.json"),
    "a charsmap of zeros": (
        lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "Precompiled|charsmap|not a usable|cannot read",
    ),
    "a token of a megabyte": (lambda t: t["model"]["vocab"].update({"x" * 10**6: 512}), "1,000,000|a token of"),
    "an unknown normalizer": (lambda t: t.update(normalizer={"type": "Magic"}), "not a usable|cannot read"),
    "no model": (lambda t: t.pop("model"), 'no "model"'),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, test_data: Callable[[str], Path]) -> Path:
    made = words512(tmp_path_factory.mktemp("words") / "512", test_data)
    for name in ("tokenizer.model", "generation_config.json"):
        (made / name).unlink(missing_ok=True)
    return made


def spoiled(folder: Path, into: Path, edit: Edit) -> Path:
    """The folder's tokenizer with a change, alone."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(content)
    (into / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return into / "tokenizer.json"


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, "hf", {}, Weights({}, layout="hf", head_dim=8))


def refusal(call: Callable[[], object], kind: type[ValueError]) -> str:
    started = time.monotonic()
    with pytest.raises(kind) as refused:
        call()
    said = str(refused.value)
    assert "\n" not in said and len(said) < 900 and "tokenizer.json" in said
    assert time.monotonic() - started < 100  # a bound on hanging: the limits themselves are of CPU time
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_tokenizer_is_refused_on_both_ways(kind: str, folder: Path, tmp_path: Path) -> None:
    edit, part = KINDS[kind]
    path = spoiled(folder, tmp_path, edit)
    text = "so good, " * 20 + "o" * 5000
    assert re.search(part, refusal(lambda: open_tokenizer(path).encode(text, bos=True), TokenizerError))
    assert re.search(part, refusal(lambda: HfText(checkpoint(tmp_path), None).encode(text, bos=True), Unusable))


UNUSUAL: dict[str, Edit] = {
    "a regular expression of its own": lambda t: t.update(normalizer=None, pre_tokenizer=split(r"(?:\w+|\W)")),
    "a rule with a regular expression": lambda t: t["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": "x{2,}"}, "content": "x"}
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_tokenizer_encodes_as_it_stands(kind: str, folder: Path, tmp_path: Path) -> None:
    path = spoiled(folder, tmp_path, UNUSUAL[kind])
    assert not tokenizers.is_known(json.loads(path.read_text(encoding="utf-8")))
    from tokenizers import Tokenizer

    text = "Once upon a time, xxx"
    expected = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    opened = open_tokenizer(path)
    assert opened.encode(text, bos=False) == expected == opened.encode(text, bos=False)


def test_real_tokenizers_are_of_known_forms(folder: Path) -> None:
    assert tokenizers.is_known(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "unk_id", "pad_id"])
@pytest.mark.parametrize("value", [-5, 32000, 2**31 - 1])
def test_sentencepiece_ids_out_of_range_are_refused_on_both_ways(
    name: str, value: int, tmp_path: Path, test_data: Callable[[str], Path]
) -> None:
    model = ModelProto.FromString(test_data("llama2_tokenizer.model").read_bytes())
    setattr(model.trainer_spec, name, value)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    for call, kind in ((lambda: open_tokenizer(path), TokenizerError), (lambda: open_text(None, str(path)), Unusable)):
        with pytest.raises(kind, match=f"tokenizer.model: its {name} is {value}"):
            call()  # type: ignore[no-untyped-call]


def test_a_tokenizer_config_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    spoiled(folder, tmp_path, lambda t: None)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    with pytest.raises(Unusable, match=r"tokenizer_config.json: names code of its own"):
        HfText(checkpoint(tmp_path), None)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
)
def test_files_beside_a_tokenizer_are_files_on_both_ways(name: str, folder: Path, tmp_path: Path) -> None:
    path = spoiled(folder, tmp_path, lambda t: None)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=r"is a pipe|no regular file"):
        open_tokenizer(path)
    with pytest.raises(Unusable, match=r"is a pipe|has no tokenizer"):
        HfText(checkpoint(tmp_path), None)


TEMPLATES = {
    "an endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text without end": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "a string of 10^12": "{{ 'a' * 1000000000000 }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_beyond_its_limits_is_refused_by_the_reference(kind: str, tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def make() -> str:
        (texts, _) = render_jinja_template(conversations=[[]], chat_template=TEMPLATES[kind])
        return str(texts[0])

    with pytest.raises(Unusable, match=r"its chat template (takes|makes) more than"):
        limited(make, tmp_path, seconds=3)


def test_a_template_within_its_limits_is_rendered_as_it_is(tmp_path: Path) -> None:
    assert limited(lambda: "สวัสดี \ud800", tmp_path) == "สวัสดี \ud800"
    assert limited(lambda: None, tmp_path) is None
    assert limited(lambda: str(1 / 0), tmp_path) is None
    assert limited(lambda: "a" * TEMPLATE_BYTES, tmp_path) == "a" * TEMPLATE_BYTES


def test_a_guard_outlives_a_fork_of_its_owner(folder: Path, tmp_path: Path) -> None:
    path = spoiled(folder, tmp_path, UNUSUAL["a regular expression of its own"])
    guard = tokenizers.Guard(path.read_bytes(), path)
    child = os.fork()
    if child == 0:
        guard.check(text="in the child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    guard.check(text="here")
    guard.check(ids=[1, 2, 3])
    with pytest.raises(CheckpointError):
        guard.check(ids=[2**40])
    assert torch.is_grad_enabled()
