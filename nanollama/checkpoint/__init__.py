"""Checkpoints in and out: Meta folders, Hugging Face folders and hub ids, llama2.c `.bin` and `.pt`, GGUF.

`open_checkpoint` looks at a path, finds out which format it is, and returns the config and lazy, memory-mapped weights
under Meta's names; never a model. Everything is strict: what does not fit raises CheckpointError, one line that names
the file, the weight or key, and what to do.

    python -c "from nanollama.checkpoint import open_checkpoint; print(open_checkpoint('Meta-Llama-3.1-8B').config)"
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanollama.checkpoint.hf import open_hf, write_hf
from nanollama.checkpoint.integrity import verify, write_manifest
from nanollama.checkpoint.llama2c import open_bin, open_pt, write_bin
from nanollama.checkpoint.meta import open_meta, write_meta
from nanollama.checkpoint.weights import Checkpoint, CheckpointError, Lazy, Weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Lazy",
    "Weights",
    "find_tokenizer",
    "open_checkpoint",
    "sniff",
    "verify",
    "write_bin",
    "write_hf",
    "write_manifest",
    "write_meta",
]

TOKENIZERS = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json", "tokenizer.bin")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any known format; the path may be a hub id ("org/name") when no such path exists.

    Raises CheckpointError (one line) when it is none, is damaged, or is a model that this project does not compute.
    """
    from nanollama.checkpoint import hub

    local = Path(path).expanduser()
    if not local.exists():
        local = hub.fetch(str(path))
    kind = sniff(local)
    try:
        opened = _reader(kind)(local)
    except OSError as error:
        raise CheckpointError(local, f"cannot be read ({error.strerror or error}): check permissions") from None
    return replace(opened, tokenizer=opened.tokenizer or find_tokenizer(local))


def sniff(path: Path) -> str:
    """The format of a local path: "meta", "hf", "gguf", "llama2c" (.bin) or "pt" (llama2.c's training checkpoint)."""
    if path.is_dir():
        return _sniff_folder(path)
    kind = {".gguf": "gguf", ".bin": "llama2c", ".pt": "pt"}.get(path.suffix)
    if kind is None:
        raise CheckpointError(path, "is a file of no known format: give a folder, a .gguf, a .bin or a .pt file")
    return kind


def _sniff_folder(folder: Path) -> str:
    """A hub copy with Meta's files under original/ is "hf"; two formats side by side are refused."""
    is_meta = (folder / "params.json").exists() or any(folder.glob("consolidated.*.pth"))
    is_hf = (folder / "config.json").exists() or any(folder.glob("*.safetensors"))
    if is_meta and is_hf:
        raise CheckpointError(
            folder,
            "holds Meta's files (params.json, .pth) and Hugging Face's (config.json, .safetensors): separate them",
        )
    if not is_meta and not is_hf:
        if (folder / "original" / "params.json").exists():
            raise CheckpointError(folder, f"holds no model, but {folder / 'original'} does: give that path")
        raise CheckpointError(
            folder,
            "holds no checkpoint: expected params.json with consolidated.NN.pth, or config.json with .safetensors",
        )
    config = folder / ("params.json" if is_meta else "config.json")
    if not config.exists():
        raise CheckpointError(config, "is missing beside the weights: download it again")
    return "meta" if is_meta else "hf"


def _reader(kind: str) -> Callable[[Path], Checkpoint]:
    readers: dict[str, Callable[[Path], Checkpoint]] = {
        "meta": open_meta,
        "hf": open_hf,
        "llama2c": open_bin,
        "pt": open_pt,
    }
    return readers[kind]


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer file that lies in the folder (or beside the file), if any."""
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
