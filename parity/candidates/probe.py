"""A candidate loaded and asked for three tokens before anything slow runs, so that a typo costs seconds.

    python -m parity.candidates.probe NAME OUT < CASE.json     # a case of one line; writes OUT/probe.json

In a process of its own, since it may die. Of a small checkpoint the same process then stays for the candidate's run,
whose arguments are a second line of its standard input: importing torch costs a second try more than anything else.
Of a large one it ends. Either way, what the candidate allocated is gone before the references begin.
"""

import gc
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from parity.candidates import answers
from parity.candidates.crash import Crashed, Failure, Unasked, Wrong, failure
from parity.candidates.interface import Interface, declared, declared_dtypes, load_candidate, refuse_undeclared
from parity.contract import Case, UsageError
from parity.machine import SMALL_BYTES, threads_for, too_large
from parity.run.process import POLL_S, Crash, Process, start_process

if TYPE_CHECKING:
    from parity.candidates.nano.checkpoint import Description

TOKENS = 3
FILE = "probe.json"


@dataclass
class Probed:
    """What a candidate says about itself, and how it answered."""

    undone: dict[str, str] = field(default_factory=dict)  # dtype -> why the candidate has none
    failures: list[dict[str, Any]] = field(default_factory=list)  # as parity.candidates.crash.Failure
    notices: list[str] = field(default_factory=list)
    max_positions: int | None = None
    answer: int | None = None  # a checksum of what it answered; None of one that was not asked

    def stops(self, dtypes: Sequence[str]) -> bool:
        """Whether there is nothing that the references could be run for."""
        return bool(self.failures) or all(dtype in self.undone for dtype in dtypes)


def probe(load: Any, case: Case) -> Probed:
    """At the first dtype that the candidate has. Raises UsageError."""
    found = Probed(max_positions=declared(load, "max_positions"))
    for dtype in case.dtypes:
        if dtype in case.too_large and not getattr(load, "streams", False):
            continue
        try:
            refuse_undeclared(load, dtype)
            candidate = load_candidate(load, case.checkpoint, dtype, case.device)
            refuse_undeclared(candidate.target, dtype)
            found.notices = [*candidate.declared("notices"), *candidate.notices]
            found.max_positions = candidate.declared("max_positions") or found.max_positions
            str(candidate.conditions)  # refuses a scheme that is none
            found.answer = ask(candidate, case)
            names = declared_dtypes(candidate.target)
            others = [d for d in case.dtypes if names is not None and d not in names]
            found.undone |= {d: f"the candidate's dtypes are {', '.join(names or [])}" for d in others}
            return found
        except NotImplementedError as error:
            found.undone[dtype] = str(error).split("\n")[0] or f"the candidate says that it has no {dtype}"
        except (Crashed, Wrong) as error:
            found.failures.append(failure(error, "logits", "G3", dtype).as_json())
            return found
    return found


def ask(candidate: Interface, case: Case) -> int | None:
    """A checksum of the logits, or the next token, of three tokens; nothing of one that streams its layers."""
    ids = [n % (case.vocab_size or TOKENS) for n in range(1, TOKENS + 1)]
    with torch.no_grad():
        if "next_tokens" in candidate.has:
            asked = f"next_tokens({TOKENS} ids, 1)"
            with suppress(Unasked):
                found = answers.ids(candidate.ask("next_tokens", ids, 1), asked, case.vocab_size)
                if not found:
                    raise Wrong(f"{asked} returned no token")
                return found[0]
        elif not candidate.declared("streamed"):
            last = candidate.declared("last_only")
            out = candidate.ask("__call__", torch.tensor([ids], device=case.device))
            logits = answers.logits(out, candidate.row("__call__").signature, 1, TOKENS, case.vocab_size, last)
            return zlib.crc32(logits.float().cpu().contiguous().numpy().tobytes())
        return None


# --- The process -----------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A candidate's process: it imports at once, is probed when its case is known, and may stay for its run."""

    process: Process
    out: Path

    @property
    def waiting(self) -> dict[str, Process]:
        """By its job's label, the process that stayed; nothing of one that has ended."""
        return {} if self.process.poll() else {self.process.label: self.process}

    def probe(self, case: Case, stays: bool) -> Probed:
        """Raises UsageError; a process that dies is a failure of the candidate. stays: else the process ends."""
        self.process.say(json.dumps(asdict(case)))
        if not stays:
            self.process.feed("")
        answer = self.out / FILE
        while not self.process.poll():
            if stays and answer.is_file():
                return Probed(**json.loads(answer.read_text()))
            time.sleep(POLL_S)
        try:
            self.process.finish()
        except Crash as crash:
            reason = f"{crash}, while it was loaded and asked for {TOKENS} tokens"
            return Probed(failures=[Failure("logits", "G3", "error", reason, case.dtypes[0]).as_json()])
        return Probed(**json.loads(answer.read_text()))


@contextmanager
def start_candidate(name: str, folder: Path) -> Iterator[Candidate | None]:
    """The process of a candidate that is about to be probed; None of nanollama, which is ours."""
    if name == "nanollama":
        yield None
        return
    out, silent = folder / "probe", lambda label, stage, done: None
    out.mkdir(parents=True, exist_ok=True)
    arguments, log = [name, str(out)], folder / "candidate.log"
    with start_process("candidate", "parity.candidates.probe", arguments, log, silent, fed=True) as process:
        yield Candidate(process, out)


def probe_in_process(
    candidate: Candidate | None, checkpoint: "Description", dtypes: Sequence[str], device: str
) -> Probed | None:
    """A candidate loaded and asked before the references run; None of nanollama, which is ours.

    Its process stays where memory holds several models. Raises UsageError.
    """
    if candidate is None:
        return None
    case = Case(
        str(checkpoint.path.resolve()),
        list(dtypes),
        device=device,
        threads=threads_for(checkpoint.stored_bytes),
        too_large=too_large(checkpoint.parameters, dtypes),
        vocab_size=checkpoint.config["vocab_size"],
    )
    return candidate.probe(case, stays=checkpoint.stored_bytes <= SMALL_BYTES)


def main(argv: list[str]) -> int:
    """Import, probe, and run as `python -m parity.candidates` does, if its arguments come."""
    import faulthandler

    from parity.candidates import resolve
    from parity.candidates.__main__ import main as run

    faulthandler.enable()
    name, out = argv
    told = take_input()
    try:
        load = next(iter(resolve(name).values()))
        case = Case(**json.loads(told.readline()))
        torch.set_num_threads(case.threads)
        found = probe(load, case)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gc.collect()  # a model may hold itself
    unfinished = Path(out) / f"{FILE}.part"
    unfinished.write_text(json.dumps(asdict(found)))
    unfinished.replace(Path(out) / FILE)
    arguments = told.readline()
    return run(json.loads(arguments), load) if arguments else 0


def take_input() -> TextIO:
    """Standard input for us alone: a candidate that reads it finds nothing."""
    told = os.fdopen(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
