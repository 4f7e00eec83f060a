"""The decode step with fixed shapes and without a word to the host, so that a GPU replays it as a CUDA graph.

The model itself asks for the largest position each step, which makes the host wait for the GPU, and its shapes grow
with the answer. Here the cache is read up to a power of two of slots and a mask hides those not yet written: the graph
changes a few times in an answer, and between these times one launch replays hundreds of kernels.

    step = static_step(model)                    # on CUDA compiled with mode="reduce-overhead", elsewhere as it is
    logits = step(ids, positions, cache)         # (B,), (B,) -> (B, V) float32

Nothing here needs CUDA to be right: the tests run it on CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanollama.model import Context, KVCache, Transformer
from nanollama.speed.quantize import apply_head

SMALLEST_SLOTS = 256


def static_step(model: Transformer) -> Callable[[Tensor, Tensor, KVCache], Tensor]:
    """A step as in `nanollama.speed.compiled`, by the model's own modules."""
    forward: Callable[..., Tensor] = _forward
    on_gpu = model.tok_embeddings.weight.device.type == "cuda"
    if on_gpu:
        forward = torch.compile(_forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    known: list[Tensor] = []  # the first layer's keys: other memory means another cache

    def step(ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        if on_gpu and not (known and known[0] is cache.k[0]):
            known[:] = [cache.k[0]]
            for buffer in (*cache.k, *cache.v):
                # Or the compiler would copy the caches into the graph's own memory before each replay.
                torch._dynamo.mark_static_address(buffer)
        # The newest slot is known on the host: each step without a prompt adds one.
        cache.length = min(cache.length + 1, cache.max_len)
        slots = min(1 << (max(cache.length, SMALLEST_SLOTS) - 1).bit_length(), cache.max_len)
        cos, sin = model._rope_rows(max(model.config.max_seq_len, cache.max_len), ids.device)
        # A copy: the graph's next replay writes into the same output.
        return forward(model, ids, positions, cache, cos, sin, slots).clone()

    return step


def _forward(
    model: Transformer, ids: Tensor, positions: Tensor, cache: KVCache, cos: Tensor, sin: Tensor, slots: int
) -> Tensor:
    places = positions.unsqueeze(1)  # (B, 1)
    mask = torch.arange(slots, device=ids.device) <= places.unsqueeze(2)  # (B, 1, S)
    ctx = Context(cos[places], sin[places], mask, places, cache, slots)
    h = model.tok_embeddings(ids.unsqueeze(1))  # (B, 1, C)
    for layer in model.layers:
        h = layer(h, ctx)
    return apply_head(model, model.norm(h)[:, -1])
