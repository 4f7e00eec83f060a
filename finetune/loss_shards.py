"""The loss over a vocabulary that is cut by rows among the ranks of a group: no rank has the logits of all tokens, or
the gradients of other rows. The chunks, and what is done in each, are those of finetune/loss.py.

    LossModel(model, sharded_cross_entropy)     # where model.head() is a DTensor
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from finetune.loss import LinearCrossEntropy, chunk_tokens
from nanollama.tensor_parallel import part_of


def sharded_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """`linear_cross_entropy` with a head whose rows are shared out; hidden and labels are whole, and so is the loss."""
    assert isinstance(head, DTensor)
    rows, mesh = part_of(head)[0], head.device_mesh
    most = -(-head.shape[0] // mesh.size())  # rows of any rank
    vocabulary = VocabularyShard(rows.start, rows.stop - rows.start, most, mesh.get_group())
    return LinearCrossEntropy.apply(hidden, head.to_local(grad_placements=[Shard(0)]), labels, vocabulary)


@dataclass(frozen=True)
class VocabularyShard:
    """Rows start..start + rows of the head; the other ranks of the group have the others."""

    start: int
    rows: int
    most: int  # rows that a rank has at most: all take equal chunks, since they wait for each other
    group: dist.ProcessGroup

    def chunk_tokens(self, head: Tensor) -> int:
        return chunk_tokens(head, self.most)

    def dtype_of_rows(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)  # summed over ranks before it is rounded

    def own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        ids = labels - self.start
        here = (ids >= 0) & (ids < self.rows)
        return here, ids[here]

    def join(self, largest: Tensor, sums: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        top = largest.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        share = (largest - top).exp()  # what this rank's powers count beside those of the rank with the largest logit
        sums_and_picked = torch.stack((sums * share, picked.to(sums.dtype)))  # (2, n, 1)
        dist.all_reduce(sums_and_picked, group=self.group)
        sums, picked = sums_and_picked
        return sums / share, sums.log() + top - picked  # no share at all: divided by infinity

    def sum_(self, grad_rows: Tensor) -> Tensor:
        dist.all_reduce(grad_rows, group=self.group)
        return grad_rows
