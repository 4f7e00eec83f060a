"""More right ways to write a Llama, as outsiders write it: layouts, caches, orders of sums, roundings in other places.

    python -m parity.check --candidate tests/ports/held_out_right.py:paged_cache

Each is a change of the port in held_out.py, which its methods allow.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ports.held_out import Port, loader

PAGE = 16  # positions a page
PAD = 64  # texts are padded to a multiple of it


class Cached(Port):
    """With a cache: a list of the chunks that came. `start`: how many positions it holds."""

    start, caching = 0, False

    def prefill(self, tokens: Tensor) -> Tensor:
        self.start = 0
        self.clear()
        return self.extend(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens)

    def extend(self, tokens: Tensor) -> Tensor:
        self.caching = True
        try:
            logits = self.run(tokens)["logits"]
        finally:
            self.caching = False
        self.start += tokens.shape[1]
        return logits

    def clear(self) -> None:
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.cfg.n_layers)]

    def keep(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(B, T, K, D) -> (B, S, K, D): what was there, and these."""
        self.kept[layer].append((k, v))
        keys, values = zip(*self.kept[layer], strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def before(self) -> int:
        return self.start if self.caching else 0

    def positions(self, length: int) -> Tensor:
        return torch.arange(length) + self.before()

    def seen(self, length: int, layer: int) -> Tensor:
        at = torch.arange(self.before() + length)
        return at <= at[self.before() :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self.caching:
            k, v = self.keep(k, v, layer)
        return super().attend(q, k, v, layer)


class HeadMajorCache(Cached):
    """(B, K, capacity, D), allocated once and written in place, doubled when it is full."""

    def clear(self) -> None:
        self.slabs: list[Tensor | None] = [None] * self.cfg.n_layers

    def keep(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        both, end = torch.stack((k, v)).transpose(2, 3), self.start + k.shape[1]  # (2, B, K, T, D)
        slab = self.slabs[layer]
        if slab is None or slab.shape[3] < end:
            larger = torch.full((*both.shape[:3], 2 * end, both.shape[4]), math.nan, dtype=k.dtype)
            if slab is not None:
                larger[:, :, :, : self.start] = slab[:, :, :, : self.start]
            self.slabs[layer] = slab = larger
        slab[:, :, :, self.start : end] = both
        keys, values = slab[:, :, :, :end].transpose(2, 3)
        return keys, values


class PagedCache(Cached):
    """Pages of PAGE positions in a pool, handed out from its end, found by a table."""

    def clear(self) -> None:
        self.pools: dict[int, Tensor] = {}
        self.table_of_pages: dict[int, list[int]] = {i: [] for i in range(self.cfg.n_layers)}

    def keep(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        pool = self.pools.setdefault(layer, torch.full((2, 64, PAGE, *k.shape[2:]), math.nan, dtype=k.dtype))
        pages = self.table_of_pages[layer]
        for t in range(k.shape[1]):
            page, slot = divmod(self.start + t, PAGE)
            if page == len(pages):
                pages.append(63 - page)
            pool[:, pages[page], slot] = torch.stack((k[0, t], v[0, t]))
        keys, values = pool[:, pages].flatten(1, 2)[:, None, : self.start + k.shape[1]]
        return keys, values


class WideCache(Cached):
    """Keys and values in float32 whatever the dtype."""

    def keep(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = super().keep(k.float(), v.float(), layer)
        return keys.to(k.dtype), values.to(v.dtype)


class Packed(Cached):
    """Documents in one row; positions restart."""

    documents: Tensor | None = None

    def packed(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        self.documents = doc_ids[0]
        try:
            return self.run(tokens)["logits"]
        finally:
            self.documents = None

    def positions(self, length: int) -> Tensor:
        at = super().positions(length)
        if self.documents is None:
            return at
        first = torch.cat((torch.tensor([True]), self.documents[1:] != self.documents[:-1]))
        return at - torch.where(first, at, 0).cummax(0).values

    def seen(self, length: int, layer: int) -> Tensor:
        found = super().seen(length, layer)
        return found if self.documents is None else found & (self.documents[:, None] == self.documents)


class PackedRunsOn(Packed):
    """Documents in one row; positions run on, which RoPE does not mind."""

    def positions(self, length: int) -> Tensor:
        return Cached.positions(self, length)


class PaddedRight(Port):
    """Texts are padded to a multiple of PAD and cut again."""

    def run(self, tokens: Tensor) -> dict[str, Tensor]:
        length = tokens.shape[1]
        found = super().run(F.pad(tokens, (0, -length % PAD)))
        return {name: x[:, :length] for name, x in found.items()}


class PaddedLeft(Port):
    """Padded on the left, as batches are: the padding is out of sight, and positions begin behind it."""

    pad = 0

    def run(self, tokens: Tensor) -> dict[str, Tensor]:
        self.pad = -tokens.shape[1] % PAD
        found = super().run(F.pad(tokens, (self.pad, 0)))
        return {name: x[:, self.pad :] for name, x in found.items()}

    def positions(self, length: int) -> Tensor:
        return (torch.arange(length) - self.pad).clamp_min(0)

    def seen(self, length: int, layer: int) -> Tensor:
        at = torch.arange(length)
        return (at <= at[:, None]) & ((at >= self.pad) | (at == at[:, None]))


class TransposedWeights(Port):
    """Weights as (inputs, outputs), as JAX and GPT-2 keep them."""

    def __init__(self, checkpoint: str, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, dtype)
        self.turned = {name: w.T.contiguous() for name, w in self.w.items() if w.dim() == 2}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.turned[name]


class KeysFirst(Port):
    """Scores as (keys, queries), softmax over the first of them, a mask of the lowest number that is finite."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (x.repeat_interleave(self.cfg.n_heads // self.cfg.n_kv_heads, 2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", k.float(), q.float()) * self.cfg.head_dim**-0.5
        hidden = ~self.seen(q.shape[1], layer).T
        weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-2)
        return torch.einsum("bhst,bshd->bthd", weights.to(v.dtype), v)


class KeyByKey(Port):
    """Online softmax, a key at a time, from the last to the first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v, queries = k[:, :, self.groups()].float(), v[:, :, self.groups()].float(), q.float()
        seen = self.seen(q.shape[1], layer)
        top = torch.full(q.shape[:3], -1e30)
        total, out = torch.zeros(q.shape[:3]), torch.zeros(q.shape)
        for s in reversed(range(k.shape[1])):
            score = (queries * k[:, s : s + 1]).sum(-1) / math.sqrt(self.cfg.head_dim)
            score = torch.where(seen[:, s, None], score, -math.inf)
            larger = torch.maximum(top, score)
            shrink, weight = (top - larger).exp(), (score - larger).exp()
            total, top = total * shrink + weight, larger
            out = out * shrink[..., None] + weight[..., None] * v[:, s : s + 1]
        return (out / total[..., None]).to(q.dtype)


class BySoftmax(Port):
    """Attention by another softmax, which `weights` says, in float32."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = k[:, :, self.groups()], v[:, :, self.groups()]
        scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) / math.sqrt(self.cfg.head_dim)
        weights = self.weights(scores.masked_fill(~self.seen(q.shape[1], layer), -math.inf))
        return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)

    def weights(self, scores: Tensor) -> Tensor:
        return (scores - scores.logsumexp(-1, keepdim=True)).exp()


class Base2(BySoftmax):
    def weights(self, scores: Tensor) -> Tensor:
        powers = torch.exp2((scores - scores.amax(-1, keepdim=True)) * math.log2(math.e))
        return powers / powers.sum(-1, keepdim=True)


class DividesLast(Port):
    """Numerators meet the values, and the sum divides what comes out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = k[:, :, self.groups()].float(), v[:, :, self.groups()].float()
        scores = torch.einsum("bthd,bshd->bhts", q.float(), k) / math.sqrt(self.cfg.head_dim)
        scores = scores.masked_fill(~self.seen(q.shape[1], layer), -math.inf)
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        out = torch.einsum("bhts,bshd->bthd", powers, v) / powers.sum(-1).transpose(1, 2)[..., None]
        return out.to(q.dtype)


class Sdpa(Port):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class QueryBlocks(Port):
    """Eleven queries at a time, each with the keys that they see alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = k[:, :, self.groups()], v[:, :, self.groups()]
        seen, parts = self.seen(q.shape[1], layer), []
        for start in range(0, q.shape[1], 11):
            end = min(start + 11, q.shape[1])
            scores = torch.einsum("bthd,bshd->bhts", q[:, start:end], k[:, :end]).float()
            scores = (scores / math.sqrt(self.cfg.head_dim)).masked_fill(~seen[start:end, :end], -math.inf)
            parts.append(torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v[:, :end]))
        return torch.cat(parts, 1)


class NewtonRoot(Port):
    """A reciprocal root of 8 bits, twice mended by a Newton step."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        square = x.float().square().mean(-1, keepdim=True) + self.eps(name)
        y = torch.rsqrt(square).bfloat16().float()
        for _ in range(2):
            y = y * (1.5 - 0.5 * square * y * y)
        return (x.float() * y).to(self.dtype) * self.w[name]


class RunningMean(Port):
    """The mean of squares as a running mean of blocks, as Welford's."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, count = torch.zeros(*x.shape[:-1], 1), 0
        for block in x.float().split(24, -1):
            count += block.shape[-1]
            mean = mean + (block.square() - mean).sum(-1, keepdim=True) / count
        return (x.float() * torch.rsqrt(mean + self.eps(name))).to(self.dtype) * self.w[name]


class NormLater(Port):
    """The norm's weight is multiplied in float32, before the downcast, as Gemma does."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        x64 = x.double()
        scale = 1 / (x64.square().mean(-1, keepdim=True) + self.eps(name)).sqrt()
        return (x64 * scale * self.w[name].double()).to(self.dtype)


class TwoParts(Port):
    """Inner dimensions in two parts, each sum rounded to the dtype, as two ranks of tensor parallelism add them."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        if not name.endswith(("wo", "w2")):
            return super().linear(x, name)
        half = x.shape[-1] // 2
        return F.linear(x[..., :half], self.w[name][:, :half]) + F.linear(x[..., half:], self.w[name][:, half:])


class Backwards(Port):
    """Sums from the last feature to the first."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.flip(-1), self.w[name].flip(-1))


class ShardedHead(Port):
    """The vocabulary in three slices."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        if name != "output":
            return super().linear(x, name)
        return torch.cat([F.linear(x, part) for part in self.w[name].chunk(3)], -1)


class WideHead(Port):
    """Logits from float32 products."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.float(), self.w[name].float()) if name == "output" else super().linear(x, name)


class OneHot(Port):
    def embed(self, tokens: Tensor) -> Tensor:
        return F.one_hot(tokens, self.cfg.vocab_size).to(self.dtype) @ self.w["tok_embeddings"]


class ByTanh(Port):
    """SiLU by tanh, in float32, multiplied there."""

    def activate(self, gate: Tensor) -> Tensor:
        g = gate.float()
        return g * 0.5 * (1 + torch.tanh(g / 2))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return super().linear(x.to(self.dtype), name)


class Complex128(Port):
    """Rotations by complex numbers of double precision."""

    def rotate(self, x: Tensor) -> Tensor:
        half = torch.arange(0, self.cfg.head_dim, 2).double() / self.cfg.head_dim
        angles = torch.outer(self.positions(x.shape[1]).double(), self.scaled(self.cfg.rope_theta**-half))
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class ByHalves(Port):
    """Features in halves as Hugging Face's files have them, and put back."""

    def rotate(self, x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).float()
        cos, sin = (torch.cat((t, t), -1)[:, None] for t in self.table(x.shape[1]))
        a, b = halves.chunk(2, -1)
        turned = halves * cos + torch.cat((-b, a), -1) * sin
        return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2).to(x.dtype)


class Exp2Pow(Port):
    """A power as 2 ** (x log2 theta), the way of a pow without a double inside."""

    def frequencies(self) -> Tensor:
        half = torch.arange(0, self.cfg.head_dim, 2).double() / self.cfg.head_dim
        whole = (half * math.log2(self.cfg.rope_theta)).floor()
        rest = (half * math.log2(self.cfg.rope_theta) - whole).float()
        return self.scaled(torch.exp2(-rest) * torch.exp2(-whole.float()))


class AddedAngles(Port):
    """cos and sin of a position from those of the coarse and the fine part of it."""

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        at, f = self.positions(length), self.frequencies().double()
        fine, coarse = torch.outer((at % 32).double(), f), torch.outer((at // 32 * 32).double(), f)
        cos = coarse.cos() * fine.cos() - coarse.sin() * fine.sin()
        return cos.float(), (coarse.sin() * fine.cos() + coarse.cos() * fine.sin()).float()


KINDS: Sequence[type[Port]] = (
    Cached, HeadMajorCache, PagedCache, WideCache, Packed, PackedRunsOn, PaddedRight, PaddedLeft, TransposedWeights,
    KeysFirst, KeyByKey, BySoftmax, Base2, DividesLast, Sdpa, QueryBlocks, NewtonRoot, RunningMean, NormLater, TwoParts,
    Backwards, ShardedHead, WideHead, OneHot, ByTanh, Complex128, ByHalves, Exp2Pow, AddedAngles,
)  # fmt: skip


def snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


RIGHT: dict[str, type[Port]] = {snake(kind.__name__): kind for kind in KINDS}
RIGHT["log_sum_exp"] = RIGHT.pop("by_softmax")
LOADERS: dict[str, Any] = {name: loader(kind) for name, kind in RIGHT.items()}
globals().update(LOADERS)
