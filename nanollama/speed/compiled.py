"""The decode step of one token a row as functions of the weights: one compiled block serves every layer.

Nothing is repacked or copied (a mapped file stays mapped), and keys and values are written into the cache in place.
`nanollama.speed.package` compiles the two modules here and opens them as a `CompiledStep`.

    flat = BlockArguments(x, positions, cos, sin, keys, values, norms, operands).flatten()
    x = BlockStep(config, rows)(*flat)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanollama.model import KVCache, ModelConfig, Transformer, TransformerBlock, apply_rope
from nanollama.speed.kernels import attend, matvec, norm
from nanollama.speed.quantize import QuantLinear

Loaded = Callable[[list[Tensor]], list[Tensor]]
SLOTS = 64  # the cache is read in multiples of this
LINEARS = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)


class CompileError(ValueError):
    """The step cannot be compiled here; the message says why and that `--compile off` works."""


class BlockArguments(NamedTuple):
    """All that a block reads and writes. Compiled code takes a flat list of tensors."""

    x: Tensor  # (B, C)
    positions: Tensor  # (B,)
    cos: Tensor  # (B, D/2)
    sin: Tensor  # (B, D/2)
    keys: Sequence[Tensor]  # of each row (S, K, D)
    values: Sequence[Tensor]  # of each row (S, K, D)
    norms: Sequence[Tensor]  # attention_norm and ffn_norm, (C,) each
    operands: Sequence[Tensor]  # of the seven linear layers, as many of each

    def flatten(self) -> list[Tensor]:
        shared = [self.x, self.positions, self.cos, self.sin]
        return [*shared, *self.keys, *self.values, *self.norms, *self.operands]

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor], rows: int) -> "BlockArguments":
        x, positions, cos, sin, *rest = flat
        caches, weights = rest[: 2 * rows], rest[2 * rows :]
        return cls(x, positions, cos, sin, caches[:rows], caches[rows:], weights[:2], weights[2:])

    def linears(self) -> list[Sequence[Tensor]]:
        """The operands of each linear layer, in the order of LINEARS."""
        n = len(self.operands) // len(LINEARS)
        return [self.operands[i : i + n] for i in range(0, len(self.operands), n)]


class BlockStep(nn.Module):
    """A `TransformerBlock` for one token of each row, as a function of `BlockArguments`, flat."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.config, self.rows = config, rows

    def forward(self, *flat: Tensor) -> Tensor:
        x, positions, cos, sin, keys, values, norms, _ = given = BlockArguments.unflatten(flat, self.rows)
        wq, wk, wv, wo, w1, w2, w3 = given.linears()
        D, eps = self.config.head_dim, self.config.norm_eps
        h = norm(x, norms[0], eps)
        q, k, v = (matvec(h, w).unflatten(1, (1, -1, D)) for w in (wq, wk, wv))  # (B, 1, heads, D)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, D/2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mixed = []
        for b in range(self.rows):
            at = positions[b : b + 1]
            keys[b][at], values[b][at] = k[b], v[b]
            mixed.append(attend(q[b, 0], keys[b], values[b], at))
        x = x + matvec(torch.stack(mixed).flatten(1), wo)
        h = norm(x, norms[1], eps)
        return x + matvec(F.silu(matvec(h, w1)) * matvec(h, w3), w2)


class HeadStep(nn.Module):
    """The final norm and the head: x (B, C), the norm's weight, the head's operands -> logits (B, V) in x's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps

    def forward(self, x: Tensor, weight: Tensor, *operands: Tensor) -> Tensor:
        return matvec(norm(x, weight, self.eps), operands)


class CompiledStep:
    """A step over compiled blocks: ids (B,), positions (B,), cache -> logits (B, V) float32, B up to `rows`.

    Holds views of the model's weights, no copies.
    """

    def __init__(self, model: Transformer, rows: int, block: Loaded, head: Loaded) -> None:
        self.model, self.rows, self.block, self.head = model, rows, block, head
        self.layers = [layer_weights(layer) for layer in model.layers]
        self.head_weights = head_weights(model)

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        alive, end = ids.shape[0], int(positions.max()) + 1
        if end > cache.max_len:
            raise ValueError(f"position {end - 1} does not fit: the cache holds {cache.max_len} positions")
        cache.length = max(cache.length, end)
        if alive < self.rows:  # fill up with the first row: it writes the same numbers to the same place again
            filler = ids.new_zeros(self.rows - alive)
            ids, positions = torch.cat((ids, ids[filler])), torch.cat((positions, positions[filler]))
        rows, slots = [*range(alive), *[0] * (self.rows - alive)], min(-(-end // SLOTS) * SLOTS, cache.max_len)
        x = self.model.tok_embeddings(ids)  # (B, C)
        cos, sin = self.model._rope_rows(max(end, self.model.first_rows, cache.max_len), ids.device)
        shared = positions, cos[positions], sin[positions]
        for k, v, weights in zip(cache.k, cache.v, self.layers, strict=True):
            caches = [k[row, :slots] for row in rows], [v[row, :slots] for row in rows]
            x = self.block(BlockArguments(x, *shared, *caches, *weights).flatten())[0]
        return self.head([x, *self.head_weights])[0][:alive].float()


def layer_weights(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The norms and operands of `BlockArguments`. Raises CompileError for a layer of an unknown kind."""
    assert isinstance(layer, TransformerBlock)
    norms = [layer.attention_norm.weight.detach(), layer.ffn_norm.weight.detach()]
    return norms, [operand for name in LINEARS for operand in operands_of(layer.get_submodule(name))]


def head_weights(model: Transformer) -> list[Tensor]:
    """What `HeadStep` takes beside x."""
    head = [model.tok_embeddings.weight.detach()] if model.output is None else operands_of(model.output)
    return [model.norm.weight.detach(), *head]


def operands_of(linear: nn.Module) -> list[Tensor]:
    """What `matvec` needs of a linear layer. Raises CompileError for a layer of another kind."""
    if isinstance(linear, QuantLinear):
        return [linear.numbers, linear.scales]
    if type(linear) is nn.Linear:
        return [linear.weight.detach().contiguous()]
    raise CompileError(
        f"a layer is a {type(linear).__name__}, which the compiled step does not know: use --compile off"
    )
