"""Any checkpoint into any format, streaming: the memory of one block of rows, whatever the size.

python -m nanollama convert --src stories260K.bin --dst stories.gguf --format gguf --tokenizer tok512.bin
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanollama import gguf_header
from nanollama.checkpoint import gguf_types
from nanollama.checkpoint.gguf import write_gguf
from nanollama.checkpoint.hf import write_hf
from nanollama.checkpoint.llama2c import write_bin
from nanollama.checkpoint.meta import write_meta
from nanollama.checkpoint.opening import open_checkpoint
from nanollama.checkpoint.weights import DTYPES, Checkpoint, CheckpointError

FORMATS = ("meta", "hf", "llama2c", "gguf")
SUFFIX = {"llama2c": ".bin", "gguf": ".gguf"}


def convert(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    shards: int = 1,
    version: int = 0,
    tokenizer: str | Path | None = None,
    change: Callable[[Checkpoint], Checkpoint] | None = None,
) -> Checkpoint:
    """Read `src`, write `dst`, and return `dst` opened again.

    format: "meta", "hf" (dst is a folder), "llama2c" (a .bin file) or "gguf" (a .gguf file).
    dtype: "fp32", "bf16", "fp16", in gguf also those of `gguf_types.writable()`; None keeps the stored one (llama2c:
    fp32, or int8 in version 2).
    shards: files of a Meta folder, 1 to 16. version: 0, 1 or 2 of llama2c.
    tokenizer: a tokenizer file of any kind; None takes the one that lies beside `src`.
    change: makes what is written of what was read, as where an adapter is merged.
    Raises CheckpointError, before anything is written, for options that the format does not have.
    """
    dst = Path(dst)
    _check_options(dst, format, dtype, shards, version)
    opened = open_checkpoint(src)
    opened = change(opened) if change else opened
    vocabulary = Path(tokenizer) if tokenizer is not None else opened.tokenizer
    model, floats = (opened.config, opened.weights), DTYPES.get(dtype or "")
    if format == "meta":
        write_meta(dst, *model, tokenizer=vocabulary, shards=shards, dtype=floats)
    elif format == "hf":
        write_hf(dst, *model, tokenizer=vocabulary, dtype=floats)
    elif format == "gguf":
        write_gguf(dst, *model, tokenizer=vocabulary, dtype=dtype, name=opened.path.stem)
    else:
        write_bin(dst, *model, tokenizer=vocabulary, version=version)
    made = open_checkpoint(dst)
    return replace(made, notices=[*_said(dst, format, vocabulary is not None), *made.notices])


def _said(dst: Path, format: str, has_vocabulary: bool) -> list[str]:
    """What a user should know of a vocabulary in a format that was not made for it."""
    if format == "meta" and has_vocabulary and not (dst / "tokenizer.model").exists():
        return [
            "Meta's tokenizer.model cannot hold this vocabulary: tokenizer.json is written, which Meta's code ignores"
        ]
    if format == "gguf" and "tokenizer.huggingface.json" in gguf_header.read(dst).keys:
        return [
            "GGUF's keys cannot say all that this tokenizer.json does, as to spaces in front: it is carried whole, "
            "in tokenizer.huggingface.json; llama.cpp, which ignores that, may give other ids there"
        ]
    return []


def _check_options(dst: Path, format: str, dtype: str | None, shards: int, version: int) -> None:
    if format not in FORMATS:
        raise CheckpointError(dst, f"format {format!r} is unknown: choose one of {', '.join(FORMATS)}")
    if format == "gguf":
        gguf_types.named(dst, dtype)
    elif dtype not in (None, "fp32") and (format == "llama2c" or dtype not in DTYPES):
        raise CheckpointError(dst, f"{format} has no dtype {dtype!r}")
    if shards != 1 and format != "meta":
        raise CheckpointError(dst, f"only the meta format is written in {shards} shards")
    if version not in ((0, 1, 2) if format == "llama2c" else (0,)):
        raise CheckpointError(dst, f"{format} has no version {version}")
    suffix = SUFFIX.get(format)
    if suffix and dst.suffix != suffix:
        raise CheckpointError(dst, f"must end in {suffix}, by which the format is recognised")
