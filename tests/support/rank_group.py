"""Processes that are ranks of one group: started once, they run several cases, which costs a start only once."""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["finetune.run", "torch.distributed.tensor.parallel", "torch.distributed.fsdp"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    size: int, work: Callable[[Path], dict[str, Any]], folder: Path, limit_s: int = 300
) -> list[dict[str, Any]]:
    """What `work(folder)` returns on each of `size` ranks of a gloo group, warnings being errors."""
    context, port = torch.multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(PRELOADED)
    ranks = [context.Process(target=_rank, args=(rank, size, port, work, folder)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(limit_s)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * size, f"exit codes of the ranks: {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, port: int, work: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(work(folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
