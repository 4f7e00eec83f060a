"""Text to token shards: documents found and held out, tokenizers and shards that repeat, bad files refused."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.prepare import corpus, shards
from finetune.prepare.__main__ import main as shards_main
from finetune.prepare.cache import Prepared, path_source, prepare
from finetune.prepare.corpus import Chunk, Format, Source, text_files
from finetune.prepare.shards import TokenStore, Vocabulary, read_shard, write_shards
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from nanollama.cli import run
from nanollama.tokenizer import open_tokenizer

STORIES = stories(80, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 stories as .txt and .jsonl, with two tokenizers."""
    made = tmp_path_factory.mktemp("prepare")
    (made / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    (made / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    train_tokenizer(STORIES, 300, made / "tok300.model")
    train_tokenizer(STORIES, 320, made / "tok320.model")
    return made


def source(path: Path, **form: str) -> Source:
    return Source(path.stem, text_files(path), format=Format(**form))


def opened(folder: Path, tokenizer: Path) -> list[str]:
    """Texts of all documents, train then val, decoded from the shards in `folder`."""
    decode = open_tokenizer(tokenizer).decode
    stores = [TokenStore(folder, split, Vocabulary.of(tokenizer)) for split in shards.SPLITS]
    return [decode(s.tokens(i, 0, int(s.lengths[i])).tolist()) for s in stores for i in range(len(s.lengths))]


@pytest.mark.parametrize("name", ["stories.txt", "stories.jsonl"])
def test_shards_hold_every_document_once_with_bos_and_eos(folder: Path, tmp_path: Path, name: str) -> None:
    tokenizer = folder / "tok300.model"
    write_shards(source(folder / name), tokenizer, tmp_path, workers=1)
    texts = opened(tmp_path, tokenizer)
    assert sorted(texts) == sorted(STORIES)
    assert texts[-4:] == [STORIES[i] for i in (19, 39, 59, 79)]  # each 20th is held out
    store = TokenStore(tmp_path, "train", Vocabulary.of(tokenizer))
    first = store.tokens(0, 0, int(store.lengths[0])).tolist()
    assert first == open_tokenizer(tokenizer).encode(STORIES[0], bos=True, eos=True)
    assert store.shards[0].dtype.itemsize == 2


def test_shards_are_the_same_whatever_processes_write_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 12_000)
    written = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        out.mkdir()
        write_shards(source(folder / "stories.txt"), folder / "tok300.model", out, workers)
        written.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert len(written[0]) > 4
    assert written[0] == written[1]
    assert sorted(opened(tmp_path / "2", folder / "tok300.model")) == sorted(STORIES)


@settings(max_examples=40)
@given(
    st.lists(st.text(min_size=1, max_size=30).map(str.strip).filter(bool), min_size=1, max_size=30), st.integers(1, 80)
)
def test_chunks_neither_lose_nor_split_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int
) -> None:
    texts = [text.replace("\r", "").replace("#", "") or "x" for text in texts]
    path = tmp_path_factory.mktemp("chunks") / "a.txt"
    path.write_bytes("###".join(texts).encode())
    form = Format(separator="###")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK_BYTES", size)
        cuts = list(corpus.chunks(path, form))
    assert [c.start for c in cuts] + [path.stat().st_size] == [0] + [c.stop for c in cuts]
    if size > 40:  # else a long document may be cut at a line end
        found = [text for chunk in cuts for _, text in corpus.documents(chunk, form)]
        assert found == [text.strip() for text in texts if text.strip()]


def test_a_separator_is_read_as_typed_in_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\nthree\n")
    [chunk] = corpus.chunks(path, Format.typed(r"\n", "text"))
    assert [text for _, text in corpus.documents(chunk, Format.typed(r"\n", "text"))] == ["one", "two", "three"]
    with pytest.raises(ValueError, match="--separator is empty"):
        Format.typed("", "text")


def test_few_documents_hold_out_the_last_tenth_of_each(tmp_path: Path) -> None:
    lines = "".join(f"line {i}\n" for i in range(100))
    path = tmp_path / "one.txt"
    path.write_text(lines)
    [chunk] = corpus.chunks(path, Format())
    [(first, train, _), (second, val, _)] = corpus.split(chunk, Format(), None, small=True)
    assert (first, second) == ("train", "val")
    assert train + val == lines.strip()
    assert val.startswith("line 90")
    assert corpus.is_small(Source("one", (path,)))


def test_a_long_document_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 50)
    path = tmp_path / "long.txt"
    path.write_text("some words in a line\n" * 20)
    parts = list(corpus.split(Chunk(path, 0, path.stat().st_size, 0), Format(), "train", small=False))
    assert "".join(text for _, text, _ in parts) == path.read_text().strip()
    assert all(len(text) <= 50 for _, text, _ in parts)
    assert [ends for *_, ends in parts] == [False] * (len(parts) - 1) + [True]


def test_a_document_that_a_block_cuts_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 100)
    path = tmp_path / "endless.txt"
    path.write_text("first" + "<|endoftext|>" + "some words in a line\n" * 30 + "<|endoftext|>" + "last")
    chunks = list(corpus.chunks(path, Format()))
    assert len(chunks) > 4
    found = [(text, ends) for chunk in chunks for _, text, ends in corpus.split(chunk, Format(), "train", small=False)]
    assert [text for text, ends in found if ends] == ["first", found[-2][0], "last"]
    assert "\n".join(text for text, _ in found[1:-1]) == ("some words in a line\n" * 30).strip()


def test_a_trained_tokenizer_repeats_splits_digits_and_spells_what_it_has_not_seen(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert train_tokenizer([*STORIES, "Call 1234567 at 10:30"], 400, tmp_path / name) == 400
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = open_tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode("1234567", bos=False)) >= 7
    for text in ("Grüße, 東京!", "  two  spaces\n\nand lines"):
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_a_tokenizer_gets_the_words_that_the_data_supports(tmp_path: Path) -> None:
    words = train_tokenizer(STORIES[:5], 32_000, tmp_path / "small.model")
    assert 260 < words < 3000
    assert open_tokenizer(tmp_path / "small.model").vocab_size == words


def test_more_characters_than_words_are_spelled_in_bytes(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(2000))
    train_tokenizer([text], 300, tmp_path / "cjk.model")
    tokenizer = open_tokenizer(tmp_path / "cjk.model")
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_prepared_data_is_reused_and_says_a_smaller_vocabulary_each_time(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def again() -> Prepared:
        data = source(folder / "stories.txt")
        return prepare(data, cache=tmp_path, tokenizer=None, vocab_size=32_000, workers=1, say=said.append)

    first = again()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert again().fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == stamps
    assert len(said) == 2
    assert "the data supports" in said[0]


def test_shards_can_be_written_by_a_command_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "cache"))
    args = ["--data", str(folder / "stories.txt"), "--vocab_size", "300", "--out", str(tmp_path / "shards")]
    for code, said in ((0, "train 76 documents"), (2, "exists already")):
        with pytest.raises(SystemExit) as caught:
            run(shards_main, [*args, "--workers", "1"])
        assert caught.value.code == code
        assert said in "".join(capsys.readouterr())
    assert path_source(tmp_path / "shards", Format()) == tmp_path / "shards"


def test_a_folder_of_shards_is_data(folder: Path, tmp_path: Path) -> None:
    write_shards(source(folder / "stories.txt"), folder / "tok300.model", tmp_path, workers=1)
    data = path_source(tmp_path, Format())
    assert isinstance(data, Path)
    ask = partial(prepare, data, cache=tmp_path, vocab_size=0, workers=1, say=print)
    with pytest.raises(ValueError, match="no tokenizer"):
        ask(tokenizer=None)
    assert len(ask(tokenizer=folder / "tok300.model").train.lengths) == 76
    with pytest.raises(ValueError, match=r"another tokenizer \(300 words; this run's has 320\)"):
        ask(tokenizer=folder / "tok320.model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-2], "cut short or damaged"),
        (lambda data: data[:20], "not a token shard"),
        (lambda data: b"x" + data[1:], "not a token shard"),
        (lambda data: data[:8] + b"\x09" + data[9:], "version 9"),
    ],
)
def test_damaged_shards_are_refused(folder: Path, tmp_path: Path, damage: object, message: str) -> None:
    write_shards(source(folder / "stories.txt"), folder / "tok300.model", tmp_path, workers=1)
    path = tmp_path / "train_00000.bin"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        read_shard(path, Vocabulary.of(folder / "tok300.model"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "the file is empty"),
        ("latin.txt", b"caf\xe9 and more", "not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("field.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', 'line 3: expected an object with a text under "text"'),
        ("blank.txt", b" \n <|endoftext|> \n", "no text in it"),
        ("data.csv", b"a,b", "no column \"text\": it has 'a', 'b'"),
        ("data.docx", b"PK\x03\x04", "is no plain text: save it as .txt"),
        ("data.xlsx", b"PK\x03\x04", "an Excel workbook: save its sheet as CSV UTF-8"),
        ("data.rst", b"text", "expected a .txt, .md, .jsonl, .csv"),
    ],
)
def test_bad_text_is_refused_with_its_place(
    folder: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_shards(source(tmp_path / name), folder / "tok300.model", tmp_path, workers=1)
    assert "\n" not in str(caught.value)


def test_stories_repeat_with_their_seed_and_differ_from_each_other() -> None:
    assert stories(50, seed=4) == stories(50, seed=4)
    many = stories(500)
    assert len(set(many)) == 500
    assert not [story for story in many if "{" in story or "}" in story]
    words = [len(story.split()) for story in many]
    assert 50 < sum(words) / len(words) < 200


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as huggingface_hub needs to fetch a file."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        content = self.files.get(self.path.rpartition("/")[2])
        found = content is not None and self.path.startswith("/datasets/roneneldan/TinyStories/resolve/main/")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        if found:
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if send_body and content:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub on this machine that holds a TinyStories of a few stories."""
    marked = "\n<|endoftext|>\n".join(STORIES).encode()
    Hub.files = {"TinyStories-train.txt": marked, "TinyStories-valid.txt": marked[:3000]}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
from pathlib import Path
from finetune.prepare.cache import auto_source
source = auto_source(Path("cache"), small=False, say=print)
print(source.name, [path.read_bytes()[:20] for path in source.train], len(source.val))
"""


def fetch(tmp_path: Path, endpoint: str, **more: str) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        **more,
    }
    where = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FETCH],
        cwd=tmp_path,
        env={**environment, **where},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tinystories_comes_from_the_hub_then_from_its_cache(hub: str, tmp_path: Path) -> None:
    expected = f"tinystories [{STORIES[0].encode()[:20]!r}] 1\n"
    assert fetch(tmp_path, hub) == expected
    assert fetch(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == expected


def test_without_the_hub_the_sample_is_used_and_said(tmp_path: Path) -> None:
    said = fetch(tmp_path, "http://127.0.0.1:9").splitlines()
    assert len(said) == 2
    assert "could not be downloaded (Connection refused); using the bundled sample instead" in said[0]
    assert said[1].startswith("sample [b'")
