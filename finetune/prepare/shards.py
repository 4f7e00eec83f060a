"""Token shards: memory-mapped files of uint16 or uint32 token ids behind a header of 64 bytes; documents begin with
BOS.

Header, little-endian: magic "NLTOKENS", version u32, bytes per token u32, tokens u64, vocabulary u32, BOS id u32,
SHA-256 of the tokenizer file. Shards are named SPLIT_NNNNN.bin and sorted by name. Each chunk of text becomes one
shard of each split, whatever process does it, so the files are the same on every machine.

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

from finetune.prepare import corpus
from finetune.prepare.corpus import Chunk, Format, Source, Split
from nanollama.tokenizer import open_tokenizer

MAGIC, VERSION = b"NLTOKENS", 1
HEADER = struct.Struct("<8sIIQII32s")
SPLITS: tuple[Split, ...] = ("train", "val")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """What ties a shard to its tokenizer."""

    size: int
    bos_id: int
    digest: bytes  # SHA-256 of the tokenizer file

    @classmethod
    def of(cls, tokenizer: Path) -> "Vocabulary":
        opened = open_tokenizer(tokenizer)
        return cls(opened.vocab_size, opened.bos_id, hashlib.sha256(tokenizer.read_bytes()).digest())

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint16 if self.size <= 1 << 16 else np.uint32


def write_shard(path: Path, tokens: list[int], vocabulary: Vocabulary) -> None:
    data = np.array(tokens, dtype=vocabulary.dtype)
    header = (MAGIC, VERSION, data.itemsize, len(data), vocabulary.size, vocabulary.bos_id, vocabulary.digest)
    with path.open("wb") as file:
        file.write(HEADER.pack(*header))
        data.astype(data.dtype.newbyteorder("<")).tofile(file)


def read_shard(path: Path, vocabulary: Vocabulary) -> NDArray[np.unsignedinteger]:
    """The tokens, memory-mapped. Raises ValueError for what is no whole shard, or one of another vocabulary."""
    header = _header(path)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path}: not a token shard: write it with python -m finetune.prepare")
    _, version, itemsize, count, size, bos_id, digest = HEADER.unpack(header)
    if version != VERSION or itemsize not in (2, 4):
        raise ValueError(f"{path}: a shard of version {version}, {itemsize} bytes a token: expected version {VERSION}")
    if path.stat().st_size != HEADER.size + count * itemsize:
        raise ValueError(f"{path}: cut short or damaged: it should hold {count} tokens; write it again")
    if (size, bos_id, digest) != (vocabulary.size, vocabulary.bos_id, vocabulary.digest):
        raise ValueError(
            f"{path}: written with another tokenizer ({size} words; this run's has {vocabulary.size}): "
            "give the --tokenizer it was written with, or write it again"
        )
    if not count:
        return np.zeros(0, dtype=np.uint16)
    return np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=HEADER.size, shape=(count,))


class TokenStore:
    """The documents of one split (`finetune.data.Documents`). Raises ValueError as `read_shard` does."""

    def __init__(self, folder: Path, split: Split, vocabulary: Vocabulary) -> None:
        self.paths = sorted(folder.glob(f"{split}_*.bin"))
        if not self.paths:
            raise ValueError(f"{folder}: holds no shard {split}_*.bin")
        self.bos_id = vocabulary.bos_id
        self.shards = [read_shard(path, vocabulary) for path in self.paths]
        starts = [np.flatnonzero(shard == self.bos_id) for shard in self.shards]
        for path, shard, found in zip(self.paths, self.shards, starts, strict=True):
            if len(shard) and (not len(found) or found[0] != 0):
                raise ValueError(f"{path}: does not begin with BOS ({self.bos_id}): write it again")
        self.shard_of = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        self.starts: Ints = np.concatenate(starts).astype(np.int64)
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


def tokenize(job: Job) -> int:
    """Write the shards of one chunk; returns the chunk's size in bytes."""
    tokenizer, vocabulary = open_tokenizer(job.tokenizer), Vocabulary.of(job.tokenizer)
    tokens: dict[Split, list[int]] = {"train": [], "val": []}
    for side, text, ends in corpus.split(job.chunk, job.form, job.only, job.small):
        tokens[side] += tokenizer.encode(text, bos=True, eos=ends)
    for side, ids in tokens.items():
        if ids:
            write_shard(job.folder / f"{side}_{job.number:05d}.bin", ids, vocabulary)
    return job.chunk.stop - job.chunk.start


def jobs(source: Source, tokenizer: Path, folder: Path) -> Iterator[Job]:
    small = not source.val and corpus.is_small(source.train, source.format)
    number = 0
    for only, files in ((None if not source.val else "train", source.train), ("val", source.val)):
        for path in files:
            for chunk in corpus.chunks(path, source.format):
                yield Job(number, chunk, source.format, only, small, tokenizer, folder)  # type: ignore[arg-type]
                number += 1


def write_shards(source: Source, tokenizer: Path, folder: Path, workers: int) -> None:
    """Tokenize all of `source` into `folder`, in parallel. Raises ValueError when a split stays empty."""
    todo = list(jobs(source, tokenizer, folder))
    total = sum(job.chunk.stop - job.chunk.start for job in todo)
    bar = tqdm(total=total, desc=f"tokenizing {source.name}", unit="B", unit_scale=True, leave=False, delay=1)
    with bar:
        for done in _map(todo, min(workers, len(todo))):
            bar.update(done)
    for split in SPLITS:
        if not any(folder.glob(f"{split}_*.bin")):
            raise ValueError(f"--data {source.train[0]}: no text in it for {split}: it is empty or too short")


def _map(todo: list[Job], workers: int) -> Iterator[int]:
    """In order; in this process when there is nothing to share."""
    if workers == 1:
        yield from map(tokenize, todo)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(tokenize, todo)
