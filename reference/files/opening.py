"""Open a checkpoint folder, Meta's or Hugging Face's: which one it is."""

from pathlib import Path

from nanollama import gate
from reference.files.checkpoint import Checkpoint
from reference.files.hf import open_hf
from reference.files.meta import open_meta
from reference.files.weights import Unusable, through_gate


def open_folder(path: str | Path) -> Checkpoint:
    """Open a Meta or Hugging Face folder. Raises Unusable, before any weight is read, if it is neither or broken."""
    folder = Path(path)
    if not folder.is_dir():
        raise Unusable(f"{folder}: no such folder; give a Meta or Hugging Face checkpoint folder")
    for name in ("params.json", "config.json"):
        through_gate(gate.require_file, folder / name)
    is_meta, is_hf = (folder / "params.json").exists(), (folder / "config.json").exists()
    if is_meta and is_hf:
        raise Unusable(f"{folder}: has both params.json and config.json; keep one format in one folder")
    if is_hf:
        return open_hf(folder)
    if is_meta:
        return open_meta(folder)
    if (folder / "original" / "params.json").exists():
        return open_meta(folder / "original")
    raise Unusable(f"{folder}: neither params.json (Meta) nor config.json (Hugging Face) lies here")
