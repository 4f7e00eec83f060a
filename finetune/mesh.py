"""How the processes of a run are laid out: `--dp` copies of the model, each spread over `--fsdp` shards, each layer
split `--tp` ways.

>>> mesh_sizes(0, 0, 2, world_size=4)
MeshSizes(dp=2, fsdp=1, tp=2)
>>> mesh_sizes(2, 0, 0, world_size=4)
MeshSizes(dp=2, fsdp=2, tp=1)
"""

from dataclasses import dataclass

from finetune.errors import UserError

DIMENSIONS = ("dp", "fsdp", "tp")  # of the device mesh, the fastest last: ranks that split a layer are neighbours


@dataclass(frozen=True)
class MeshSizes:
    """Processes along each dimension; their product is the number of all."""

    dp: int = 1  # copies that read different rows; gradients are summed over them
    fsdp: int = 1  # shards of weights, gradients and states; each reads rows of its own, too
    tp: int = 1  # parts of each layer; they read the same rows

    @property
    def is_sharded(self) -> bool:
        """Whether no rank holds the whole model; else DistributedDataParallel does it all."""
        return self.fsdp > 1 or self.tp > 1

    def __str__(self) -> str:
        return f"--dp {self.dp} --fsdp {self.fsdp} --tp {self.tp}"


def mesh_sizes(dp: int, fsdp: int, tp: int, *, world_size: int) -> MeshSizes:
    """What is left out (0) is inferred: layers are whole, and the rest of the ranks are copies, or, where --dp says how
    many of these there are, shards.

    Raises UserError when the product is not the number of processes.
    """
    tp, left_out = tp or 1, not dp or not fsdp
    if not dp:
        dp, fsdp = max(1, world_size // (max(fsdp, 1) * tp)), fsdp or 1
    elif not fsdp:
        fsdp = max(1, world_size // (dp * tp))
    sizes, product = MeshSizes(dp, fsdp, tp), dp * fsdp * tp
    if product != world_size:
        inferred = ", one of them inferred" if left_out else ""
        raise UserError(
            f"{sizes}{inferred}, make {product} processes, and there are {world_size}: start "
            f"torchrun --nproc_per_node {product}, or choose sizes whose product is {world_size}"
        )
    return sizes
