"""What a checkpoint is, before any model is built: format, config, tokenizer, integrity; and what the references, which
open Meta and Hugging Face folders, get in its place. Refusals are one line.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollama.checkpoint import CheckpointError, open_checkpoint, verify, write_hf
from nanollama.tokenizer import TokenizerError
from parity.candidates.nano.model import checksum, config_echo, load_tokenizer
from parity.contract import DTYPES, UsageError


@dataclass(frozen=True)
class Description:
    path: Path  # local, also for a hub id
    format: str
    config: dict[str, Any]
    tokenizer: Path | None  # the file that nanollama opens
    own_tokenizer: bool  # it is the checkpoint's, not one that the user named
    parameters: int
    stored_bytes: int
    stored_dtype: str  # of the large matrices
    context: int  # positions that the checkpoint was made for
    verified: list[str]  # files whose checksum was checked against a manifest
    notices: list[str]


def describe(path: str, tokenizer: str | None) -> Description:
    """Raises UsageError for a checkpoint or a tokenizer that cannot be read."""
    try:
        opened = open_checkpoint(path)
        config = opened.config
        file = Path(tokenizer) if tokenizer else opened.tokenizer
        notices = [*opened.notices, *_unlike_sizes(file, config.vocab_size)]
        verified = verify(opened.path)
    except (CheckpointError, TokenizerError) as error:
        raise UsageError(str(error)) from None
    weights = opened.weights
    numel = {name: _numel(shape) for name, shape in weights.shapes.items()}
    stored = sum(n * weights.dtypes[name].itemsize for name, n in numel.items())
    echo = config_echo(config)
    dtype = next(name for name, value in DTYPES.items() if value == weights.dtype)
    sizes = (sum(numel.values()), stored, dtype, config.max_seq_len)
    return Description(opened.path, opened.format, echo, file, tokenizer is None, *sizes, verified, notices)


def fingerprint(path: str) -> str:
    """SHA-256 of the norms' weights in fp32: the same in every format that keeps them, and no way back to a weight."""
    weights = open_checkpoint(path).weights
    digest = hashlib.sha256()
    for name in sorted(name for name in weights.shapes if name.endswith("norm.weight")):
        digest.update(name.encode() + weights[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _unlike_sizes(tokenizer: Path | None, rows: int) -> list[str]:
    """Rows without a token are padding, tokens without a row matter when a text holds one."""
    tokens = rows if tokenizer is None else load_tokenizer(tokenizer).vocab_size
    if tokens == rows:
        return []
    what = "the rows behind them are padding" if tokens < rows else "the tokens behind them have no row"
    return [f"{tokenizer.name} has {tokens} tokens, the model {rows} rows: {what}"] if tokenizer else []


@dataclass(frozen=True)
class ReferenceFiles:
    """What the references open. notices: where it is not the user's own file."""

    checkpoint: Path
    tokenizer: Path | None  # None: what they find in the checkpoint's folder
    first: str  # the reference that turns texts into ids
    notices: list[str]
    spare_prompts: list[list[int]] | None = None  # of texts, by nanollama's tokenizer

    def as_case(self) -> dict[str, Any]:
        tokenizer = str(self.tokenizer) if self.tokenizer else None
        return {"checkpoint": str(self.checkpoint), "tokenizer": tokenizer, "spare_prompts": self.spare_prompts}


def reference_files(
    described: Description, folder: Path, references: Sequence[str] = ("meta", "hf"), texts: Sequence[str] | None = None
) -> ReferenceFiles:
    """The checkpoint in a form that the references open; weights are converted into `folder`. Their tokenizers are
    opened by themselves, from the user's own files.

    Raises UsageError when the weights cannot be written.
    """
    checkpoint, tokenizer, notices = described.path.resolve(), described.tokenizer, list[str]()
    folders = described.format in ("meta", "hf")
    try:
        if not folders:
            opened = open_checkpoint(checkpoint)
            write_hf(folder / "hf", opened.config, opened.weights)
            checkpoint = folder / "hf"
            notices.append(
                f"no reference opens {described.path.name}: they get the weights that nanollama read from it, as a "
                "Hugging Face folder, so this run does not prove that the file was read rightly"
            )
    except (CheckpointError, OSError) as error:
        raise UsageError(f"{described.path}: cannot be prepared for the references: {error}") from None
    if described.own_tokenizer and tokenizer is not None and folders and tokenizer.is_relative_to(described.path):
        tokenizer = None  # they find what lies in a folder by themselves
    can = [name for name in references if has_tokenizer(name, tokenizer, checkpoint)]
    spare = None
    if texts is not None and described.tokenizer is not None:
        spare = [load_tokenizer(described.tokenizer).encode(text, bos=True) for text in texts]
    return ReferenceFiles(checkpoint, tokenizer, (can or list(references))[0], notices, spare)


def has_tokenizer(reference: str, tokenizer: Path | None, folder: Path) -> bool:
    """Whether a file lies here that this reference could open; it may still find that it is none."""
    metas, others = ("tokenizer.model", "original/tokenizer.model"), ("tokenizer.json", "vocab.json")
    if tokenizer is None:
        return any((folder / name).is_file() for name in (metas if reference == "meta" else metas + others))
    with tokenizer.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    return tokenizer.suffix != ".bin" and (reference != "meta" or not (is_gguf or tokenizer.suffix == ".json"))


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
