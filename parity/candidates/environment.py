"""A Python candidate in an environment of its own, whose packages may be others, or older, or none.

    python -m parity.check --candidate my_port.py:load --candidate_python VENV/bin/python
    python -m parity.check --candidate "env:VENV/bin/python my_port.py:load"        # the same in one flag

parity/serve.py runs there, loads the candidate and answers the requests of parity/candidates/command.py.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from parity import serve
from parity.candidates.command import Command, dtype_name, how_it_ended
from parity.candidates.crash import Crashed, Wrong
from parity.candidates.interface import ATTRIBUTES, METHODS, accepted
from parity.candidates.limits import OUTSIDE, PROGRAM, Limits
from parity.candidates.nano.opening import open_checkpoint
from parity.candidates.program import own_environment
from parity.contract import UsageError

PREFIX = "env:"
TABLE = {
    "methods": {m.name: accepted(m) for m in METHODS},
    "signatures": {m.name: m.signature for m in METHODS},
    "attributes": [a.name for a in ATTRIBUTES],
}


def within(python: str, candidate: str) -> str:
    """The name of a Python candidate that is to run under another Python. Raises UsageError for any other candidate."""
    if candidate == "nanollama" or candidate.startswith((*OUTSIDE, "torch:", "hf:")) or ":" not in candidate:
        raise UsageError(f"--candidate_python runs module:attr or file.py:attr, not {candidate!r}")
    return PREFIX + shlex.join([python, candidate])


def environment_loader(line: str, limits: Limits = PROGRAM) -> Callable[[str, torch.dtype, str], Command]:
    """load(checkpoint, dtype, device) of "PYTHON file.py:attr". Raises UsageError where one of both is not there."""
    words = shlex.split(line)
    if len(words) != 2:
        raise UsageError(f"candidate {PREFIX}{line}: expected {PREFIX}PYTHON file.py:attr")
    python, name = words
    if shutil.which(python) is None:
        raise UsageError(f"candidate {name}: there is no Python {python!r}; expected VENV/bin/python")
    file = Path(name.rpartition(":")[0])
    if file.suffix == ".py" and not file.is_file():
        raise UsageError(f"candidate file {file} does not exist")

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Command:
        where = [dtype_name(dtype), device]
        command = [python, serve.__file__, name, checkpoint, *where, json.dumps(TABLE)]
        return Served(command, open_checkpoint(checkpoint), limits, environment())

    return load


def environment() -> dict[str, str]:
    """This process's variables, without what leads the other Python to our packages."""
    paths = [
        p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != Path(serve.ROOT)
    ]
    rest = {key: value for key, value in own_environment().items() if key != "PYTHONPATH"}
    return rest | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


class Served(Command):
    """serve.py with a candidate: what went wrong there is told as if it had been called here."""

    def failed(self, request: str, answer: str) -> Exception:
        word, _, text = answer.partition(" ")
        if word == "wrong":
            return Wrong(text)
        if word != "error":
            return super().failed(request, answer)
        said, _, where = text.rpartition(" (")
        return Crashed(f"{self._asked(request)} raised {said or text}", where.removesuffix(")") if said else None)

    def ended(self, request: str, code: int | None, last: str) -> Exception:
        if code == 2 and last.startswith("error: "):
            return UsageError(last.removeprefix("error: "))
        how = f" ended the process with exit code {code}" if code else f": the process {how_it_ended(code)}"
        return Crashed(f"{self._asked(request)}{how}: {last}", None)

    def _asked(self, request: str) -> str:
        if request == "can":
            return f"load(checkpoint, {self.words[-3]}, {self.words[-2]})"
        return next((m.signature for m in METHODS if m.name == serve.REQUESTS.get(request)), request)
