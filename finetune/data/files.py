"""Which files a path of data stands for. Hidden ones stay out; what else is left out, or lies there twice, is said.
Files that are written here come whole or not at all.

files, others = find_files(Path("notes"), (".txt", ".jsonl"), print)
# data: notes/b.txt holds the same as notes/a.txt: what is in them counts twice
"""

import codecs
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError
from nanollama.gate import require_file

Say = Callable[[str], None]

NAMED = 5  # files or lines that a message lists
LFS_POINTER = b"version https://git-lfs"
NOT_PLAIN = dict.fromkeys((".xlsx", ".xls", ".ods"), "an Excel workbook: save its sheet as CSV UTF-8")
NOT_PLAIN |= dict.fromkeys(
    (".docx", ".doc", ".odt", ".rtf", ".pdf", ".epub"), "no plain text: save it as .txt in UTF-8"
)
ON_DISK = {"dataset_dict.json": "several splits of a", "state.json": "a"}  # data set that `datasets` saved to disk
NO_TEXT = {
    codecs.BOM_UTF16_LE: "UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: save it as UTF-8",
    b"\x1f\x8b": "compressed: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed: unpack it",
    LFS_POINTER: "a git-lfs pointer and not the file: run git lfs pull in its folder",
}


def silent(text: str) -> None:
    """For callers that have nobody to tell."""


def find_files(
    path: Path, suffixes: Sequence[str], say: Say, accept: Callable[[Path], bool] = lambda path: True
) -> tuple[tuple[Path, ...], str]:
    """The file, or the files below the folder that have one of the suffixes, sorted; and a name for these data.

    The name lists what else lies in the folder, but for hidden files. accept: looks into a file and says whether it
    is data.
    """
    if not path.is_dir():
        require_file(path)  # a pipe would be read twice
        return (path,), path.stem
    _refuse_saved(path)
    below = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path))]
    files = {p: None for p in below if p.suffix.lower() in suffixes and accept(p)}
    others = [str(p.relative_to(path)) for p in below if p not in files]
    for first, second in _twins(list(files)):
        say(f"data: {second} holds the same as {first}: what is in them counts twice")
    return tuple(files), f"{path.stem} without {listed(others)}" if others else path.stem


def _refuse_saved(folder: Path) -> None:
    """Raises UserError for what `save_to_disk` wrote, with the command that writes a file of it."""
    whose = next((what for name, what in ON_DISK.items() if (folder / name).is_file()), None)
    inner = sorted(folder.glob("*.arrow")) + sorted(folder.glob("*/*.arrow"))
    if whose and inner:
        one = inner[0].parent
        code = f"from datasets import load_from_disk as d; d('{one}').to_parquet('{one.name}.parquet')"
        raise UserError(f'--data {folder}: is {whose} data set on disk: python -c "{code}" writes a file to give here')


def _is_hidden(relative: Path) -> bool:
    """Also in a hidden folder: .ipynb_checkpoints, .git, macOS's ._name."""
    return any(part.startswith(".") for part in relative.parts)


def _twins(files: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Files of the same content. Only those of the same size are read."""
    sized, seen = defaultdict(list), dict[bytes, Path]()
    for path in files:
        sized[path.stat().st_size].append(path)
    for size, paths in sized.items():
        for path in paths if size and len(paths) > 1 else ():
            with path.open("rb") as file:
                digest = _digest(file.read, size)
            if digest in seen:
                yield seen[digest], path
            seen.setdefault(digest, path)


def _digest(read: Callable[[int], bytes], size: int) -> bytes:
    digest = hashlib.sha256(str(size).encode())
    while block := read(1 << 20):
        digest.update(block)
    return digest.digest()


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def check_text(path: Path) -> None:
    """Raises UserError for what cannot be UTF-8 text, or is only a stand-in for it."""
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    found = [what for start, what in NO_TEXT.items() if head.startswith(start)]
    if not found and len(head) > 3 and (not any(head[:8:2]) or not any(head[1:8:2])):  # without a mark
        found = ["UTF-16: save it as UTF-8"]
    found = [NOT_PLAIN[path.suffix.lower()]] if path.suffix.lower() in NOT_PLAIN else found
    if found:
        raise UserError(f"--data {path}: is {found[0]}")


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to; what was written gets its own name when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none."""
    with appearing_whole(path) as temporary:
        temporary.write_bytes(data)
