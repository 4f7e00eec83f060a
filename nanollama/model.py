"""Llama 2, 3, 3.1, 3.2 and 3.3 in one file that needs only torch: copy it anywhere.

Features: RoPE with the Llama 3.1 wavelength scaling, grouped-query attention, SwiGLU, RMSNorm with fp32 statistics,
tied or untied head, a KV cache that exists only when asked for, per-row positions, a document mask for packed rows.
Everything about the architecture comes from `ModelConfig`; weights carry Meta's names.

Shape legend: B batch, T query tokens, S key slots, C model dim, H query heads, K key/value heads, D head dim, V vocab.

    python nanollama/model.py      # builds a toy model and prints: logits (1, 5, 97) cached == full: True

Sources: RoFormer (arXiv 2104.09864) for RoPE, GQA (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467), The Llama 3
Herd of Models (2407.21783); where a rounding choice is open, Meta's `llama_models.llama3.model` decides.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_ROWS = 1 << 17  # positions of the first RoPE table, the longest published context: 64 MB at a head dim of 128


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the long RoPE wavelengths (`apply_scaling` in Meta's code, `rope_type: llama3` at HF)."""

    factor: float = 8.0  # 32 in Llama 3.2 1B and 3B
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # tokens, before the stretch


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one checkpoint. Raises ValueError when the numbers cannot make a model."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    hidden_dim: int  # of the SwiGLU feed-forward
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # one matrix is both embedding and output head
    head_dim: int = 0  # 0: dim // n_heads
    max_seq_len: int = 8192  # tokens; the context that the checkpoint was made for

    def __post_init__(self) -> None:
        if not self.head_dim and self.n_heads > 0:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "head_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs of features")


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse wavelengths (radians per position), float32 on CPU, (D/2,), with the 3.1 scaling where configured."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freqs = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return freqs
    scaling = config.rope_scaling
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelen = 2 * torch.pi / freqs
    # Short wavelengths stay, long ones are stretched by the factor, between them the two are mixed linearly.
    smooth = (scaling.original_context / wavelen - low) / (high - low)
    mixed = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    stretched = torch.where(wavelen > scaling.original_context / low, freqs / scaling.factor, freqs)
    between = (wavelen >= scaling.original_context / high) & (wavelen <= scaling.original_context / low)
    return torch.where(between, mixed, stretched)


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, float32 whatever the model's dtype: positions (N,) -> two of (N, D/2).

    `torch.polar` rounds differently from `cos` and `sin`; Meta uses it, so bitwise equality needs it.
    """
    angles = torch.outer(positions.to("cpu", torch.float32), rope_frequencies(config))  # (N, D/2)
    table = torch.polar(torch.ones_like(angles), angles)
    return table.real.contiguous(), table.imag.contiguous()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs (2i, 2i+1) in fp32: x (B, T, heads, D); cos, sin (B or 1, T, D/2) -> like x.

    As a complex product, which is what Meta does: written with real numbers it rounds otherwise at some head dims.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, T, heads, D/2, 2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (B or 1, T, 1, D/2)
    if torch.compiler.is_compiling():  # torch.compile has no complex kernels
        even, odd = pairs.unbind(-1)  # (B, T, heads, D/2) each
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)  # (B, T, heads, D/2, 2)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))  # (B, T, heads, D/2, 2)
    return rotated.flatten(-2).type_as(x)  # (B, T, heads, D)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Give each of the H query heads its key/value head, blockwise: (B, S, K, D) -> (B, S, H, D)."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def causal_mask(n: int, device: torch.device) -> Tensor:
    """True where a query may look: (1, n, n)."""
    return torch.ones(1, n, n, dtype=torch.bool, device=device).tril()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Meta's operations in Meta's order, so that logits can be compared bit by bit.

    q (B, T, H, D); k, v (B, S, K, D); mask (B or 1, T, S) True where allowed, None: causal if T > 1 -> (B, T, H, D).
    """
    n_rep = q.shape[2] // k.shape[2]
    if mask is None and q.shape[1] > 1:
        mask = causal_mask(q.shape[1], q.device)
    q = q.transpose(1, 2)  # (B, H, T, D)
    k = repeat_kv(k, n_rep).transpose(1, 2)  # (B, H, S, D)
    v = repeat_kv(v, n_rep).transpose(1, 2)  # (B, H, S, D)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    probs = F.softmax(scores.float(), dim=-1).type_as(q)
    return torch.matmul(probs, v).transpose(1, 2)  # (B, T, H, D)


def fast_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same through torch's fused scaled-dot-product attention; arguments as in `exact_attention`."""
    n_rep = q.shape[2] // k.shape[2]
    if q.is_cuda and n_rep > 1 and (mask is not None or q.dtype == torch.float32):
        # CUDA's kernel for masks and for fp32 shares no heads: torch would hold all scores instead.
        if q.shape[1] == 1:
            return one_query_attention(q, k, v, mask)
        k, v = repeat_kv(k, n_rep), repeat_kv(v, n_rep)  # (B, S, H, D)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        is_causal=mask is None and q.shape[1] > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)  # (B, T, H, D)


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`fast_attention` of T = 1 without a copy of k and v: the query heads that share a head are its queries."""
    out = F.scaled_dot_product_attention(
        q.squeeze(1).unflatten(1, (k.shape[2], -1)),  # (B, K, H/K, D)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
    )
    return out.flatten(1, 2).unsqueeze(1)  # (B, 1, H, D)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "exact": exact_attention,
    "fast": fast_attention,
}


class KVCache:
    """Keys and values of the tokens seen, one buffer per layer: slot s of a row holds that row's position s.

    `length` counts the slots filled by calls without explicit positions. A row whose prompt is padded on the right
    may overwrite its padding later: no query looks at a slot beyond its own position.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (batch_size, max_len, config.n_kv_heads, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]  # (B, S, K, D) each
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.rows = torch.arange(batch_size, device=device).unsqueeze(1)  # (B, 1)
        self.max_len = max_len
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) at `positions` (B, T); return the first `end` slots, (B, end, K, D) each."""
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            buffer[self.rows, positions] = new
        return self.k[layer][:, :end], self.v[layer][:, :end]


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    cos: Tensor  # (B or 1, T, D/2)
    sin: Tensor  # (B or 1, T, D/2)
    mask: Tensor | None  # (B or 1, T, S), True where allowed; None: plain causal
    positions: Tensor  # (B or 1, T)
    cache: KVCache | None = None
    end: int = 0  # slots of the cache in use, this pass included


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Statistics in fp32, rounded to x's dtype before the weight: Meta's order.
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.layer, self.head_dim, self.attend = layer, config.head_dim, ATTENTION[attention]
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, _ = x.shape
        # The number of heads is inferred, so a tensor-parallel shard of wq, wk, wv works unchanged.
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        q, k = apply_rope(q, ctx.cos, ctx.sin), apply_rope(k, ctx.cos, ctx.sin)
        if ctx.cache is not None:
            k, v = ctx.cache.update(self.layer, k, v, ctx.positions, ctx.end)  # (B, S, K, D)
        mixed = self.attend(q, k, v, ctx.mask)  # (B, T, H, D)
        return self.wo(mixed.reshape(B, T, -1))  # (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer, attention)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        h = x + self.attention(self.attention_norm(x), ctx)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """(tokens, positions, document ids, cache) -> logits. `attention`: "fast" (fused) or "exact" (Meta's bits on CPU).

    Built under `torch.device("meta")` it holds no memory until weights are assigned: see `from_weights`.
    """

    def __init__(self, config: ModelConfig, *, attention: str = "fast") -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention {attention!r} is unknown: expected one of {', '.join(ATTENTION)}")
        self.config = config
        # Its own normal_() would import torch's compiler under torch.device("meta"): 3 seconds of every start.
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.dim, _weight=torch.randn(config.vocab_size, config.dim)
        )
        self.layers = nn.ModuleList(TransformerBlock(config, i, attention) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        # A plain attribute and not a buffer: `model.to(torch.bfloat16)` must never round the table.
        self._rope: tuple[Tensor, Tensor] | None = None
        self.first_rows = min(config.max_seq_len, ROPE_ROWS)  # of the table; more are made when they are used

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        attention: str = "fast",
    ) -> "Transformer":
        """A model around `weights` (Meta's names). Tensors that already have the dtype and device are not copied."""
        with torch.device("meta"):
            model = cls(config, attention=attention)
        state = {name: weights[name].to(device=device, dtype=dtype) for name in model.state_dict()}
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def head(self) -> Tensor:
        """The output matrix (V, C)."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) in float32 of normed hidden states (..., C)."""
        if self.output is not None and getattr(self.output, "is_quantized", False):
            return self.output(hidden).float()  # integers are multiplied as they are, never made a whole matrix
        return F.linear(hidden, self.head()).float()

    def context(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Context:
        """RoPE rows, mask and cache bookkeeping of one pass; advances `cache.length`. Arguments as in `forward`."""
        T, device = tokens.shape[1], tokens.device
        if cache is not None and doc_ids is not None:
            raise ValueError("doc_ids and a cache together: packed rows are for training and scoring, not for decoding")
        start = 0 if cache is None or positions is not None else cache.length
        end, mask = start + T, None
        if positions is None:
            positions = torch.arange(start, end, device=device).unsqueeze(0)  # (1, T)
        elif cache is not None:
            end = int(positions.max()) + 1
        if doc_ids is not None:
            mask = causal_mask(T, device) & (doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1))  # (B, T, T)
        if cache is not None:
            if end > cache.max_len:
                raise ValueError(f"position {end - 1} does not fit: the cache holds {cache.max_len} positions")
            cache.length = max(cache.length, end)
            if end > T > 1 or positions.shape[0] > 1:  # not square, or rows of different lengths
                mask = torch.arange(end, device=device) <= positions.unsqueeze(2)  # (B or 1, T, S)
        rows = max(end, self.first_rows, cache.max_len if cache else 0)
        if (
            cache is None and not positions.is_cuda and not torch.compiler.is_compiling()
        ):  # neither may wait for a number
            rows = max(rows, int(positions.max()) + 1)
        cos, sin = self._rope_rows(rows, device)
        return Context(cos[positions], sin[positions], mask, positions, cache, end)

    def _rope_rows(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rope is None or self._rope[0].shape[0] < n or self._rope[0].device != device:
            n = n if n <= ROPE_ROWS else 1 << (n - 1).bit_length()
            with torch.inference_mode(False):  # the table outlives this call, which may not be training
                cos, sin = rope_table(self.config, torch.arange(n, device="cpu"))
                self._rope = cos.to(device), sin.to(device)  # (n, D/2) each
        return self._rope

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normed last hidden states (B, T, C), for losses that never hold all logits. Arguments as in `forward`."""
        ctx = self.context(tokens, positions, doc_ids, cache)
        h = self.tok_embeddings(tokens)  # (B, T, C)
        for layer in self.layers:
            h = layer(h, ctx)
        return self.norm(h)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Next-token logits (B, T, V) in float32.

        tokens: (B, T) int64. positions: (B, T), default 0..T-1, or on from `cache.length`. doc_ids: (B, T), a token
        looks only at earlier tokens with its own id. cache: keys and values are stored there and read back; `positions`
        then names the slots, so rows of different lengths decode together.
        Raises ValueError when the cache is too short, or is given together with doc_ids.
        """
        return self.logits(self.hidden(tokens, positions, doc_ids, cache))


def main() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97, hidden_dim=80))
    tokens = torch.randint(97, (1, 5))
    cache = KVCache(model.config, 1, 8, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        full = model(tokens)
        steps = torch.cat([model(tokens[:, :3], cache=cache), model(tokens[:, 3:], cache=cache)], dim=1)
    print(f"logits {tuple(full.shape)} cached == full: {torch.allclose(full, steps, atol=1e-5)}")


if __name__ == "__main__":
    main()
