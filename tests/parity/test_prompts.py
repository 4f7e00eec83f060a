"""Files of prompts as editors save them, for `nanollama generate` and `parity.check`: the same prompts for all."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nanollama import __main__ as commands
from parity.run.prompts import from_file

TEXTS = {
    "lines": b"Once upon\nThe cat\n",
    "a BOM": b"\xef\xbb\xbfOnce upon\nThe cat\n",
    "CR LF and a BOM": b"\xef\xbb\xbfOnce upon\r\nThe cat\r\n",
    "CR": b"Once upon\rThe cat",
}
JSON = {
    "objects": b'{"prompt": "Once upon"}\n{"prompt": "The cat"}\n',
    "objects and a BOM": b'\xef\xbb\xbf{"prompt": "Once upon"}\r\n\r\n{"prompt": "The cat", "id": 3}\r\n',
}


@pytest.mark.parametrize(
    ("suffix", "content"), [(".txt", t) for t in TEXTS.values()] + [(".jsonl", t) for t in JSON.values()]
)
def test_prompts_are_read_however_an_editor_saved_them(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content)
    assert from_file(path).texts == commands._read_prompts(None, path) == ["Once upon", "The cat"]


def test_token_prompts_may_have_a_bom(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_bytes(b"\xef\xbb\xbf[1, 403, 407]\r\n[5]\r\n")
    assert from_file(tmp_path / "ids.jsonl").tokens == [[1, 403, 407], [5]]
    assert commands._read_prompts(None, tmp_path / "ids.jsonl") == [[1, 403, 407], [5]]


def test_a_line_separator_inside_a_prompt_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\u2028b\n", encoding="utf-8")
    assert from_file(tmp_path / "p.txt").texts == commands._read_prompts(None, tmp_path / "p.txt") == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "Once upon\n".encode("utf-16"), "not UTF-8"),
        ("p.jsonl", b'{"text": "Once"}\n', 'no {"prompt": "..."}|or {"prompt": "..."}'),
        ("p.jsonl", b"[1, true]\n", "token ids such as"),
        ("p.jsonl", b"{no\n", "token ids such as"),
    ],
)
def test_prompts_that_cannot_be_read_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (from_file, lambda path: commands._read_prompts(None, path)):
        with pytest.raises(ValueError, match=f"--prompts .*{name}") as caught:
            read(tmp_path / name)
        assert any(part in str(caught.value) for part in message.split("|"))
        assert "\n" not in str(caught.value)


def test_texts_and_token_ids_in_one_file_are_refused_by_the_check(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('[1, 2]\n{"prompt": "Once"}\n')
    with pytest.raises(ValueError, match="token lists and texts together"):
        from_file(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [("<s>[INST] Hi [/INST]", "<s>"), ("a <|eot_id|>", "<|eot_id|>"), ("[INST] Hi", "[INST]"), ("Hi", "")],
)
def test_special_tokens_in_a_prompt_are_remarked_once(
    capsys: pytest.CaptureFixture[str], prompt: str, named: str
) -> None:
    llama = SimpleNamespace(tokenizer=SimpleNamespace(special_ids={"<|eot_id|>": 9}))
    commands._remark_special([prompt, [1, 2], prompt], llama)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.count("\n") == bool(named)
    assert said.startswith(f"{named} in a prompt is text here") == bool(named)
    assert ("python -m nanollama chat" in said) == bool(named)
