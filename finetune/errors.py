"""What ends a run and is no bug."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """What the user can mend. The message is one line: what, where, how to mend it; the exit code is 2."""


class TrainingStopped(RuntimeError):
    """The run ended before its last step; the message says why and where its state is. `code`: the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
