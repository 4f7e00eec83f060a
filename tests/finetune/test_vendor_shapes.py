"""Dialogues as vendors and other trainers write them: the same messages, or a refusal that names the key."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune.data.files import check_text
from finetune.data.pairs import as_pair
from finetune.data.rows import read_rows
from finetune.data.shapes import as_dialogue
from finetune.errors import UserError

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PARTS = [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": ["Hello"]}]
ROWS: dict[str, Any] = {
    "Gemini": {"contents": PARTS},
    "Gemini's messages": {"messages": PARTS},
    "Bedrock": {"messages": [{**message, "content": [{"text": message["content"]}]} for message in SAID]},
    "OpenAI's answers": {"messages": [SAID[0], {**SAID[1], "content": [{"type": "output_text", "text": "Hello"}]}]},
    "role and text": {"dialog": [{"role": m["role"], "text": m["content"]} for m in SAID]},
    "LIMA": {"conversations": ["Hi", "Hello"], "source": "x"},
    "COIG": {"conversations": [{"question": "Hi", "answer": "Hello"}]},
    "Vicuna": {"items": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "Firefly": {"kind": "x", "input": "Hi", "target": "Hello"},
    "PaLM": {"input_text": "Hi", "output_text": "Hello"},
    "pandas": {"instruction": "Hi", "input": math.nan, "output": "Hello"},
    "messages and a text": {"prompt": SAID[:1], "completion": "Hello"},
    "keys that only look like lists": {"prompt": "Hi", "completion": "Hello", "turns": 1, "items": ["a"]},
}


def spoken(row: Any) -> list[tuple[str, str]]:
    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    return [(message["role"], text(message["content"])) for message in as_dialogue(row).messages]


@pytest.mark.parametrize("whose", ROWS)
def test_a_dialogue_of_another_program_is_read(whose: str) -> None:
    assert spoken(ROWS[whose]) == [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize("system", [{"system": [{"text": "S"}]}, {"systemInstruction": {"parts": [{"text": "S"}]}}])
def test_a_system_text_in_parts_is_the_first_message(system: dict[str, Any]) -> None:
    assert spoken({"messages": SAID, **system})[0] == ("system", "S")


def test_the_context_of_a_question_is_asked_with_it() -> None:
    row = {"question": "Who?", "context": "Ann came.", "answer": "Ann"}
    assert spoken(row)[0] == ("user", "Who?\n\nAnn came.")
    listed = as_dialogue({**row, "context": ["Ann came.", "Bob left."]})
    assert listed.messages[0]["content"] == "Who?" and listed.unread == ["context"]


@pytest.mark.parametrize("key", ["loss", "loss_mask", "trainable"])
def test_a_message_that_is_not_to_be_learned_is_not(key: str) -> None:
    messages = [{**SAID[0], key: False}, {**SAID[1], key: False}, SAID[0], {**SAID[1], key: True}]
    assert as_dialogue({"messages": messages}).learned[1::2] == [False, True]


@pytest.mark.parametrize("more", [{"kto_tag": False}, {"loss_mask": [0, 1]}])
def test_what_says_which_answers_count_is_refused_by_its_name(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f'^"{next(iter(more))}": '):
        as_dialogue({"messages": SAID, **more})


def test_openais_preferences_are_pairs() -> None:
    worse = [{**SAID[1], "content": "No"}]
    row = {"input": {"messages": SAID[:1], "tools": []}, "preferred_output": SAID[1:], "non_preferred_output": worse}
    sides, unread = as_pair(row)
    assert [spoken(side)[-1] for side in sides] == [("assistant", "Hello"), ("assistant", "No")] and not unread


def test_lines_that_end_in_commas_are_rows(tmp_path: Path) -> None:
    row = json.dumps({"messages": SAID})
    (tmp_path / "a.jsonl").write_text(f"{row},\n{row},\n{row}\n")
    assert [found.value for found in read_rows(tmp_path / "a.jsonl")] == [json.loads(row)] * 3
    (tmp_path / "b.jsonl").write_text('{"a": {"b": 1},\n"c": 2,\n"d": 3}\n')
    assert [found.value for found in read_rows(tmp_path / "b.jsonl")] == [{"a": {"b": 1}, "c": 2, "d": 3}]


@pytest.mark.parametrize("head", [b"BZh91AY&SY", b"\xfd7zXZ\x00\x00", b"7z\xbc\xaf\x27\x1c"])
def test_packed_files_are_to_be_unpacked(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(head)
    with pytest.raises(UserError, match="unpack it"):
        check_text(tmp_path / "a.jsonl")
