"""What started this process: the line that was typed, and what torchrun keeps between its restarts.

    torchrun --nproc_per_node 4 --max-restarts 2 -m finetune.text --data notes/

A process that torchrun starts again continues the run that the first one began: its folder is remembered in torchrun's
own store, which outlives the processes.
"""

import os
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

FOLDER = "finetune/folder"  # key in torchrun's store
TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def to_continue(entry: str, out: str | Path) -> str:
    """The typed line, its launcher included, with what makes it continue the run in `out`."""
    words = typed_words() or ["python", "-m", f"finetune.{entry}"]
    if not any(word.partition("=")[0] == "--out" for word in words):
        words += ["--out", str(out)]
    if not {"--resume", "--resume=true"} & set(words):
        words += ["--resume"]
    return shlex.join(words)


def typed_words() -> list[str]:
    """As the user typed them: torchrun's where it is the parent; empty where that cannot be known."""
    if started_by_torchrun():
        return _launcher_words()
    line = list(sys.orig_argv)
    return ["python", *line[1:]] if "-m" in line else []


def _launcher_words() -> list[str]:
    """Of the parent process, in which torchrun runs, as the kernel tells; else as far as the environment does."""
    try:
        line = [os.fsdecode(w) for w in Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        line = []
    for i, word in enumerate(line):
        if Path(word).name in TORCHRUN:
            return ["torchrun", *line[i + 1 :]]
    if "-m" not in sys.orig_argv:
        return []
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["torchrun", "--nproc_per_node", ranks, *sys.orig_argv[sys.orig_argv.index("-m") :]]


def remember_folder(out: Path) -> None:
    """Tell the processes that torchrun may start in our place which run to continue."""
    if store := _store_of_torchrun():
        store.set(FOLDER, str(out.absolute()))


def folder_of_the_first_start() -> str | None:
    """The run that processes of this launch began before torchrun restarted them; None for the first ones."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    store = _store_of_torchrun()
    return store.get(FOLDER).decode() if store and store.check([FOLDER]) else None


def _store_of_torchrun() -> TCPStore | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
