"""From a source of text to token shards on the disk, each step made once and kept in the cache folder.

CACHE/text/sample-HASH.txt        CACHE/tokenizers/HASH.model        CACHE/shards/NAME-HASH/{train,val}_00000.bin
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.data.documents import Documents
from finetune.data.files import Say, appearing_whole, silent, write_atomically
from finetune.data.left_out import NAME as LEFT_OUT
from finetune.data.left_out import LeftOut, read_left_out
from finetune.data.rows import hub_data_set
from finetune.data.tables import check_column
from finetune.errors import UserError
from finetune.prepare import corpus, download
from finetune.prepare.corpus import Format, Source
from finetune.prepare.download import Offline
from finetune.prepare.shards import VERSION, TokenStore, Vocabulary, write_shards
from finetune.prepare.stories import GRAMMAR, stories
from finetune.prepare.tokenizer import train_tokenizer
from nanollama import machine
from nanollama.tokenizer import open_tokenizer

SAMPLE_STORIES = 12_000  # 6 MB
WHOLE_HASH_BYTES = 64 << 20  # larger files are known by name, size and time
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")
# What a tokenizer.json leaves to others: BOS, EOS, special tokens, the template.
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("config.json", "generation_config.json"),
)


class Store(Documents, Protocol):
    """Documents that can tell when they have changed."""

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data."""

    name: str
    tokenizer: Path
    vocabulary: Vocabulary
    train: Store
    val: Store

    def fingerprint(self) -> str:
        return hashlib.sha256((self.train.fingerprint() + self.val.fingerprint()).encode()).hexdigest()


def cache_folder(given: str | None) -> Path:
    return Path(given).expanduser() if given else machine.cache_folder()


def prepare(
    source: Source | Path,
    *,
    cache: Path,
    tokenizer: Path | None,
    vocab_size: int,
    workers: int,
    say: Say,
) -> Prepared:
    """Open `source`'s shards, making what is missing. A Path is a folder of shards.

    tokenizer: None trains one of `vocab_size` tokens on the text. Raises UserError for data that cannot be used.
    """
    if isinstance(source, Path):
        return open_prepared(f"the shards in {source}", source, tokenizer or _tokenizer_of_shards(source))
    tokenizer = prepare_tokenizer(source, tokenizer, vocab_size, cache / "tokenizers", say)
    vocabulary = Vocabulary.of(tokenizer)
    tied_to = [vocabulary.digest.hex(), vocabulary.mark, vocabulary.eos_id]
    key = _key(source, tokenizer=tied_to, version=VERSION)
    folder = cache / "shards" / f"{source.name}-{key}"
    if not folder.exists():
        write_folder(source, tokenizer, folder, workers, say)
    read_left_out(folder).report("documents", source.format.on_bad, say, folder / LEFT_OUT)
    return open_prepared(source.title or source.name, folder, tokenizer)


def prepare_tokenizer(source: Source, given: Path | None, vocab_size: int, folder: Path, say: Say) -> Path:
    """The tokenizer file that was given, opened once to see that it can be; else one trained on the text."""
    tokenizer = given or _trained(source, vocab_size, folder)
    tokens = open_tokenizer(tokenizer).vocab_size
    if not given and tokens < vocab_size:
        say(f"tokenizer: the data supports {tokens:,} words, not {vocab_size:,}; it gets {tokens:,}")
    return tokenizer


def open_prepared(name: str, folder: Path, tokenizer: Path) -> Prepared:
    vocabulary = Vocabulary.of(tokenizer)
    stores = (TokenStore(folder, "train", vocabulary), TokenStore(folder, "val", vocabulary))
    return Prepared(name, tokenizer, vocabulary, *stores)


def is_shards(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*_*.bin"))


def _tokenizer_of_shards(folder: Path) -> Path:
    for name in TOKENIZERS:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"--data {folder}: holds shards but no tokenizer: name theirs with --tokenizer")


def _trained(source: Source, vocab_size: int, folder: Path) -> Path:
    path = folder / f"{source.name}-{_key(source, vocab_size=vocab_size)}.model"
    if not path.exists():
        with appearing_whole(path) as temporary:
            train_tokenizer(_training_texts(source), vocab_size, temporary)
    return path


def _training_texts(source: Source) -> Iterator[str]:
    small, ignored = corpus.is_small(source), LeftOut()  # who tokenizes tells of them
    for chunk in corpus.all_chunks(source.train, source.format):
        for side, text, _ in corpus.split(chunk, source.format, "train" if source.val else None, small, ignored):
            if side == "train":
                yield text


def write_folder(source: Source, tokenizer: Path, folder: Path, workers: int, say: Say = silent) -> None:
    """All the shards, or nothing under this name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_shards(source, tokenizer, temporary, workers, say)
        _copy_tokenizer(tokenizer, temporary)
        if not folder.exists():  # another run may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """With the files beside it that say more of it. A .gguf brings its weights as well: it stays where it is."""
    with tokenizer.open("rb") as file:
        if file.read(4) == b"GGUF":
            return
    shutil.copyfile(tokenizer, folder / (tokenizer.name if tokenizer.name in TOKENIZERS else "tokenizer.model"))
    for name in BESIDE if tokenizer.name == "tokenizer.json" else ():
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, folder / name)


def _key(source: Source, **more: Any) -> str:
    """A name for what is made of this source with these settings."""
    files = [[_identity(path) for path in paths] for paths in (source.train, source.val)]
    form = [corpus.READING, source.format.separator, source.format.field]
    if source.format.on_bad == "skip":
        form.append("skip")  # of other documents, where some cannot be read
    content = {"files": files, "format": form, **more}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    if status.st_size > WHOLE_HASH_BYTES:
        return [str(path.resolve()), status.st_size, status.st_mtime_ns]
    return [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]


def sample_source(cache: Path) -> Source:
    """The bundled sample as a file."""
    version = hashlib.sha256(GRAMMAR.read_bytes() + str(SAMPLE_STORIES).encode()).hexdigest()[:8]
    path = cache / "text" / f"sample-{version}.txt"
    if not path.exists():
        form = Format()
        write_atomically(path, f"\n{form.separator}\n".join(stories(SAMPLE_STORIES)).encode())
    return Source("sample", (path,))


def tinystories_source(*, small: bool, cached_only: bool = False) -> Source:
    """TinyStories; small: the 19 MB of its validation file alone. Raises Offline."""
    if small:
        return Source("tinystories-valid", (download.fetch(download.VALID, cached_only=cached_only),))
    train, val = download.tinystories(cached_only=cached_only)
    return Source("tinystories", (train,), (val,))


def auto_source(cache: Path, *, small: bool, say: Say) -> Source:
    """TinyStories from the cache or the hub, else the sample; says which."""
    try:
        return tinystories_source(small=False, cached_only=True)
    except Offline:
        pass
    try:
        return tinystories_source(small=small)
    except Offline as error:
        say(f"data: {error}; using the bundled sample instead")
        return sample_source(cache)


def path_source(path: Path, form: Format, say: Say = silent) -> Source | Path:
    """A file, a folder of files, or a folder of shards (which stays a Path). Raises UserError."""
    if is_shards(path):
        return path
    files, title = corpus.named_files(path, say)
    corpus.check_separator(files, form, say)
    return Source(path.stem, files, format=form, title=title)


def hub_source(name: str, cache: Path, form: Format) -> Source:
    """A data set of the hub, its texts kept as a .parquet file in the cache folder. Raises UserError."""
    found = hub_data_set(name)
    check_column(Path(name), tuple(found.column_names), form.field)
    key = hashlib.sha256(f"{found._fingerprint} {form.field}".encode()).hexdigest()[:8]
    path = cache / "text" / f"{name.replace('/', '--')}-{key}.parquet"
    if not path.exists():
        with appearing_whole(path) as temporary:
            found.select_columns([form.field]).to_parquet(str(temporary))
    return Source(name.rpartition("/")[2], (path,), format=form, title=name)
