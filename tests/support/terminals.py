"""The commands as a person at a terminal meets them."""

import os
import select
import signal
import subprocess
import sys
import time


class Terminal:
    """A program on a pseudo-terminal of its own: what a person would type and see."""

    def __init__(self, *argv: str) -> None:
        import pty

        self.fd, child = pty.openpty()
        # The terminal must control the session, or Ctrl-C would be a character like any other; and what a shell starts
        # in the background, these tests perhaps, is deaf to it and so are its children.
        code = (
            "import fcntl, runpy, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"sys.argv = ['nanollama', *{list(argv)!r}]\n"
            "runpy.run_module('nanollama', run_name='__main__', alter_sys=True)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, start_new_session=True
        )
        os.close(child)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def shows(self, text: str, seconds: float) -> bool:
        """Whether `text` comes within this time."""
        end = time.monotonic() + seconds
        while text.encode() not in self.seen and select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
            try:
                new = os.read(self.fd, 65536)
            except OSError:  # Linux says EIO when the program has gone
                new = b""
            if not new:
                break
            self.seen += new
        return text.encode() in self.seen

    def wait_for(self, text: str) -> str:
        """Everything up to `text`, which is then behind us."""
        assert self.shows(text, seconds=120), f"{text!r} did not come; seen: {self.seen[-2000:]!r}"
        before, _, self.seen = self.seen.partition(text.encode())
        return before.decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.fd)
