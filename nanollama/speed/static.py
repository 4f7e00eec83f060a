"""The decode step with fixed shapes and without a word to the host, so that a GPU replays it as a CUDA graph.

The model itself asks for the largest position each step, which makes the host wait for the GPU, and its shapes grow
with the answer. Here the cache is read up to a round number of slots and a mask hides those not yet written: the graph
changes a few times in an answer, and between these times one launch replays hundreds of kernels.

    step = StaticStep(model)                     # on CUDA a graph of the model's own kernels, elsewhere as it is
    step = StaticStep(model, compile=True)       # one row through the compiled blocks of nanollama.speed.compiled
    logits = step(ids, positions, cache)         # (B,), (B,) -> (B, V) float32

Nothing here needs CUDA to be right: the tests run it on CPU.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanollama.model import Context, KVCache, Transformer
from nanollama.speed.compiled import BlockArguments, BlockStep, CompileError, HeadStep, head_weights, layer_weights

SMALLEST_SLOTS, LARGE_SLOTS = 256, 1024  # a power of two between them, beyond the second its multiples
WARM_UP_STEPS = 2  # before a capture: libraries take their workspaces, the compiler compiles
SHAPES_COMPILED = 64  # of one block in one process; torch gives up after 8
Forward = Callable[[Tensor, Tensor, KVCache, int], Tensor]  # ids (B,), positions (B,), cache, slots -> logits (B, V)


class StaticStep:
    """A step as in `nanollama.speed.compiled`. compile: raises CompileError for a layer of an unknown kind."""

    def __init__(self, model: Transformer, *, compile: bool = False) -> None:
        self.model, self.rows_forward = model, partial(forward_rows, model)
        self.row_forward: Forward = compiled_row(model) if compile else self.rows_forward
        self.graphs: dict[int, Graph] = {}  # by slots
        self.memory: tuple[int, ...] = ()  # that the graphs read and write

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        # The newest slot is known on the host: each step without a prompt adds one.
        cache.length = min(cache.length + 1, cache.max_len)
        slots = min(round_slots(cache.length), cache.max_len)
        forward = self.row_forward if len(ids) == 1 else self.rows_forward
        table = self.model._rope_rows(max(self.model.first_rows, cache.max_len), ids.device)
        if not ids.is_cuda:
            return forward(ids, positions, cache, slots)
        memory = addresses([*table, self.model.tok_embeddings.weight, cache.rows, *cache.k, *cache.v]) + (len(ids),)
        if memory != self.memory:
            self.graphs, self.memory = {}, memory
        if slots not in self.graphs:
            self.graphs[slots] = Graph(lambda i, p: forward(i, p, cache, slots), ids, positions)
        return self.graphs[slots](ids, positions)


def round_slots(n: int) -> int:
    """The slots that are read when n are in use."""
    if n > LARGE_SLOTS:
        return -(-n // LARGE_SLOTS) * LARGE_SLOTS
    return 1 << (max(n, SMALLEST_SLOTS) - 1).bit_length()


def addresses(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


class Graph:
    """A captured forward pass. The passes before the capture write the same numbers to the same slots as its replay."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], ids: Tensor, positions: Tensor) -> None:
        self.ids, self.positions = ids.clone(), positions.clone()
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(ids.device)
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                forward(self.ids, self.positions)
        torch.cuda.current_stream(ids.device).wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.logits = forward(self.ids, self.positions)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits.clone()  # the next replay writes into the same output


def forward_rows(model: Transformer, ids: Tensor, positions: Tensor, cache: KVCache, slots: int) -> Tensor:
    """Any number of rows by the model's own modules."""
    places = positions.unsqueeze(1)  # (B, 1)
    mask = torch.arange(slots, device=ids.device) <= places.unsqueeze(2)  # (B, 1, S)
    cos, sin = model._rope_rows(1, ids.device)
    ctx = Context(cos[places], sin[places], mask, places, cache, slots)
    h = model.tok_embeddings(ids.unsqueeze(1))  # (B, 1, C)
    for layer in model.layers:
        h = layer(h, ctx)
    return model.logits(model.norm(h)[:, -1])


def compiled_row(model: Transformer) -> Forward:
    """One row by the blocks of `nanollama.speed.compiled`: each matrix is read once, as it is stored."""
    layers, for_head = [layer_weights(layer) for layer in model.layers], head_weights(model)
    block: Callable[..., Tensor] = BlockStep(model.config, 1)
    head: Callable[..., Tensor] = HeadStep(model.config)
    on_gpu = model.tok_embeddings.weight.is_cuda
    if on_gpu:
        block, head = torch.compile(block, fullgraph=True), torch.compile(head, fullgraph=True)

    def forward(ids: Tensor, positions: Tensor, cache: KVCache, slots: int) -> Tensor:
        cos, sin = model._rope_rows(1, ids.device)
        shared = positions, cos[positions], sin[positions]
        x = model.tok_embeddings(ids)  # (1, C)
        for keys, values, weights in zip(cache.k, cache.v, layers, strict=True):
            caches = [keys[0, :slots]], [values[0, :slots]]
            x = block(*BlockArguments(x, *shared, *caches, *weights).flatten())
        return head(x, *for_head).float()

    return compiling(forward) if on_gpu else forward


def compiling(forward: Forward) -> Forward:
    """What torch's compiler cannot do, or the lack of one that it needs, is a CompileError."""

    def run(ids: Tensor, positions: Tensor, cache: KVCache, slots: int) -> Tensor:
        try:
            with torch._dynamo.config.patch(recompile_limit=SHAPES_COMPILED):
                return forward(ids, positions, cache, slots)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise CompileError(f"the decode step cannot be compiled here ({reason}): use --compile off") from error

    return run
