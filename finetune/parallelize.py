"""The processes of a run and how they meet: one a rank, started by torchrun, in a mesh of copies, shards and parts of
layers (finetune/mesh.py). Gradients are summed over the ranks that read different rows, not averaged, since each rank
divides its loss by the number of valid tokens on all of them.

    torchrun --nproc_per_node 2 -m finetune.tinystories --init 15M
    torchrun --nproc_per_node 4 -m finetune.tinystories --init 110M --fsdp 2 --tp 2
"""

import faulthandler
import itertools
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from finetune.errors import UserError
from finetune.mesh import DIMENSIONS, MeshSizes
from finetune.peers import Peers, meet, wait_for

T = TypeVar("T")
LEFT_OVER = (
    "torchrun sets it for its processes; unset it (a shell or a job script has left it there), or start torchrun"
)
MISSING = "is not in the environment, though WORLD_SIZE is: start torchrun, which sets both, or unset WORLD_SIZE"


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    size: int = 1
    sizes: MeshSizes = field(default_factory=MeshSizes)
    mesh: DeviceMesh | None = None  # where the model is sharded
    store: dist.Store | None = None  # where there are peers
    peers: Peers | None = None
    calls: Iterator[int] = field(default_factory=itertools.count)  # of from_main

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Among the ranks that read different rows; those that split a layer among them share one."""
        return self.rank // self.sizes.tp

    @property
    def data_size(self) -> int:
        return self.size // self.sizes.tp

    def sum(self, values: list[float] | Tensor) -> Tensor:
        """Element by element over the ranks that read different rows, in float64 for a list (counts stay exact)."""
        total = torch.tensor(values, dtype=torch.float64) if isinstance(values, list) else values.clone()
        total = total.to(self.device) if self.device.type == "cuda" else total
        if self.size > 1:
            for group in self._data_groups():
                dist.all_reduce(total, group=group)
        return total

    def _data_groups(self) -> list[dist.ProcessGroup | None]:
        """Groups over which a sum, one after the other, is one over all ranks that read different rows."""
        if self.mesh is None:
            return [None]
        return [self.mesh.get_group(name) for name in ("dp", "fsdp") if getattr(self.sizes, name) > 1]

    def max(self, value: int) -> int:
        """The largest over all ranks."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on every rank; they wait for as long as it takes, and it lives."""
        if self.store is None:
            return make()
        key = f"from_main/{next(self.calls)}"
        if self.is_main:
            made = make()
            self.store.set(key, pickle.dumps(made))  # type: ignore[arg-type]  # its stub knows text alone
            return made
        wait_for(self.store, key)
        return pickle.loads(self.store.get(key))

    def wait_for_main(self) -> None:
        """Until the main rank comes here, however long what it does alone takes."""
        self.from_main(lambda: None)

    def guard(self, act: Callable[[], int]) -> int:
        """`act()`, an exit code; when a rank dies or hangs meanwhile, every process ends, with a line that names it."""
        return self.peers.guard(act) if self.peers else act()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def world_size() -> int:
    """Of the processes that torchrun started, before they have met."""
    size = _of_launcher("WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size} in the environment: {LEFT_OVER}")
    return size


def _of_launcher(name: str, default: int | None = None) -> int:
    """A number that torchrun hands on; None: it has to. Raises UserError for what a shell has left of another."""
    said = os.environ.get(name, "" if default is None else str(default))
    if not said.isascii() or not said.isdigit() or len(said) > 9:
        raise UserError(f"{name}={said[:40]} in the environment: {LEFT_OVER}" if said else f"{name} {MISSING}")
    return int(said)


def open_world(device: str, sizes: MeshSizes | None = None, limit_s: float = 600, *, watched: bool = True) -> World:
    """Join the ranks that torchrun started, if it did. sizes: the mesh; None: each a copy of the model.

    limit_s: how long a rank waits for the others in one collective. watched: a rank that dies ends the others.
    Raises UserError for a device that is not there.
    """
    name = device.partition(":")[0]
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is there: use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: it is not there: use --device cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: expected cpu, cuda or mps")
    size = world_size()
    if size == 1:
        return World(torch.device(device))
    rank, local = _of_launcher("RANK"), _of_launcher("LOCAL_RANK", 0)
    if rank >= size:
        raise UserError(f"RANK={rank} of {size} in the environment: {LEFT_OVER}")
    if name == "cuda":
        torch.cuda.set_device(local)
        record_flights()
    faulthandler.enable()  # NCCL's watchdog aborts a process whose collective takes too long: say where it was
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(f"{missing[0]} {MISSING}")
    _of_launcher("MASTER_PORT")
    store = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=max(limit_s, 60)))))[0]
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{size}"  # torchrun's store outlives the processes
    ours = dist.PrefixStore(f"finetune/{attempt}", store)
    local_rank, host = _of_launcher("LOCAL_RANK", rank), os.environ["MASTER_ADDR"]
    peers = meet(ours, rank, size, local_rank, host, limit_s) if watched else None
    dist.init_process_group(
        "nccl" if name == "cuda" else "gloo",
        store=dist.PrefixStore(f"group/{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=limit_s),
    )
    on = f"cuda:{local}" if name == "cuda" else name
    return replace(make_world(on, rank, sizes or MeshSizes(dp=size)), store=ours, peers=peers)


def make_world(device: str, rank: int, sizes: MeshSizes) -> World:
    """Of a rank that has met the others."""
    mesh = None
    if sizes.is_sharded:
        # It advises to merge two small reductions into one, once for each kind, on every rank.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        shape = (sizes.dp, sizes.fsdp, sizes.tp)
        mesh = init_device_mesh(device.partition(":")[0], shape, mesh_dim_names=DIMENSIONS)
    return World(torch.device(device), rank, dist.get_world_size(), sizes, mesh)


def record_flights() -> None:
    """Let NCCL's watchdog write down the last collectives of every rank when one takes too long, unless told else."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def _sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook without its division by the number of ranks."""
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


def replicate(module: nn.Module, world: World) -> nn.Module:
    """`module` with its gradients summed over all ranks in the backward pass; itself on one rank, or sharded."""
    if world.size == 1 or world.mesh:
        return module
    replica = DistributedDataParallel(module)
    replica.register_comm_hook(None, _sum_gradients)
    return replica


def no_sync(module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Gradients of all but the last micro-batch stay on their rank."""
    if isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()
