"""Dialogues in the shapes that people keep them in: the same ids for all, nothing that changes training is dropped."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.chat import find
from finetune.config import TrainConfig
from finetune.data.dialogs import Dialogs, read_dialogs
from finetune.data.rows import read_rows
from finetune.data.shapes import as_dialogue
from nanollama.tokenizer import Tokenizer, open_tokenizer

USER, BOT = {"role": "user", "content": "What colour is the sky?"}, {"role": "assistant", "content": "Blue."}
ROW: dict[str, Any] = {"messages": [USER, BOT]}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(llama3_tokenizer_path)


def read(folder: Path, tokenizer: Tokenizer, data: str | bytes, name: str = "d.jsonl", **more: Any) -> Dialogs:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_dialogs(folder / name, tokenizer, 96, **more)[0]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "lines": lines(ROW, ROW),
    "lines with a BOM": "\ufeff" + lines(ROW, ROW),
    "lines that end in CR LF": lines(ROW, ROW).replace("\n", "\r\n"),
    "lines that end in CR": lines(ROW, ROW).replace("\n", "\r"),
    "an array in one line": json.dumps([ROW, ROW]),
    "an indented array": json.dumps([ROW, ROW], indent=2),
    "an array with a BOM": "\ufeff" + json.dumps([ROW, ROW], indent=1).replace("\n", "\r\n"),
    "indented objects": json.dumps(ROW, indent=2) + "\n" + json.dumps(ROW, indent=2),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_file_of_dialogues_is_read_however_it_is_laid_out(
    tmp_path: Path, tokenizer: Tokenizer, what: str, name: str
) -> None:
    assert (
        read(tmp_path, tokenizer, FILES[what], name).fingerprint()
        == read(tmp_path, tokenizer, FILES["lines"]).fingerprint()
    )


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"messages": [USER, {**BOT, "content": "a\u2028b\u0085c"}]}
    made = read(tmp_path, tokenizer, json.dumps(row, ensure_ascii=False) + "\n")
    assert "a\u2028b\u0085c" in tokenizer.decode(made.ids.tolist())


SAME = {
    "ShareGPT": {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Blue."}]},
    "conversations with roles": {"conversations": [USER, BOT]},
    "alpaca": {"instruction": USER["content"], "input": "", "output": "Blue."},
    "prompt and completion": {"prompt": USER["content"], "completion": "Blue."},
    "prompt and completion as messages": {"prompt": [USER], "completion": [BOT]},
    "question and answer": {"question": USER["content"], "answer": "Blue."},
    "keys that are null": {
        "messages": [USER, {**BOT, "refusal": None, "audio": None, "tool_calls": None}],
        "tools": None,
    },
    "weight 1": {"messages": [USER, {**BOT, "weight": 1}]},
    "no tools": {**ROW, "tools": []},
    "the same system twice, which is none": {**ROW, "system": ""},
}


@pytest.mark.parametrize("what", SAME)
def test_each_shape_gives_the_ids_of_its_messages(tmp_path: Path, tokenizer: Tokenizer, what: str) -> None:
    assert (
        read(tmp_path, tokenizer, lines(SAME[what])).fingerprint()
        == read(tmp_path, tokenizer, lines(ROW)).fingerprint()
    )


def test_an_instruction_and_its_input_are_one_message_after_the_history() -> None:
    row = {
        "instruction": "Translate.",
        "input": "Hallo",
        "output": "Hello",
        "history": [["Hi", "Ho"]],
        "system": "Be brief.",
    }
    said = [(m["role"], m["content"]) for m in as_dialogue(row).messages]
    assert said == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", "Translate.\n\nHallo"),
        ("assistant", "Hello"),
    ]


def test_tool_calls_of_sharegpt_and_of_old_openai_are_tool_calls() -> None:
    call = {"name": "look_up", "arguments": {"word": "sky"}}
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(call)}]
    turns += [{"from": "observation", "value": "blue"}, {"from": "gpt", "value": "Blue."}]
    old = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "function_call": call}]
    old += [{"role": "function", "content": "blue"}, BOT]
    assert as_dialogue({"conversations": turns}).messages == as_dialogue({"messages": old}).messages
    assert as_dialogue({"messages": old}).messages[1]["tool_calls"] == [{"type": "function", "function": call}]


@pytest.mark.parametrize("key", ["weight", "train"])
def test_a_message_of_weight_0_is_read_but_not_learned(tmp_path: Path, tokenizer: Tokenizer, key: str) -> None:
    answers = [
        {**BOT, "content": "first", key: 0},
        {**BOT, "content": "second", key: True},
        {**BOT, "content": "third"},
    ]
    made = read(tmp_path, tokenizer, lines({"messages": [m for answer in answers for m in (USER, answer)]}))
    assert tokenizer.decode(made.ids[made.said].tolist()) == "second<|eot_id|>third<|eot_id|>"
    assert "first<|eot_id|>" in tokenizer.decode(made.ids.tolist())


def test_the_prompt_of_messages_is_not_learned_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = read(tmp_path, tokenizer, lines({"prompt": [USER, BOT, USER], "completion": [{**BOT, "content": "Red."}]}))
    assert tokenizer.decode(made.ids[made.said].tolist()) == "Red.<|eot_id|>"


def test_a_system_text_beside_the_messages_is_the_first_message(tmp_path: Path, tokenizer: Tokenizer) -> None:
    beside = read(tmp_path, tokenizer, lines({**ROW, "system": "You are a pirate."}))
    inside = read(
        tmp_path, tokenizer, lines({"messages": [{"role": "system", "content": "You are a pirate."}, USER, BOT]})
    )
    assert beside.fingerprint() == inside.fingerprint()


REFUSED = {
    '"tools": Llama 3\'s chat format shows no definitions of tools': {**ROW, "tools": [TOOL]},
    '"tools": Llama 3\'s chat format shows no definitions': {**ROW, "tools": json.dumps([TOOL])},
    '"tools": Llama 3\'s chat format': {**ROW, "functions": [TOOL["function"]]},
    '"tools": not JSON': {**ROW, "tools": "look_up()"},
    '"system" and a system message in the dialogue differ': {
        "messages": [{"role": "system", "content": "A"}, USER, BOT],
        "system": "B",
    },
    "message 1: weight 0.5: expected 0 or 1": {"messages": [USER, {**BOT, "weight": 0.5}]},
    "message 0: train True: only what the assistant says": {"messages": [{**USER, "train": True}, BOT]},
    "message 1: train_detail": {"messages": [USER, {**BOT, "train_detail": []}]},
    "has weight 0: nothing to train on": {"messages": [USER, {**BOT, "weight": 0}]},
    "unknown key 'refusal'": {"messages": [USER, {**BOT, "refusal": "No."}]},
    '"images": pictures are not read': {**ROW, "images": ["a.png"]},
    '"chosen": python -m finetune.preference trains on pairs': {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    '"label": answers that are right or wrong': {"prompt": "Hi", "completion": "a", "label": False},
    '"output" is int: expected a text': {"instruction": "Hi", "output": 3},
    '"instruction" is empty': {"instruction": " ", "output": "a"},
    "role 'narrator'": {"messages": [USER, {**BOT, "role": "narrator"}]},
    "got 'body', 'title'": {"title": "a", "body": "b"},
    "got a list, not an object": [1],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_training_would_have_to_know_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, message: str
) -> None:
    with pytest.raises(ValueError, match=r"d\.jsonl line 2: ") as caught:
        read(tmp_path, tokenizer, lines(ROW, REFUSED[message]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_notes_beside_a_dialogue_are_said_once_and_stop_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said: list[str] = []
    row = {"messages": [USER, {**BOT, "timestamp": 3}], "id": 7, "source": "web", "score": None}
    made = read(tmp_path, tokenizer, lines(row, row, {**ROW, "id": 8}), say=said.append)
    assert len(made.lengths) == 3
    assert said == [
        "data: keys beside the dialogues that are left unread: id (3), source (2), timestamp of messages (2)"
    ]


LONG = {"messages": [USER, {**BOT, "content": "blue " * 150}]}


def test_dialogues_that_cannot_be_used_stop_the_run_and_are_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=r"line 6: \d+ tokens do not fit --seq_len 96") as caught:
        read(tmp_path, tokenizer, lines(*[ROW] * 5, LONG, *[ROW] * 5, LONG), say=said.append)
    assert "(2 of 12 dialogues cannot be used; --on_bad skip leaves them out)" in str(caught.value)
    assert [line.split(": ")[0] for line in said[1:]] == [f"  --data {tmp_path / 'd.jsonl'} line {n}" for n in (6, 12)]


def test_on_bad_skip_leaves_them_out_and_lists_the_first_five(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said: list[str] = []
    made = read(tmp_path, tokenizer, lines(ROW, *[LONG] * 7, ROW) + "{no\n", on_bad="skip", say=said.append)
    assert len(made.lengths) == 2
    assert said[0] == "data: 8 of 10 dialogues cannot be used and are left out; the first 5:"
    assert len(said) == 6
    with pytest.raises(ValueError, match="holds no dialogue"):
        read(tmp_path, tokenizer, lines(LONG), on_bad="skip")


@pytest.mark.parametrize("content", ["", " \n", [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_refused_where_it_would_be_learned(
    tmp_path: Path, tokenizer: Tokenizer, content: object
) -> None:
    empty = {"messages": [USER, {"role": "assistant", "content": content}]}
    with pytest.raises(ValueError, match=r"line 2: message 1: the assistant's answer is empty: write it"):
        read(tmp_path, tokenizer, lines(ROW, empty))
    said: list[str] = []
    train, _ = read_dialogs(tmp_path / "d.jsonl", tokenizer, 96, on_bad="skip", say=said.append, out=tmp_path)
    assert len(train.lengths) == 1
    assert said[0] == "data: 1 of 2 dialogues cannot be used and are left out:"
    assert "line 2" in json.loads((tmp_path / "left_out.json").read_text())["lines"][0]
    unlearned = {"messages": [USER, {"role": "assistant", "content": content, "weight": 0}, USER, BOT]}
    assert len(read(tmp_path, tokenizer, lines(unlearned)).lengths) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines(ROW).encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (lines(ROW).encode("utf-16-le"), "is UTF-16: save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "is compressed: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b'{"messages": "caf\xe9"}\n', "line 1: not UTF-8"),
        (b'[{"messages": []}, \n{"a"', "line 2: not JSON: begins as a JSON array"),
        (b'{\n"messages": [}', "line 2: not JSON: begins as JSON objects over several lines"),
    ],
)
def test_a_file_that_is_no_dialogues_says_what_it_is(
    tmp_path: Path, tokenizer: Tokenizer, data: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match="--data ") as caught:
        read(tmp_path, tokenizer, data)
    assert message in str(caught.value)


def test_a_folder_of_dialogues_is_read_without_its_hidden_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said: list[str] = []
    files = {"a.jsonl": lines(ROW), "b/c.json": json.dumps([LONG, ROW]), "README.md": "x", ".git/d.jsonl": "x"}
    for name, content in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(content)
    train, _ = read_dialogs(tmp_path / "data", tokenizer, 96, on_bad="skip", say=said.append)
    assert len(train.lengths) == 2
    assert said[0].startswith("data: data without README.md")
    assert "c.json item 1: " in said[2]


def test_parquet_is_read_and_arrows_nulls_are_no_keys(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="extra data")
    from pyarrow import parquet

    called = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    parquet.write_table(pyarrow.Table.from_pylist([ROW, called, ROW]), tmp_path / "d.parquet")
    assert next(iter(read_rows(tmp_path / "d.parquet"))).value == ROW
    train, _ = read_dialogs(tmp_path / "d.parquet", tokenizer, 96)
    expected = read(tmp_path, tokenizer, lines(ROW, called, ROW))
    assert np.array_equal(train.ids, expected.ids)
    assert np.array_equal(train.said, expected.said)
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"e\.parquet: not readable as \.parquet"):
        read_dialogs(tmp_path / "e.parquet", tokenizer, 96)


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    for data in (tmp_path / "d.parquet", Path("somebody/dialogs")):
        with pytest.raises(ValueError, match=r"pip install 'llama-parity\[data\]'"):
            read_dialogs(data, tokenizer, 96)


def test_a_data_set_of_the_hub_that_is_out_of_reach_is_one_line(tokenizer: Tokenizer) -> None:
    pytest.importorskip("datasets", reason="extra data")
    with pytest.raises(
        ValueError, match=r"--data somebody/dialogs: no such file or folder, and as a data set"
    ) as caught:
        read_dialogs(Path("somebody/dialogs"), tokenizer, 96)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_its_training_split(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, pyarrow = (pytest.importorskip(name, reason="extra data") for name in ("datasets", "pyarrow"))
    table = pyarrow.Table.from_pylist([ROW, {"messages": [USER, {**BOT, "weight": 0}]}])
    found = {("somebody/dialogs", "train"): datasets.Dataset(table, fingerprint="0")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: found[name, split])
    with pytest.raises(ValueError, match=r"--data somebody/dialogs row 2: .*weight 0: nothing to train on"):
        read_dialogs(Path("somebody/dialogs"), tokenizer, 96)
    train, _ = read_dialogs(Path("somebody/dialogs"), tokenizer, 96, on_bad="skip")
    assert train.fingerprint() == read(tmp_path, tokenizer, lines(ROW)).fingerprint()


def test_data_that_is_nowhere_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for data in (str(tmp_path / "no.jsonl"), "data/no.json"):
        with pytest.raises(ValueError, match=r"no such file or folder: name a \.jsonl"):
            find(TrainConfig(data=data, ckpt="x"), tmp_path, print)
