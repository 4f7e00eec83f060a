"""What a checkpoint is, before any model is built: format, config, tokenizer, integrity. Refusals are one line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollama.checkpoint import CheckpointError, open_checkpoint, verify
from nanollama.tokenizer import TokenizerError, open_tokenizer
from parity.candidates.nano import config_echo
from parity.contract import UsageError


@dataclass(frozen=True)
class Description:
    path: Path  # local, also for a hub id
    format: str
    config: dict[str, Any]
    tokenizer: Path | None
    stored_bytes: int
    verified: list[str]  # files whose checksum was checked against a manifest
    notices: list[str]


def describe(path: str, tokenizer: str | None) -> Description:
    """Raises UsageError for a checkpoint that cannot be read, or whose vocabulary is not its tokenizer's."""
    try:
        opened = open_checkpoint(path)
        config = opened.config
        file = Path(tokenizer) if tokenizer else opened.tokenizer
        if file is not None and open_tokenizer(file).vocab_size != config.vocab_size:
            size = open_tokenizer(file).vocab_size
            raise UsageError(
                f"{file}: has {size} tokens, the checkpoint's vocabulary {config.vocab_size}; "
                "give the tokenizer of this checkpoint with --tokenizer"
            )
        verified = verify(opened.path)
    except (CheckpointError, TokenizerError) as error:
        raise UsageError(str(error)) from None
    weights = opened.weights
    stored = sum(_numel(s) * weights.dtypes[name].itemsize for name, s in weights.shapes.items())
    return Description(opened.path, opened.format, config_echo(config), file, stored, verified, list(opened.notices))


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
