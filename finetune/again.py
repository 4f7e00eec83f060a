"""The line that continues a run: the one that was typed, with --out and --resume, torchrun's part included.

continue_line("text", Path("out/text-1"))      # torchrun --nproc_per_node 2 -m finetune.text ... --resume
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def continue_line(entry: str, out: Path) -> str:
    """What to type, in the folder where the run was typed."""
    typed = list(sys.argv[1:])
    if not any(arg == "--out" or arg.startswith("--out=") for arg in typed):
        typed += ["--out", str(out)]
    if not any(arg in ("--resume", "--resume=on", "--resume=true") for arg in typed):
        typed.append("--resume")
    return " ".join([launcher(entry, os.environ, _parent_line()), shlex.join(typed)])


def launcher(entry: str, environment: Mapping[str, str], parent: Sequence[str]) -> str:
    """What started this process: python, or torchrun with its own flags. parent: the line of its parent process."""
    module = f"finetune.{entry}"
    if "TORCHELASTIC_RUN_ID" not in environment:
        return f"python -m {module}"
    if module in parent:
        flags = parent[: parent.index(module)]  # the python, torchrun's file (or -m and its module), flags, -m
        names = [i for i, arg in enumerate(flags) if Path(arg).name == "torchrun" or arg == "torch.distributed.run"]
        if names:
            return f"torchrun {shlex.join(flags[names[0] + 1 :])} {module}"
    nodes, each = int(environment.get("GROUP_WORLD_SIZE", "1")), environment.get("LOCAL_WORLD_SIZE", "1")
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc_per_node {each} -m {module}"


def _parent_line() -> list[str]:
    """Of the parent process; nothing where the system does not show it."""
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(arg) for arg in raw.split(b"\0")[:-1]]
