"""From a path to an opened checkpoint: which format it is, which reader reads it, which tokenizer lies beside it.

python -c "from nanollama.checkpoint.opening import sniff; from pathlib import Path; print(sniff(Path('x.gguf')))"
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanollama.checkpoint import hub
from nanollama.checkpoint.gguf import open_gguf
from nanollama.checkpoint.hf import open_hf
from nanollama.checkpoint.llama2c import open_bin, open_pt
from nanollama.checkpoint.meta import open_meta
from nanollama.checkpoint.weights import Checkpoint, CheckpointError
from nanollama.vocabulary import read

READERS: dict[str, Callable[[Path], Checkpoint]] = {
    "meta": open_meta,
    "hf": open_hf,
    "llama2c": open_bin,
    "pt": open_pt,
    "gguf": open_gguf,
}
TOKENIZERS = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json", "tokenizer.bin")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any known format; the path may be a hub id ("org/name") when no such path exists.

    Raises CheckpointError (one line) when it is none, is damaged, or is a model that this project does not compute.
    """
    local = Path(path).expanduser()
    if not local.exists():
        local = hub.fetch(str(path))
    kind = sniff(local)
    try:
        opened = READERS[kind](local)
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


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer file that lies in the folder (or beside the file), if any.

    Where tokenizer.json has tokens that tokenizer.model lacks, the json is the model's.
    """
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer.bin", *TOKENIZERS) if path.suffix == ".bin" else TOKENIZERS
    found = [folder / name for name in names if (folder / name).is_file()]
    whole = folder / "tokenizer.json"
    if found[1:] and whole in found and found[0].name == "tokenizer.model":
        with contextlib.suppress(ValueError):  # who opens it says what is wrong with it
            if len(read(whole).tokens) > len(read(found[0]).tokens):
                return whole
    return found[0] if found else None
