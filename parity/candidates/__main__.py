"""Run one candidate on one case in a process of its own.

    python -m parity.candidates NAME PATH CASE.json OUT [FORCED ...]

FORCED are reference traces whose inputs the candidate's operations are given, each in a folder of the reference's name.
PATH is the label of one of the candidate's paths, "-" for its only one. Speaks the same protocol as the references:
progress as JSON lines on stdout, exit code 2 and one `error:` line for unusable input.
"""

import faulthandler
import json
import sys
from pathlib import Path

import torch

from nanollama.printable import complain
from parity.candidates import Load, resolve
from parity.contract import Case, UsageError
from parity.run.run_candidate import record
from parity.trace import Trace, TraceWriter


def progress(stage: str, done: float) -> None:
    print(json.dumps({"stage": stage, "done": round(done, 4)}), flush=True)


def main(argv: list[str], load: Load | None = None) -> int:
    """load: what NAME and PATH lead to, where that is imported already."""
    name, path, case_file, out, *forced = argv
    faulthandler.enable()  # a process that dies says where
    try:
        load = load or resolve(name)[None if path == "-" else path]
        case = Case.read(Path(case_file))
        torch.set_num_threads(case.threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        given = {Path(folder).name: Trace(Path(folder)) for folder in forced}
        record(load, case, TraceWriter(Path(out)), progress, given)
    except UsageError as error:
        complain(error)
        return 2
    except Exception as error:
        # Errors of our own readers are user errors too; they are ValueErrors of one line with a name of their own.
        if type(error).__name__ in ("CheckpointError", "TokenizerError"):
            complain(error)
            return 2
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
