"""Checks `tokens` and `chat` where a checkpoint brings several tokenizers: who is judged by which, and what is said."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nanollama.chat import ChatError, encode_chat
from parity.candidates.nano.model import Nano
from parity.checks.identity import chat, disagreements, tokens
from parity.contract import Case, Result, Status
from parity.measure.evidence import Evidence
from parity.report.terminal import list_uncovered

TEXTS, DIALOGS = ["one", "two", "three"], [[{"role": "user", "content": "Hi"}]]
MODEL, JSON = [[1, 5], [1, 6], [1, 7]], [[1, 5], [1, 60], [1, 7]]
META, HF = "tokenizer.model (Meta's code)", "tokenizer.json (transformers)"


def reading(name: str, ids: list[list[int]] | None, dialogs: list[list[int]] | None = None) -> dict[str, Any]:
    chat_name = f"template by {name}"
    return {"tokens": name, "chat": chat_name, "token_ids": ids, "corpus_ids": [], "dialog_ids": dialogs}


def trace(*readings: dict[str, Any], untexted: str | None = None) -> Any:
    own = readings[0] if readings else reading("", None)
    return SimpleNamespace(meta={**own, "untexted": untexted, "readings": list(readings)})


def evidence(candidate: list[list[int]], dialogs: list[list[int]] | None = None, **references: Any) -> Evidence:
    case = Case("folder", ["fp32"], texts=TEXTS, dialogs=DIALOGS)
    return Evidence(case, trace(), references, {"exact": trace(reading("", candidate, dialogs))})


def by_reference(results: Any) -> dict[str | None, Result]:
    return {result.reference: result for result in results}


def test_a_candidate_that_follows_one_of_two_files_is_not_blamed() -> None:
    ev = evidence(MODEL, meta=trace(reading(META, MODEL)), hf=trace(reading(HF, JSON)))
    found = by_reference(tokens(ev))
    assert (found["meta"].status, found["hf"].status) == (Status.PASS, Status.SKIP)
    assert not found["hf"].required and f"follows {META} in every text" in (found["hf"].reason or "")
    assert "two" in (found["hf"].where or "") and found["hf"].value == 1
    [line] = list_uncovered([found["hf"]])
    assert line == f"tokens (exact, against hf): the candidate follows {META} in every text, this reference {HF}: " + (
        "the two disagree"
    )


def test_where_the_files_disagree_it_is_a_finding_about_the_checkpoint() -> None:
    ev = evidence(MODEL, meta=trace(reading(META, MODEL)), hf=trace(reading(HF, JSON)))
    [finding] = disagreements(ev)
    assert finding.startswith(f"the checkpoint's tokenizers disagree: {META} and {HF} give different ids for 1 of 3")
    assert "first at token 1, id 1: [6] for [60] in 'two'" in finding
    stands = reading("tokenizer.json (as it stands)", JSON)
    ev = evidence(MODEL, meta=trace(reading(META, MODEL)), hf=trace(reading(HF, JSON), reading(HF, JSON), stands))
    assert disagreements(ev) == [finding]  # the same ids again are the same finding
    ev = evidence(MODEL, meta=trace(reading(META, MODEL)), hf=trace(reading(HF, MODEL)))
    assert disagreements(ev) == []


@pytest.mark.parametrize("wrong", [[[1, 5], [1, 6], [1, 70]], [[1, 50], [1, 6], [1, 7]], [[5], [6], [7]]])
def test_a_candidate_that_follows_neither_file_fails_against_both(wrong: list[list[int]]) -> None:
    ev = evidence(wrong, meta=trace(reading(META, MODEL)), hf=trace(reading(HF, JSON)))
    assert {r.status for r in tokens(ev)} == {Status.FAIL}


def test_following_each_file_in_some_texts_is_following_neither() -> None:
    other = [[1, 5], [1, 6], [1, 77]]
    ev = evidence([[1, 5], [1, 6], [1, 7]], meta=trace(reading(META, JSON)), hf=trace(reading(HF, other)))
    assert {r.status for r in tokens(ev)} == {Status.FAIL}


def test_a_candidate_that_runs_tokenizer_json_as_it_stands_is_not_blamed_for_a_class_of_transformers() -> None:
    stands = reading("tokenizer.json (as it stands)", MODEL)
    ev = evidence(MODEL, hf=trace(reading(HF, JSON), reading(HF, JSON), stands))
    [found] = tokens(ev)
    assert found.status is Status.SKIP and "follows tokenizer.json (as it stands)" in (found.reason or "")


def test_a_reference_that_does_not_judge_is_a_witness() -> None:
    ev = evidence(JSON, meta=trace(reading(META, MODEL)))
    assert [r.status for r in tokens(ev)] == [Status.FAIL]
    [found] = tokens(replace(ev, witnesses=(trace(reading(HF, JSON)),)))
    assert found.status is Status.SKIP and f"follows {HF}" in (found.reason or "")


def test_messages_may_be_text_to_a_candidate() -> None:
    own, as_text = reading(HF, MODEL, [[1, 2, 3]]), reading(HF, MODEL, [[1, 20, 30]])
    as_text["chat"] = "template, messages as text"
    assert [r.status for r in chat(evidence(MODEL, [[1, 2, 3]], hf=trace(own, as_text)))] == [Status.PASS]
    [found] = chat(evidence(MODEL, [[1, 20, 30]], hf=trace(own, as_text)))
    assert found.status is Status.PASS and "are text to the candidate" in (found.reason or "")
    assert [r.status for r in chat(evidence(MODEL, [[1, 2, 30]], hf=trace(own, as_text)))] == [Status.FAIL]
    assert [r.status for r in chat(evidence(MODEL, [[]], hf=trace(own, as_text)))] == [Status.FAIL]
    assert disagreements(evidence(MODEL, [[1, 2, 3]], hf=trace(own, as_text))) == []


def test_a_reference_says_why_it_cannot_judge() -> None:
    ev = evidence(MODEL, meta=trace(untexted="Meta's code has no tokenizer here"), hf=trace(reading(HF, MODEL)))
    found = by_reference(tokens(ev))
    assert found["meta"].status is Status.SKIP and found["hf"].status is Status.PASS
    assert found["meta"].reason == "not covered: Meta's code has no tokenizer here"


def test_a_vocabulary_that_names_its_tokens_otherwise_has_no_chat_and_no_crash() -> None:
    """DeepSeek's Llama without a template: Llama 3's headers, another BOS."""
    tokenizer: Any = SimpleNamespace(
        chat_template=None,
        vocabulary=SimpleNamespace(named_templates={}),
        special_ids={"<|start_header_id|>": 1},
        encode=lambda *_: [],
    )
    with pytest.raises(ChatError, match=r"no chat template, and no <\|begin_of_text\|> for Llama 3's chat format"):
        encode_chat(DIALOGS[0], tokenizer, add_generation_prompt=True)
    nano: Any = SimpleNamespace(_tokenizer=lambda: tokenizer)
    assert Nano.encode_chat(nano, DIALOGS[0]) == []
