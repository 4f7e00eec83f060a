"""Whole tensors of a sharded run, one at a time.

A rank that asks for a whole tensor needs all others to take part. So while the main rank writes a file, the others
serve: they are told the tensor's number, gather it with the main rank, and wait for the next. Nobody holds more than
one whole tensor, and the order in which the writer reads does not matter.

    with gathering(tensors, world) as whole:         # tensors: {name: tensor}, the same names on every rank
        if whole is not None:                        # on the main rank alone
            write(folder, {name: whole(tensor) for name, tensor in tensors.items()})
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune.parallelize import World

Whole = Callable[[Tensor], Tensor]  # a tensor of this rank -> all of it, plain
DONE = -1


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, plain, on every rank, which all have to ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathering(tensors: Mapping[str, Tensor], world: World) -> Iterator[Whole | None]:
    """On the main rank, a function that gives each of `tensors` whole; elsewhere None, when the main rank is done."""
    if world.mesh is None:
        yield (lambda tensor: tensor.detach()) if world.is_main else None
        return
    listed = list(tensors.values())
    if not world.is_main:
        _serve(listed, world)
        yield None
        return
    numbers = {id(tensor): number for number, tensor in enumerate(listed)}
    kept: dict[int, Tensor] = {}  # the newest: writers read a tensor in blocks of rows

    def whole(tensor: Tensor) -> Tensor:
        number = numbers[id(tensor)]
        if number not in kept:
            kept.clear()
            _say(number, world)
            kept[number] = full(tensor)
        return kept[number]

    try:
        yield whole
    finally:
        _say(DONE, world)  # also when a disk is full: nobody waits for ever


def _serve(tensors: list[Tensor], world: World) -> None:
    while (number := _say(DONE, world)) != DONE:
        full(tensors[number])


def _say(number: int, world: World) -> int:
    """The main rank's number, on every rank."""
    box = torch.tensor(number, device=world.device)
    dist.broadcast(box, src=0)
    return int(box)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, on the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
