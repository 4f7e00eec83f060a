"""Atomic writing: files appear under their own names only when all of them are complete and on the disk.

python - <<'END'
from nanollama.checkpoint.staging import staged
with staged("DIR") as stage:
    stage.text("params.json", "{}")         # written last of all: without it the folder is no checkpoint
END
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanollama.checkpoint.weights import CheckpointError


class Stage:
    """Files under temporary names in the folder they belong to; `staged` gives them their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}.partial"

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        self.names.append(name)
        with open(self._temporary(name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def text(self, name: str, text: str) -> None:
        self.bytes(name, text.encode())

    def bytes(self, name: str, data: bytes) -> None:
        with self.open(name) as file:
            file.write(data)

    def commit(self) -> None:
        """Rename in the order of writing, so that the file that makes the folder a checkpoint comes last."""
        for name in self.names:
            os.replace(self._temporary(name), self.folder / name)
        if os.name == "posix":  # the names, too, must reach the disk
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def discard(self) -> None:
        for name in self.names:
            self._temporary(name).unlink(missing_ok=True)


@contextmanager
def staged(folder: str | Path) -> Iterator[Stage]:
    """All the files that the block writes, or none. Raises CheckpointError when the disk refuses."""
    folder = Path(folder)
    is_new = not folder.exists()
    stage = Stage(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield stage
        stage.commit()
    except BaseException as error:
        stage.discard()
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CheckpointError(folder, f"cannot be written ({reason}): choose another place or free some") from None
        raise


def refuse_occupied(folder: str | Path) -> None:
    """Writing over a checkpoint could leave a mixture of two behind."""
    for pattern in ("params.json", "config.json", "*.pth", "*.safetensors", "*.safetensors.index.json"):
        for found in Path(folder).glob(pattern) if Path(folder).is_dir() else ():
            raise CheckpointError(folder, f"already holds a checkpoint ({found.name}): choose an empty folder")
