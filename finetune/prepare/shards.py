"""Token shards: memory-mapped files of uint16 or uint32 token ids behind a header of 64 bytes; documents begin with
a mark.

Header, little-endian: magic "NLTOKENS", version u32, bytes per token u32, tokens u64, vocabulary u32, mark u32,
SHA-256 of the tokenizer file. The mark is BOS, a part of its document; for a tokenizer that puts no BOS before a text,
or ends one with the same token, it is the first number behind the vocabulary, and no part of it. Shards are named
SPLIT_NNNNN.bin and sorted by name. Each chunk of text becomes one shard of each split, whatever process does it, so the
files are the same on every machine.

    python -m finetune.prepare --data stories.txt --vocab_size 512 --out DIR
"""

import hashlib
import multiprocessing
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from finetune.data.files import Say, silent
from finetune.data.left_out import LeftOut
from finetune.errors import UserError
from finetune.prepare import corpus
from finetune.prepare.corpus import Chunk, Format, Source, Split
from nanollama.tokenizer import open_tokenizer

MAGIC, VERSION = b"NLTOKENS", 1
HEADER = struct.Struct("<8sIIQII32s")
TOKENIZER_BYTES = 64 << 20  # all of a tokenizer file; of a .gguf at least its header, where the vocabulary is
SPLITS: tuple[Split, ...] = ("train", "val")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """What ties a shard to its tokenizer."""

    size: int
    bos_id: int | None  # with which documents begin
    digest: bytes  # SHA-256 of the tokenizer file
    eos_id: int | None = None  # with which they end

    @classmethod
    def of(cls, tokenizer: Path) -> "Vocabulary":
        """Raises UserError for a tokenizer that neither begins nor ends a text."""
        opened = open_tokenizer(tokenizer)
        bos_id = opened.bos_id if opened.add_bos else None
        if bos_id is None and opened.eos_id is None:
            raise UserError(f"tokenizer {tokenizer}: has no BOS that it puts before a text and no EOS: expected one")
        with tokenizer.open("rb") as file:
            digest = hashlib.sha256(file.read(TOKENIZER_BYTES)).digest()
        return cls(opened.vocab_size, bos_id, digest, opened.eos_id)

    @property
    def mark(self) -> int:
        """What stands before each document in a shard."""
        return self.size if self.bos_id is None or self.bos_id == self.eos_id else self.bos_id

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint16 if max(self.size, self.mark + 1) <= 1 << 16 else np.uint32


def write_shard(path: Path, tokens: list[int], vocabulary: Vocabulary) -> None:
    data = np.array(tokens, dtype=vocabulary.dtype)
    header = (MAGIC, VERSION, data.itemsize, len(data), vocabulary.size, vocabulary.mark, vocabulary.digest)
    with path.open("wb") as file:
        file.write(HEADER.pack(*header))
        data.astype(data.dtype.newbyteorder("<")).tofile(file)


def read_shard(path: Path, vocabulary: Vocabulary) -> NDArray[np.unsignedinteger]:
    """The tokens, memory-mapped. Raises UserError for what is no whole shard, or one of another vocabulary."""
    header = _header(path)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{path}: not a token shard: write it with python -m finetune.prepare")
    _, version, itemsize, count, size, mark, digest = HEADER.unpack(header)
    if version != VERSION or itemsize not in (2, 4):
        raise UserError(f"{path}: a shard of version {version}, {itemsize} bytes a token: expected version {VERSION}")
    if path.stat().st_size != HEADER.size + count * itemsize:
        raise UserError(f"{path}: cut short or damaged: it should hold {count} tokens; write it again")
    if (size, mark, digest) != (vocabulary.size, vocabulary.mark, vocabulary.digest):
        raise UserError(
            f"{path}: written with another tokenizer ({size} words; this run's has {vocabulary.size}): "
            "give the --tokenizer it was written with, or write it again"
        )
    if not count:
        return np.zeros(0, dtype=np.uint16)
    return np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=HEADER.size, shape=(count,))


class TokenStore:
    """The documents of one split (`finetune.data.documents.Documents`). Raises UserError as `read_shard` does."""

    def __init__(self, folder: Path, split: Split, vocabulary: Vocabulary) -> None:
        self.paths = sorted(folder.glob(f"{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{folder}: holds no shard {split}_*.bin")
        self.bos_id = vocabulary.bos_id
        self.shards = [read_shard(path, vocabulary) for path in self.paths]
        starts = [np.flatnonzero(shard == vocabulary.mark) for shard in self.shards]
        for path, shard, found in zip(self.paths, self.shards, starts, strict=True):
            if len(shard) and (not len(found) or found[0] != 0):
                raise UserError(f"{path}: does not begin with {vocabulary.mark}, as documents do: write it again")
        self.shard_of = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        skipped = int(vocabulary.mark != vocabulary.bos_id)
        self.starts: Ints = np.concatenate(starts).astype(np.int64) + skipped
        ends = [np.append(s[1:], len(shard)) for s, shard in zip(starts, self.shards, strict=True) if len(s)]
        self._ends: Ints = np.concatenate(ends).astype(np.int64) if ends else np.zeros(0, dtype=np.int64)

    @cached_property
    def lengths(self) -> Ints:
        return self._ends - self.starts

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        begin = int(self.starts[document])
        return self.shards[self.shard_of[document]][begin + start : begin + stop].astype(np.int64)

    def fingerprint(self) -> str:
        """Changes with the shards: their headers and both ends of each."""
        digest = hashlib.sha256()
        for path, shard in zip(self.paths, self.shards, strict=True):
            digest.update(_header(path) + shard[: 1 << 19].tobytes() + shard[-(1 << 19) :].tobytes())
        return digest.hexdigest()


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER.size)


@dataclass(frozen=True)
class Job:
    """One chunk to be tokenized: everything that a worker process needs."""

    number: int
    chunk: Chunk
    form: Format
    only: Split | None
    small: bool
    tokenizer: Path
    folder: Path


def tokenize(job: Job) -> tuple[int, LeftOut]:
    """Write the shards of one chunk; returns the chunk's size in bytes, and what of it cannot be used."""
    left_out = LeftOut()
    tokenizer, vocabulary = open_tokenizer(job.tokenizer), Vocabulary.of(job.tokenizer)
    tokens: dict[Split, list[int]] = {"train": [], "val": []}
    mark = [vocabulary.mark] if vocabulary.mark != vocabulary.bos_id else []
    for side, text, ends in corpus.split(job.chunk, job.form, job.only, job.small, left_out):
        tokens[side] += mark + tokenizer.encode(text, bos=True, eos=ends and vocabulary.eos_id is not None)
    for side, ids in tokens.items():
        if ids:
            write_shard(job.folder / f"{side}_{job.number:05d}.bin", ids, vocabulary)
    return job.chunk.stop - job.chunk.start, left_out


def jobs(source: Source, tokenizer: Path, folder: Path) -> Iterator[Job]:
    small = corpus.is_small(source)
    number = 0
    for only, files in ((None if not source.val else "train", source.train), ("val", source.val)):
        for chunk in corpus.all_chunks(files, source.format):
            yield Job(number, chunk, source.format, only, small, tokenizer, folder)  # type: ignore[arg-type]
            number += 1


def write_shards(source: Source, tokenizer: Path, folder: Path, workers: int, say: Say = silent) -> None:
    """Tokenize all of `source` into `folder`, in parallel; left_out.json lists what cannot be used, if there is any.

    Raises UserError when a split stays empty, and for what cannot be used unless it is to be skipped.
    """
    left_out = LeftOut()
    todo = list(jobs(source, tokenizer, folder))
    total = sum(job.chunk.stop - job.chunk.start for job in todo)
    bar = tqdm(total=total, desc=f"tokenizing {source.name}", unit="B", unit_scale=True, leave=False, delay=1)
    with bar:
        for done, found in _map(todo, min(workers, len(todo))):
            bar.update(done)
            left_out.merge(found)
            if left_out.count and source.format.on_bad == "stop":
                left_out.report("documents", "stop", say)
    if left_out.count or left_out.empty:
        left_out.write(folder)
    for split in SPLITS:
        if not any(folder.glob(f"{split}_*.bin")):
            raise UserError(f"--data {source.train[0]}: no text in it for {split}: it is empty or too short")


def _map(todo: list[Job], workers: int) -> Iterator[tuple[int, LeftOut]]:
    """In order; in this process when there is nothing to share."""
    if workers == 1:
        yield from map(tokenize, todo)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(tokenize, todo)
