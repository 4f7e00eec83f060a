"""One process trains in a folder: a second one is refused, with one line, before it reads or writes anything there.

    with held(out, world):
        train()

The lock is the system's (flock) on the folder, since its files may be replaced: it goes with the process that holds it,
however that ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError
from finetune.parallelize import World


@contextmanager
def held(out: Path, world: World) -> Iterator[None]:
    """On the main rank, for as long as the block lasts. Raises UserError where another process holds it."""
    file = None
    try:
        import fcntl
    except ImportError:  # no flock on Windows
        fcntl = None  # type: ignore[assignment]
    if fcntl is not None and world.is_main:
        file = os.open(out, os.O_RDONLY)  # the folder: every file in it may be replaced by a newer one
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"--out {out}: another process trains in it: wait for it, or choose another folder"
            ) from None
        except OSError:
            pass  # a file system without locks: as it was before there were any
    try:
        yield
    finally:
        if file is not None:
            os.close(file)
