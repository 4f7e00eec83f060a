"""Text as people have it: any line ends, hidden copies, arrays, separators that never occur, tokenizers without BOS."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.data.documents import mask_of
from finetune.data.packing import Packer
from finetune.prepare import corpus, shards
from finetune.prepare.cache import path_source, write_folder
from finetune.prepare.corpus import Format, Source, split
from finetune.prepare.shards import TokenStore, Vocabulary, read_shard, write_shards
from finetune.prepare.tokenizer import train_tokenizer
from nanollama.tokenizer import Tokenizer, open_tokenizer

DOCS = [f"Story {n}. Lily went to the park\nand saw {n} red balls." for n in range(40)]
MARKED = "<|endoftext|>".join(DOCS)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tok.model"
    train_tokenizer(DOCS, 300, path)
    return path


def read(path: Path, said: list[str] | None = None, separator: str = "<|endoftext|>") -> list[tuple[str, str]]:
    """(split, text) of all documents."""
    source = path_source(path, Format.typed(separator, "text"), (said if said is not None else []).append)
    assert isinstance(source, Source)
    small = corpus.is_small(source)
    chunks = corpus.all_chunks(source.train, source.format)
    return [(side, text) for chunk in chunks for side, text, _ in split(chunk, source.format, None, small)]


EXPECTED = [("val" if n % 20 == 19 else "train", text) for n, text in enumerate(DOCS)]


@pytest.mark.parametrize("typed", [r"\n\n", r"\r\n\r\n", "\r\n\r\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_documents_between_blank_lines_whatever_ends_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, typed: str, size: int
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", size)
    (tmp_path / "a.txt").write_bytes("\n\n".join(DOCS).replace("\n", end).encode())
    if size < 100:  # documents are cut at line ends, but no line end in two
        assert "\n".join(text for _, text in read(tmp_path / "a.txt", separator=typed)) == "\n".join(DOCS)
    else:
        assert read(tmp_path / "a.txt", separator=typed) == EXPECTED


@pytest.mark.parametrize("size", [50, 1 << 20])
def test_a_crlf_is_no_blank_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", size)
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert [text for _, text in corpus.documents(next(corpus.chunks(tmp_path / "a.txt", FORM)), FORM)] == [
        "one\ntwo",
        "three",
    ]


FORM = Format.typed(r"\n\n", "text")

ROWS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: b"".join(json.dumps({"text": d}).encode() + b"\n" for d in DOCS),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + b"".join(json.dumps({"text": d}).encode() + b"\r\n" for d in DOCS),
    "cr.jsonl": lambda: b"\r".join(json.dumps({"text": d}).encode() for d in DOCS),
    "array.jsonl": lambda: json.dumps([{"text": d} for d in DOCS], indent=1).encode(),
    "array.json": lambda: b"\xef\xbb\xbf" + json.dumps([{"text": d, "id": 3} for d in DOCS]).encode(),
    "lines.json": lambda: b"".join(json.dumps({"text": d}).encode() + b"\n" for d in DOCS),
    "bom.txt": lambda: b"\xef\xbb\xbf" + MARKED.encode(),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_however_they_are_laid_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ROWS[name]())
    assert read(tmp_path / name) == EXPECTED


def test_parquet_is_read_part_by_part(tmp_path: Path, words: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="extra data")
    from pyarrow import parquet

    table = pyarrow.table({"text": DOCS, "id": list(range(40))})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=15)
    assert read(tmp_path / "d.parquet") == EXPECTED
    assert len(list(corpus.chunks(tmp_path / "d.parquet", Format()))) == 3
    parquet.write_table(pyarrow.table({"body": DOCS}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r'e\.parquet: no column "text": it has .body.'):
        read(tmp_path / "e.parquet")


def test_hidden_copies_are_no_data_and_other_files_are_named(tmp_path: Path) -> None:
    home = tmp_path / "mixed"
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", ".git/b.txt", "b.rst", "sub/c.docx", "package.json"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(MARKED if name.endswith("txt") else "{\n}")
    (home / "._a.txt").write_bytes(b"\x00\x05\x16\x07\x00\x02\xff\xfe")
    assert read(home) == EXPECTED
    source = path_source(home, Format())
    assert isinstance(source, Source)
    assert source.title == f"mixed without b.rst, package.json, sub{'/'}c.docx"


def test_a_folder_that_is_hidden_itself_is_read(tmp_path: Path) -> None:
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text(MARKED)
    assert read(tmp_path / ".notes") == EXPECTED


def test_the_same_file_twice_is_said(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(MARKED)
    (tmp_path / "c.txt").write_text(MARKED.replace("Lily", "Lucy"))
    said: list[str] = []
    assert len(read(tmp_path, said)) == 120
    assert said == [f"data: {tmp_path / 'b.txt'} holds the same as {tmp_path / 'a.txt'}: what is in them counts twice"]


def test_a_separator_that_never_occurs_is_refused_and_the_default_one_said(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("\n\n".join(DOCS))
    said: list[str] = []
    assert [side for side, _ in read(tmp_path / "play.txt", said)] == ["train", "val"]
    assert said == [
        r"data: no <|endoftext|> in it: play.txt is one document (--separator names another mark, such as \n\n)"
    ]
    with pytest.raises(ValueError, match=r"--separator '###': occurs nowhere in play\.txt: name the text"):
        read(tmp_path / "play.txt", separator="###")


def test_a_folder_of_one_document_a_file_holds_out_each_twentieth(tmp_path: Path) -> None:
    for n, text in enumerate(DOCS):
        (tmp_path / f"{n:02}.txt").write_text(text)
    said: list[str] = []
    assert read(tmp_path, said) == EXPECTED
    assert len(said) == 1
    assert "00.txt, 01.txt, 02.txt, 03.txt, 04.txt and 35 more is one document" in said[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", MARKED.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.jsonl", MARKED.encode("utf-16-be"), "is UTF-16: save it as UTF-8"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "item 2: expected an object with a text"),
        ("a.json", b'[{"text": "a"},\n {"text": ', "line 2: not JSON: begins as a JSON array"),
        ("a.jsonl", b'{"text": "a"}\nnull\n', "line 2: expected an object with a text"),
    ],
)
def test_text_that_cannot_be_read_says_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="--data ") as caught:
        read(tmp_path / name)
    assert message in str(caught.value)


class Plain:
    """A tokenizer that puts no BOS before a text, as GPT-2's; same: its BOS and EOS are one token, and it puts it."""

    def __init__(self, inner: Tokenizer, *, bos: int | None, eos: int | None) -> None:
        self.inner, self.bos_id, self.eos_id, self.add_bos = inner, bos, eos, bos is not None
        self.vocab_size = inner.vocab_size

    def encode(self, text: str, *, bos: bool, eos: bool = False, allowed_special: Sequence[str] = ()) -> list[int]:
        ids = self.inner.encode(text, bos=False)
        return [self.bos_id] * (bos and self.add_bos) + ids + [self.eos_id] * eos  # type: ignore[list-item]


@pytest.mark.parametrize(("bos", "eos"), [(None, 2), (2, 2), (1, None), (1, 2)])
def test_shards_keep_documents_apart_whatever_begins_and_ends_them(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, bos: int | None, eos: int | None
) -> None:
    plain = Plain(open_tokenizer(words), bos=bos, eos=eos)
    monkeypatch.setattr(shards, "open_tokenizer", lambda path: plain)
    (tmp_path / "a.txt").write_text(MARKED)
    out = tmp_path / "out"
    out.mkdir()
    write_shards(Source("a", (tmp_path / "a.txt",)), words, out, workers=1)
    store = TokenStore(out, "train", Vocabulary.of(words))
    texts = [text for side, text in EXPECTED if side == "train"]
    assert [store.tokens(i, 0, int(n)).tolist() for i, n in enumerate(store.lengths)] == [
        plain.encode(text, bos=True, eos=eos is not None) for text in texts
    ]
    assert store.bos_id == bos
    assert mask_of(store, 0, 0, 3).tolist() == [bos is not None, True, True]


def test_few_documents_without_bos_stay_apart_where_none_ends(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "open_tokenizer", lambda path: Plain(open_tokenizer(words), bos=None, eos=2))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCS[:3]))
    write_shards(Source("a", (tmp_path / "a.txt",)), words, tmp_path, workers=1)
    assert len(TokenStore(tmp_path, "train", Vocabulary.of(words)).lengths) == 3


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "open_tokenizer", lambda path: Plain(open_tokenizer(words), bos=None, eos=None))
    with pytest.raises(ValueError, match=r"tok\.model: has no BOS that it puts before a text and no EOS"):
        Vocabulary.of(words)


def test_a_mark_behind_a_full_vocabulary_of_two_bytes_takes_four() -> None:
    assert Vocabulary(1 << 16, 1, b"").dtype is np.uint16
    assert Vocabulary(1 << 16, None, b"", 0).dtype is np.uint32


def test_shards_of_the_first_version_still_open(tmp_path: Path, words: Path) -> None:
    """Written byte by byte, as the documentation has them."""
    vocabulary = Vocabulary.of(words)
    header = b"NLTOKENS" + b"".join(n.to_bytes(4, "little") for n in (1, 2)) + (5).to_bytes(8, "little")
    header += b"".join(n.to_bytes(4, "little") for n in (300, 1)) + vocabulary.digest
    for side in shards.SPLITS:
        (tmp_path / f"{side}_00000.bin").write_bytes(header + np.array([1, 40, 41, 1, 42], "<u2").tobytes())
    assert read_shard(tmp_path / "val_00000.bin", vocabulary).tolist() == [1, 40, 41, 1, 42]
    store = TokenStore(tmp_path, "train", vocabulary)
    assert [store.tokens(i, 0, int(n)).tolist() for i, n in enumerate(store.lengths)] == [[1, 40, 41], [1, 42]]


def test_without_bos_a_later_piece_begins_with_the_token_before_it() -> None:
    whole = np.arange(10, 33)
    documents = SimpleNamespace(
        bos_id=None, lengths=np.array([23]), tokens=lambda document, start, stop: whole[start:stop]
    )
    packer = Packer(documents, 8)
    batch = packer.batch([[i] for i in range(len(packer.lengths))])
    assert batch.tokens[:, 0].tolist() == [10, 17, 24, 31]
    assert batch.labels[batch.labels >= 0].tolist() == whole[1:].tolist()  # each once


def test_a_folder_of_shards_has_what_its_tokenizer_needs(tmp_path: Path, words: Path) -> None:
    """A tokenizer.json leaves BOS and EOS to its neighbours; a .gguf would bring its weights."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "tokenizer.json").write_bytes(words.read_bytes())
    (home / "tokenizer_config.json").write_text("{}")
    (tmp_path / "a.txt").write_text(MARKED)
    write_folder(Source("a", (tmp_path / "a.txt",)), home / "tokenizer.json", tmp_path / "out", 1)
    assert {"tokenizer.json", "tokenizer_config.json"} < {path.name for path in (tmp_path / "out").iterdir()}
