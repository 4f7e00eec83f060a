"""Tables and texts as other tools write them: pandas, Arrow, spreadsheets; and what becomes of rows that are bad."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config import TrainConfig
from finetune.data.rows import read_rows
from finetune.errors import UserError
from finetune.prepare import corpus
from finetune.prepare.cache import path_source, prepare
from finetune.prepare.corpus import Format, Source
from finetune.prepare.shards import TokenStore, Vocabulary, write_shards
from finetune.prepare.tokenizer import train_tokenizer
from finetune.text import find
from nanollama.tokenizer import open_tokenizer

# What breaks readers of tables: separators, quotes and line ends inside, another script, spaces outside, a huge cell.
TEXTS = [
    *(f"Story {n}: Lily, {n} and so on.\nShe said; and she went." for n in range(20)),
    'He said "no", twice.\n\n\nThen he left.',
    "Grüße aus 東京 🦙\tand a tab",
    "x" * 200_000,
    "sep=; is no separator here",
]
EXPECTED = [text.strip() for text in TEXTS]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tok.model"
    train_tokenizer([text[:200] for text in TEXTS], 320, path)
    return path


def read(path: Path, field: str = "text") -> list[str]:
    form = Format(field=field)
    source = path_source(path, form)
    assert isinstance(source, Source)
    return [text for chunk in corpus.all_chunks(source.train, form) for _, text in corpus.documents(chunk, form)]


def table(texts: list[str], **how: str) -> str:
    """As Python's csv writes it."""
    made = io.StringIO()
    writer = csv.writer(made, **how)  # type: ignore[arg-type]
    writer.writerows([["id", "text", "note"], *([i, text, ""] for i, text in enumerate(texts))])
    return made.getvalue()


BYTES: dict[str, Callable[[], bytes]] = {
    "plain.csv": lambda: table(TEXTS).encode(),
    "bom.csv": lambda: table(TEXTS).encode("utf-8-sig"),  # Excel's CSV UTF-8
    "lf.csv": lambda: table(TEXTS, lineterminator="\n").encode(),
    "mac.csv": lambda: table(TEXTS, lineterminator="\r").encode(),
    "semicolon.csv": lambda: table(TEXTS, delimiter=";").encode("utf-8-sig"),
    "named.csv": lambda: b"\xef\xbb\xbfsep=;\r\n" + table(TEXTS, delimiter=";").encode(),
    "all quoted.tsv": lambda: table(TEXTS, delimiter="\t", quoting=csv.QUOTE_ALL).encode(),  # type: ignore[arg-type]
    "blank lines.csv": lambda: table(TEXTS).encode() + b"\r\n\r\n",
}


@pytest.mark.parametrize("size", [100, 1 << 24])
@pytest.mark.parametrize("name", BYTES)
def test_tables_are_read_whatever_wrote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", size)
    (tmp_path / name).write_bytes(BYTES[name]())
    assert read(tmp_path / name) == EXPECTED
    assert len(list(corpus.chunks(tmp_path / name, Format()))) > (1 if size == 100 else 0)


def test_what_pandas_writes_is_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="extra data")
    pytest.importorskip("pyarrow", reason="extra data")
    frame = pandas.DataFrame({"text": [*TEXTS, None], "score": [0.5] * 25})
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "b.tsv", sep="\t", index=False)
    frame.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "d.parquet")
    frame.to_json(tmp_path / "e.json", orient="records", force_ascii=False)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == EXPECTED, path.name


def test_markdown_is_text_and_a_readme_beside_rows_is_not(tmp_path: Path) -> None:
    for name, content in {"a.md": "# One\r\n\r\ntext", "sub/b.markdown": "two", "c.txt": "three"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path) == ["# One\n\ntext", "three", "two"]
    (tmp_path / "README.md").write_text("about")
    assert "about" in read(tmp_path)
    (tmp_path / "rows.csv").write_text("text\nfour\n")
    assert sorted(read(tmp_path)) == ["# One\n\ntext", "four", "three", "two"]
    source = path_source(tmp_path, Format())
    assert isinstance(source, Source) and source.title.endswith("without README.md")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "no column \"text\": it has 'a', 'b' (--field names another)"),
        ("text,text\na,b\n", "two columns are named 'text'"),
        ("id,text\n1,a\n2,b,c\n", "row 2: 3 cells, and the header names 2"),
        ('id,text\n1,a\n2,"b\n3,c\n', "row 2: a cell that begins with a quote here is never closed"),
        ("id,text\n1,a\n2,caf\udce9\n", "row 2: not UTF-8"),
        ("", "the file is empty"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="--data ") as caught:
        read(tmp_path / "t.csv")
    assert message in str(caught.value)


def test_dialogues_come_from_tables_too(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('prompt,completion\n"Hi,\nyou","Hello"\n')
    [row] = read_rows(tmp_path / "d.csv")
    assert row.value == {"prompt": "Hi,\nyou", "completion": "Hello"}


GOOD = [json.dumps({"text": f"Story {n}, long enough."}) for n in range(30)]
BAD = ["{no", json.dumps({"body": "x"}), json.dumps({"text": 7}), "[1]", '"text"', "caf\udce9", "{}"]
EMPTY = [json.dumps({"text": None}), json.dumps({"text": " "})]


def prepared(tmp_path: Path, words: Path, on_bad: str, lines: list[str]) -> tuple[list[str], list[int]]:
    """(what was said, documents of each split)"""
    said: list[str] = []
    path = tmp_path / "d.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    source = path_source(path, Format(on_bad=on_bad), said.append)  # type: ignore[arg-type]
    made = prepare(source, cache=tmp_path / "cache", tokenizer=words, vocab_size=0, workers=1, say=said.append)
    return said, [len(made.train.lengths), len(made.val.lengths)]


def test_bad_lines_of_text_are_skipped_counted_and_kept_in_a_list(tmp_path: Path, words: Path) -> None:
    lines = [*GOOD[:3], *BAD, *EMPTY, *GOOD[3:]]
    for _ in range(2):  # made, and found in the cache
        said, counts = prepared(tmp_path, words, "skip", lines)
        assert sum(counts) == 30
        assert said[0] == "data: 2 rows have an empty text or none: left out"
        assert said[1].startswith("data: 7 of 37 documents cannot be used and are left out; the first 5 (all of them: ")
        assert f"  --data {tmp_path / 'd.jsonl'} line 5: expected an object with a text" in said[3]
    everything = json.loads(Path(said[1].partition("all of them: ")[2].rstrip("):")).read_text())["lines"]
    assert [line.partition(" line ")[2].partition(":")[0] for line in everything] == [str(n) for n in range(4, 11)]


def test_bad_lines_of_text_stop_the_run_and_all_are_listed(tmp_path: Path, words: Path) -> None:
    said: list[str] = []
    (tmp_path / "d.jsonl").write_text("\n".join([*GOOD, "{no", "[2]"]))
    source = path_source(tmp_path / "d.jsonl", Format(), said.append)
    with pytest.raises(UserError, match=r"line 31: not JSON.*\(2 of 32 documents cannot be used; --on_bad skip"):
        prepare(source, cache=tmp_path / "cache", tokenizer=words, vocab_size=0, workers=1, say=said.append)
    assert [line.split(": ")[0] for line in said[1:]] == [f"  --data {tmp_path / 'd.jsonl'} line {n}" for n in (31, 32)]
    prepared(tmp_path, words, "skip", [*GOOD, "{no"])
    with pytest.raises(UserError, match="line 31"):  # what was skipped once is still refused
        prepared(tmp_path, words, "stop", [*GOOD, "{no"])


def test_a_document_that_is_no_utf_8_is_left_out_alone(tmp_path: Path, words: Path) -> None:
    texts = [f"Story {n}." for n in range(40)]
    raw = "<|endoftext|>".join(texts).encode().replace(b"Story 7.", b"Story \xe9.")
    (tmp_path / "a.txt").write_bytes(raw)
    source = Source("a", (tmp_path / "a.txt",), format=Format(on_bad="skip"))
    write_shards(source, words, tmp_path, workers=1)
    decode, store = open_tokenizer(words).decode, TokenStore(tmp_path, "train", Vocabulary.of(words))
    found = [decode(store.tokens(i, 0, int(n)).tolist()) for i, n in enumerate(store.lengths)]
    assert found == [text for n, text in enumerate(texts) if n % 20 != 19 and n != 7]


def test_texts_of_the_hub_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="extra data")
    rows = {"text": ["one", None, "three"], "id": [1, 2, 3]}
    found = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: found)
    source = find(TrainConfig(data="somebody/texts"), tmp_path, print)
    assert isinstance(source, Source)
    assert read(source.train[0]) == ["one", "three"]
    assert source.title == "somebody/texts"
    with pytest.raises(UserError, match=r'somebody/texts: no column "body": it has \'text\', \'id\''):
        find(TrainConfig(data="somebody/texts", field="body"), tmp_path, print)


def test_texts_of_the_hub_that_are_out_of_reach_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="extra data")
    with pytest.raises(UserError, match=r"somebody/texts: no such file or folder, and .* name their folder"):
        find(TrainConfig(data="somebody/texts"), tmp_path, print)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'llama-parity\[data\]'"):
        find(TrainConfig(data="somebody/texts"), tmp_path, print)
