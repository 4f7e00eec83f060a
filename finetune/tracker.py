"""What one rank has in memory at each moment of a training step, and what it sends: torch's MemTracker, which keeps a
ledger of every live storage, with the kinds and moments that a plan needs.

    with FakeTensorMode(), StepTracker() as tracker:
        ...                                  # build, train a step, telling tracker.enter(moment, kind)
    tracker.moments["loss"].total()          # bytes

It is corrected in three places. What DTensor allocates while it works out the shape of a result is none of this rank's
memory: torch 2.13 does that in the fake mode that is active, so AdamW's states of sharded parameters counted whole.
Its kinds know neither the loss nor communication. And its statistics of each module at each operation are left out:
they would take most of the time.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.mem_tracker import MemTracker, _RefType, _UpdateType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COLLECTIVES = {  # of c10d, and the functional ones that DTensor calls -> what both are
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Kind(_RefType):
    """What a storage is for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    STATES = "optimizer states"
    ACTIVATIONS = "activations"  # and what the backward pass makes of them
    LOSS = "loss"
    COMMUNICATION = "communication"  # gathered weights, buffers of collectives


class StepTracker(MemTracker):
    """A dispatch mode, to be entered inside the fake mode.

    moments: bytes by kind at the fullest instant of each moment. sent: bytes that this rank sends, by collective and
    number of ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ref_class = Kind
        self.kind, self.moment = Kind.WEIGHTS, "build"  # of what is allocated now
        self.moments: dict[str, Counter[Kind]] = {}
        self.sent: Counter[tuple[str, int]] = Counter()
        self._shapes_only = False
        self._before = self.kind, self.moment
        self._undo = ExitStack()

    def enter(self, moment: str, kind: Kind) -> None:
        self.moment, self.kind = moment, kind
        self._note_peak()

    def label(self, tensor: Tensor, kind: Kind) -> None:
        """Say what a tensor is for; a DTensor's part of this rank."""
        self._update_and_maybe_create_winfos(tensor, kind)

    def begin_step(self) -> None:
        """Forget the moments and the traffic so far."""
        self.moments.clear()
        self.sent.clear()
        self.enter("start", Kind.ACTIVATIONS)

    # --- The ledger --------------------------------------------------------------------------------------------------

    def __enter__(self) -> "StepTracker":
        self._track_resize()
        self._undo.callback(self._restore_resize)
        self._undo.callback(register_optimizer_step_pre_hook(self._begin_update).remove)
        self._undo.callback(register_optimizer_step_post_hook(self._end_update).remove)
        self._undo.enter_context(self._shapes_apart())
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        TorchDispatchMode.__exit__(self, *args)
        self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again as operations on this rank's part
        kwargs = kwargs or {}
        if self._shapes_only:
            return _run(func, args, kwargs)
        result = _run(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(self.kind, tensor)
        if func in collective_ops and func not in sync_ops:
            self._note_collective(func, args, result)
        self._note_peak()
        return result

    @contextmanager
    def _shapes_apart(self) -> Iterator[None]:
        """See when DTensor runs an operation on whole fake tensors, only to know the shape of its result."""
        plain = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate(propagator: ShardingPropagator, op_schema: Any) -> Any:
            before, self._shapes_only = self._shapes_only, True
            try:
                return plain(propagator, op_schema)
            finally:
                self._shapes_only = before

        ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = plain  # type: ignore[method-assign]

    def _track_resize(self) -> None:
        """A storage that is emptied and filled again holds weights that FSDP gathers."""
        super()._track_resize()
        plain = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            plain(storage, size)
            entry, _ = self._WINFO.get(storage, (None, None))
            if entry is not None and entry.reftype != Kind.COMMUNICATION:
                before, entry.reftype = entry.reftype, Kind.COMMUNICATION
                self._update_snap(_UpdateType.REF, entry, old_reftype=before)

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]

    def _note_collective(self, func: Any, args: Any, result: Any) -> None:
        buffers = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        for buffer in buffers:
            self.label(buffer, Kind.COMMUNICATION)
        ranks = CollectiveOp.get_process_group(func, args).size()
        name = COLLECTIVES.get(func._overloadpacket.__name__, func._overloadpacket.__name__.strip("_"))
        whole = max(buffer.nbytes for buffer in buffers)  # of what is gathered, reduced or scattered
        self.sent[name, ranks] += sent_bytes(name, whole, ranks)

    def _note_peak(self) -> None:
        now = self._curr_mem_snap.get(torch.device("cpu"))
        if now is None:
            return
        most = self.moments.get(self.moment)
        if most is None or now["Total"] > most.total():
            self.moments[self.moment] = Counter({kind: now[kind] for kind in Kind})

    def _begin_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before = self.kind, self.moment
        self.enter("update", Kind.STATES)

    def _end_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.kind, self.moment = self._before


def sent_bytes(collective: str, whole: int, ranks: int) -> int:
    """What a rank sends, in a ring, of `whole` bytes: all but its own part of a gather, of a sum that too, and back."""
    passes = 2 if collective == "all_reduce" else 1
    return passes * whole * (ranks - 1) // ranks


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on fake tensors; those whose result depends on numbers get some."""
    if func is aten.nonzero.default:  # of the labels that count: all of them
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    if func is aten._local_scalar_dense.default:  # a norm, a loss, the number of a step
        return 1.0 if args[0].dtype.is_floating_point else 1
    if func is torch.ops._c10d_functional.wait_tensor.default:
        return args[0]  # as in a real run; its fake is a copy
    if func in BY_MASK:
        args = args[0], _places(args[1]), *args[2:]
    return func(*args, **kwargs)


BY_MASK = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks among the indices as the numbers of all their places: on no rank are more."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
        else:
            found.append(index)
    return found
