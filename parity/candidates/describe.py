"""What a checkpoint is, before any model is built: format, config, tokenizer, integrity; and what the references, which
open Meta and Hugging Face folders and Meta's tokenizer files, get in its place. Refusals are one line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollama.checkpoint import CheckpointError, convert, open_checkpoint, verify, vocab, vocab_files
from nanollama.tokenizer import TokenizerError, open_tokenizer
from parity.candidates.nano import checksum, config_echo
from parity.contract import DTYPES, UsageError

METAS_TOKENIZERS = ("llama3", "llama2")  # kinds whose files Meta's code opens: tiktoken's ranks, sentencepiece models


@dataclass(frozen=True)
class Description:
    path: Path  # local, also for a hub id
    format: str
    config: dict[str, Any]
    tokenizer: Path | None
    tokenizer_kind: str | None
    parameters: int
    stored_bytes: int
    stored_dtype: str  # of the large matrices
    verified: list[str]  # files whose checksum was checked against a manifest
    notices: list[str]


def describe(path: str, tokenizer: str | None) -> Description:
    """Raises UsageError for a checkpoint that cannot be read, or whose vocabulary is not its tokenizer's."""
    try:
        opened = open_checkpoint(path)
        config = opened.config
        file = Path(tokenizer) if tokenizer else opened.tokenizer
        opened_tokenizer = open_tokenizer(file) if file is not None else None
        if opened_tokenizer is not None and opened_tokenizer.vocab_size != config.vocab_size:
            raise UsageError(
                f"{file}: has {opened_tokenizer.vocab_size} tokens, the checkpoint's vocabulary {config.vocab_size}; "
                "give the tokenizer of this checkpoint with --tokenizer"
            )
        verified = verify(opened.path)
    except (CheckpointError, TokenizerError) as error:
        raise UsageError(str(error)) from None
    weights = opened.weights
    numel = {name: _numel(shape) for name, shape in weights.shapes.items()}
    stored = sum(n * weights.dtypes[name].itemsize for name, n in numel.items())
    kind = opened_tokenizer.kind if opened_tokenizer is not None else None
    echo = config_echo(config)
    dtype = next(name for name, value in DTYPES.items() if value == weights.dtype)
    sizes = (sum(numel.values()), stored, dtype)
    return Description(opened.path, opened.format, echo, file, kind, *sizes, verified, list(opened.notices))


@dataclass(frozen=True)
class ReferenceFiles:
    """What the references open. notices: where it is not the user's own file."""

    checkpoint: Path
    tokenizer: Path | None
    notices: list[str]


def reference_files(described: Description, folder: Path) -> ReferenceFiles:
    """The checkpoint and its tokenizer in forms that the references open; conversions are written into `folder`.

    Raises UsageError when they cannot be written.
    """
    checkpoint, notices = described.path.resolve(), list[str]()
    try:
        if checkpoint.is_file():
            convert(checkpoint, folder / "hf", "hf")
            checkpoint = folder / "hf"
            notices.append(
                f"no reference opens {described.path.name}: they get the weights that nanollama read from it, as a "
                "Hugging Face folder, so this run does not prove that the file was read rightly"
            )
        tokenizer = described.tokenizer
        if tokenizer is not None and described.tokenizer_kind not in METAS_TOKENIZERS:
            notices.append(f"the references get the vocabulary that nanollama read from {tokenizer.name}")
            made = folder / "tokenizer.model"
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_bytes(vocab_files.meta_bytes(vocab.read(tokenizer)))
            tokenizer = made
    except (CheckpointError, OSError) as error:
        raise UsageError(f"{described.path}: cannot be prepared for the references: {error}") from None
    return ReferenceFiles(checkpoint, tokenizer, notices)


def float32_weights(described: Description, theirs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each weight by Meta's name and in its layout; a tied head is left out.

    theirs: shape and CRC-32 of each as a reference read it. Raises UsageError where the two readers differ.
    """
    stored = open_checkpoint(described.path).weights
    for name in stored.shapes:
        if not (described.config["tied"] and name == "output.weight"):
            if name in theirs and theirs[name]["crc32"] != checksum(stored, name):
                raise UsageError(f"{described.path}: {name} is read differently by nanollama and by the references")
            yield name, stored[name].float()


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
