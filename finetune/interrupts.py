"""Ctrl-C before a run has begun: one line, from the first import on.

    if __name__ == "__main__":
        announce_()             # before torch is imported, which takes seconds

Imports nothing that takes time, and changes nothing until it is called.
"""

import os
import signal
import sys
from types import FrameType

WORD = "interrupted before the first step: no model was changed; type the same line again to start over"


def announce_() -> None:
    """From now on, until `hand_over_`, SIGINT ends the process with one line and exit code 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # ignored (nohup) stays ignored
        signal.signal(signal.SIGINT, _leave)


def hand_over_() -> None:
    """SIGINT raises KeyboardInterrupt again, for those who clean up."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(WORD, file=sys.stderr, flush=True)
    os._exit(128 + number)  # half-imported modules have nothing to clean up, and much to complain about
