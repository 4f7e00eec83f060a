"""Data as other tools write them: the same ids as a list of messages, or a word about what a row or a file is."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.dialogs import Dialogs, read_dialogs
from finetune.data.shapes import as_dialogue
from finetune.errors import UserError
from finetune.prepare import corpus
from finetune.prepare.corpus import Chunk, Format, chunks, documents, text_files
from nanollama.tokenizer import Tokenizer, open_tokenizer

USER, BOT = {"role": "user", "content": "What colour is the sky?"}, {"role": "assistant", "content": "Blue."}
ROW: dict[str, Any] = {"messages": [USER, BOT]}


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(llama3_tokenizer_path)


def read(folder: Path, tokenizer: Tokenizer, data: str) -> Dialogs:
    (folder / "d.jsonl").write_text(data)
    return read_dialogs(folder / "d.jsonl", tokenizer, 96)[0]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(by: str, text: str) -> dict[str, str]:
    return {"from": by, "value": text}


SAME = {
    "a list of messages, in a list": json.dumps([ROW["messages"], ROW["messages"]]),
    "a list of messages a line": lines(ROW["messages"], ROW["messages"]),
    "roles in capitals": lines({"conversations": [said("USER", USER["content"]), said("Assistant", "Blue.")]}),
    "a bot": lines({"conversations": [said("Human", USER["content"]), said("bot", "Blue.")]}),
    "turns of two": lines({"conversation": [{"human": USER["content"], "assistant": "Blue."}]}),
    "turns of input and output": lines({"conversation": [{"input": USER["content"], "output": "Blue."}]}),
    "query and response": lines({"query": USER["content"], "response": "Blue."}),
    "input and output": lines({"input": USER["content"], "output": "Blue."}),
    "messages as JSON in a text": lines({"messages": json.dumps(ROW["messages"])}),
    "an object that holds the rows": json.dumps({"data": [ROW]}),
    "an object that holds the rows, indented": json.dumps({"train": [ROW]}, indent=1),
    "LMFlow's": json.dumps({"type": "conversation", "instances": [ROW]}),
    "objects over several lines": '{"messages": [\n' + json.dumps(USER) + ",\n" + json.dumps(BOT) + "]}\n",
}


@pytest.mark.parametrize("what", SAME)
def test_other_ways_to_write_the_same_dialogue(tmp_path: Path, tokenizer: Tokenizer, what: str) -> None:
    expected = read(tmp_path, tokenizer, lines(ROW))
    found = read(tmp_path, tokenizer, SAME[what])
    n = len(expected.ids)
    assert found.ids[:n].tolist() == expected.ids.tolist()
    assert found.said[:n].tolist() == expected.said.tolist()


def test_a_system_message_within_a_turn_of_two_comes_first() -> None:
    found = as_dialogue({"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello"}]})
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]


NO_DIALOGUE = {
    "one message": (USER, "put the messages of a dialogue into one list"),
    "a plain text": ({"text": "Once upon a time"}, "python -m finetune.text"),
    "a preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "python -m finetune.preference"),
    "turns of other keys": ({"messages": [{"speaker": "A", "says": "Hi"}]}, "'says', 'speaker'"),
}


@pytest.mark.parametrize("what", NO_DIALOGUE)
def test_a_row_that_is_no_dialogue_says_what_it_is(what: str) -> None:
    row, words = NO_DIALOGUE[what]
    with pytest.raises(UserError, match=words):
        as_dialogue(row)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.docx", "save it as .txt"), ("a.pdf", "save it as .txt"), ("a.xlsx", "CSV UTF-8"), ("a.log", "call it .txt")],
)
def test_a_file_that_is_no_plain_text_says_how_to_save_it(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" if name.endswith("x") else b"something")
    with pytest.raises(UserError, match=words):
        text_files(tmp_path / name)


def test_a_text_under_another_key_names_the_keys(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text(lines({"TEXT": "Once", "id": 3}))
    (path,) = text_files(tmp_path / "a.ndjson")
    with pytest.raises(UserError, match=r"under \"text\", it has 'TEXT', 'id' \(--field names another\)"):
        list(documents(Chunk(path, 0, path.stat().st_size, 0), Format()))


def test_a_data_set_on_disk_says_how_to_write_a_file_of_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"text": "Once"}])
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "several")
    for name, folder in (("one", "one"), ("several", "several/train")):
        with pytest.raises(UserError, match=rf"data set on disk: python -c .*{folder}'\)\.to_parquet"):
            text_files(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 1])
def test_texts_in_one_object_are_read(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "Once"}, {"text": "Twice"}]}, indent=indent))
    (chunk,) = chunks(tmp_path / "a.json", Format())
    assert [text for _, text in documents(chunk, Format())] == ["Once", "Twice"]


def test_the_last_document_of_a_file_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 12)
    (tmp_path / "a.txt").write_text("one###two\nlines\nof it")
    found = [text for chunk in chunks(tmp_path / "a.txt", Format("###")) for _, text in documents(chunk, Format("###"))]
    assert found == ["one", "two\nlines\nof it"]
