"""A file that became shorter while it is mapped ends a command with one line and exit code 2, not with a bus error.

Weights and data are mapped, not read: where another program writes over such a file or cuts it, or its disk fails, the
system sends SIGBUS at the next look at it. Nothing can go on from there, but it can be said what happened.

    with said_when_cut():
        command()
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LINE = (  # a progress bar may stand on the line
    b"\nerror: a file that is in use became shorter, or its disk failed, while it was read (SIGBUS): leave the files "
    b"of a checkpoint and of data alone while they are open\n"
)
_said: list[int] = []
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


@Handler
def _say_and_end(number: int) -> None:
    """Called by the system amid any instruction: a write and the end. Of several threads the first one says it."""
    if _said:
        time.sleep(60)  # the end comes from the first
    _said.append(number)
    os.write(2, LINE)
    os._exit(2)


@contextmanager
def said_when_cut() -> Iterator[None]:
    """For a whole command, in its main thread. A handler of Python's own would wait for the instruction to succeed."""
    if not hasattr(signal, "SIGBUS") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGBUS)
    libc = ctypes.CDLL(None)
    libc.signal.restype = None
    libc.signal.argtypes = (ctypes.c_int, Handler)
    libc.signal(signal.SIGBUS, _say_and_end)
    try:
        yield
    finally:
        signal.signal(signal.SIGBUS, before if before is not None else signal.SIG_DFL)
