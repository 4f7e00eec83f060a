"""The checkpoint of a run without --ckpt: tiny, seeded, with the real Llama 3 tokenizer."""

from pathlib import Path

from parity.contract import UsageError
from parity.machine import cache_folder
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES


def embedded_checkpoint() -> Path:
    """Made on first use. Raises UsageError where it cannot be written."""
    folder = cache_folder() / "tiny-v3"
    try:
        if not (folder / "SHA256SUMS").is_file():
            synthesise(SHAPES["tiny"], folder)
    except OSError as error:
        raise UsageError(
            f"{cache_folder()}: the default checkpoint (70 MB) cannot be written there ({error.strerror}); "
            "set NANOLLAMA_CACHE to a folder with space"
        ) from None
    return folder
