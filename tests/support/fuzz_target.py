"""One thing that is fuzzed: a valid file, how it is changed, how it is opened, and which errors are a refusal.

Target(path, mutate_json, read).attempt(data)      # None, or the line that refuses it
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mutators import Rng

# The classes whose message is one line for the user, by name: three packages have their own.
REFUSALS = ("CheckpointError", "TokenizerError", "UserError", "UsageError", "Unusable", "ChatError", "Wrong")


@dataclass(frozen=True)
class Target:
    """file: where the changed bytes go. open: reads all of it. refusals: more names of errors that are refusals.

    forks: whether its libraries live on in a forked process; one that does not is fuzzed in the process itself.
    """

    file: Path
    change: Callable[[bytes, Rng], bytes]
    open: Callable[[], object]
    refusals: tuple[str, ...] = ()
    forks: bool = True

    def attempt(self, data: bytes) -> str | None:
        """The line that refuses these bytes, None where they open; what else it raises is a finding."""
        self.file.write_bytes(data)
        try:
            self.open()
        except Exception as error:
            names = {kind.__name__ for kind in type(error).__mro__}
            if not names & {*REFUSALS, *self.refusals}:
                raise
            line = str(error)
            if "\n" in line or len(line) > 1500 or not line:
                raise AssertionError(f"not one short line: {line[:300]!r}") from error
            return line
        return None
