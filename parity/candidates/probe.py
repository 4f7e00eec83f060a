"""A candidate loaded and asked for three tokens before anything slow runs, so that a typo costs seconds.

    python -m parity.candidates.probe NAME CASE.json OUT     # writes OUT/probe.json; progress as the references do

In a process of its own: what a candidate allocates is gone before the references begin, and it may die.
"""

import json
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parity.candidates import answers
from parity.candidates.crash import Crashed, Failure, Unasked, Wrong, failure
from parity.candidates.interface import Interface, declared, declared_dtypes, loaded, refuse_undeclared
from parity.contract import Case, UsageError
from parity.run.process import Crash, started, wait_any

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

    def stops(self, dtypes: list[str]) -> bool:
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
            candidate = loaded(load, case.checkpoint, dtype, case.device)
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


def probe_in_process(name: str, case: Case, folder: Path, on_progress: Any) -> Probed:
    """Run `probe` in its own process. Raises UsageError; a process that dies is a failure of the candidate."""
    out = folder / "probe"
    file = case.write(folder / "probe-case.json")
    arguments = [name, str(file), str(out)]
    with started("candidate", "parity.candidates.probe", arguments, folder / "probe.log", on_progress) as process:
        try:
            wait_any([process]).finish()
        except Crash as crash:
            reason = f"{crash}, while it was loaded and asked for {TOKENS} tokens"
            return Probed(failures=[Failure("logits", "G3", "error", reason, case.dtypes[0]).as_json()])
    return Probed(**json.loads((out / FILE).read_text()))


def main(argv: list[str]) -> int:
    import faulthandler

    from parity.candidates import resolve

    faulthandler.enable()
    name, case_file, out = argv
    try:
        case = Case.read(Path(case_file))
        torch.set_num_threads(case.threads)
        load = next(iter(resolve(name).values()))
        print(json.dumps({"stage": "probing", "done": 0.1}), flush=True)
        found = probe(load, case)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / FILE).write_text(json.dumps(found.__dict__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
