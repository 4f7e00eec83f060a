"""The published dense text Llamas, and tiny members of each family with the same features.

python -m parity.synth --shape list
"""

from dataclasses import dataclass, replace
from typing import Any

from parity.contract import UsageError


@dataclass(frozen=True)
class Shape:
    """One architecture in the numbers that checkpoint files carry."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int = 128_256
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_factor: float | None = None  # None: no Llama 3.1 scaling
    tied: bool = False
    multiple_of: int = 1024
    ffn_dim_multiplier: float | None = None
    context: int = 8192  # tokens
    original_context: int = 8192  # tokens
    own_head_dim: int | None = None  # None: dim / n_heads, the only one that Meta's format can say

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.dim // self.n_heads

    @property
    def llama2(self) -> bool:
        return self.rope_theta == 10_000.0


LLAMA_3_1 = {"rope_factor": 8.0, "context": 131_072}
LLAMA_3_2 = {"rope_factor": 32.0, "context": 131_072, "tied": True, "multiple_of": 256}
LLAMA_2 = {"vocab_size": 32_000, "rope_theta": 10_000.0, "context": 4096, "multiple_of": 256}

_8B = Shape(4096, 32, 32, 8, 14336, ffn_dim_multiplier=1.3)
_70B = Shape(8192, 80, 64, 8, 28672, multiple_of=4096, ffn_dim_multiplier=1.3)
# eps 2e-5 is no code's default, so that a default in place of the checkpoint's value shows.
_TINY = Shape(128, 4, 8, 2, 352, norm_eps=2e-5, multiple_of=32, **LLAMA_3_1)  # type: ignore[arg-type]

SHAPES: dict[str, Shape] = {
    "tiny": _TINY,
    "tiny-3": replace(_TINY, rope_factor=None, context=8192),
    "tiny-3.2": replace(_TINY, rope_factor=32.0, tied=True),
    "tiny-llama2": replace(_TINY, rope_factor=None, vocab_size=32_000, rope_theta=10_000.0, context=4096),
    "3-8B": _8B,
    "3-70B": _70B,
    "8B": replace(_8B, **LLAMA_3_1),  # type: ignore[arg-type]
    "70B": replace(_70B, **LLAMA_3_1),  # type: ignore[arg-type]
    "405B": Shape(16384, 126, 128, 8, 53248, multiple_of=4096, ffn_dim_multiplier=1.2, **LLAMA_3_1),  # type: ignore[arg-type]
    "1B": Shape(2048, 16, 32, 8, 8192, ffn_dim_multiplier=1.5, **LLAMA_3_2),  # type: ignore[arg-type]
    "3B": Shape(3072, 28, 24, 8, 8192, ffn_dim_multiplier=1.0, **LLAMA_3_2),  # type: ignore[arg-type]
    "3.3-70B": replace(_70B, **LLAMA_3_1),  # type: ignore[arg-type]
    "llama2-7B": Shape(4096, 32, 32, 32, 11008, **LLAMA_2),  # type: ignore[arg-type]
    "llama2-13B": Shape(5120, 40, 40, 40, 13824, **LLAMA_2),  # type: ignore[arg-type]
    "llama2-70B": Shape(8192, 80, 64, 8, 28672, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=32_000,
                        rope_theta=10_000.0, context=4096),
}  # fmt: skip


SIZES = {"dim": "width of the residual stream", "heads": "query heads", "kv_heads": "key and value heads",
         "head_dim": "width of a head (hf alone; default: dim / heads)", "hidden": "width of the feed-forward",
         "eps": "of the norms", "vocab": "rows of the embedding; other than 128256 there is no tokenizer"}  # fmt: skip
FIELDS = {"heads": "n_heads", "kv_heads": "n_kv_heads", "head_dim": "own_head_dim", "hidden": "hidden_dim",
          "eps": "norm_eps", "vocab": "vocab_size"}  # fmt: skip


def resized(shape: Shape, **numbers: int | float | None) -> Shape:
    """The shape with some numbers replaced, None for those that stay. Raises ValueError where they make no model.

    With another `dim` and no `hidden_dim` the feed-forward has the size that the shape's own rule gives.
    """
    new = replace(shape, **{name: value for name, value in numbers.items() if value is not None})  # type: ignore[arg-type]
    for name in ("dim", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "norm_eps"):
        if not getattr(new, name) > 0:
            raise ValueError(f"{name} is {getattr(new, name)}: expected more than 0")
    if new.n_heads % new.n_kv_heads:
        raise ValueError(f"{new.n_heads} heads are not a multiple of {new.n_kv_heads} kv heads")
    if new.own_head_dim is None and new.dim % new.n_heads:
        raise ValueError(f"dim {new.dim} is not a multiple of {new.n_heads} heads: give --head_dim")
    if new.head_dim < 2 or new.head_dim % 2:
        raise ValueError(f"head_dim {new.head_dim}: expected an even number, since RoPE rotates pairs")
    plain = int(8 * new.dim / 3)
    if numbers.get("hidden_dim") is None and numbers.get("dim") is not None:
        rows = int((shape.ffn_dim_multiplier or 1.0) * plain)
        return replace(new, hidden_dim=-(-rows // shape.multiple_of) * shape.multiple_of)
    if numbers.get("hidden_dim") is None:
        return new
    # One multiple of itself: the pair by which Meta's params.json says any size.
    return replace(
        new,
        multiple_of=new.hidden_dim,
        ffn_dim_multiplier=None if plain <= new.hidden_dim else new.hidden_dim / plain,
    )


def sized(shape: Shape, layers: int | None, given: dict[str, Any], format: str) -> Shape:
    """The shape with the numbers that the flags of parity.synth give. Raises UsageError."""
    shape = replace(shape, n_layers=layers or shape.n_layers)
    try:
        shape = resized(shape, **{FIELDS.get(flag, flag): value for flag, value in given.items()})
    except ValueError as error:
        flags = " ".join(f"--{flag} {value}" for flag, value in given.items() if value is not None)
        raise UsageError(f"{flags}: {error}") from None
    if format == "meta" and shape.head_dim * shape.n_heads != shape.dim:
        raise UsageError(f"--head_dim {shape.head_dim} is not dim / heads, which Meta's format cannot say: --format hf")
    return shape


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Meta's names -> shapes, in file order. Meta's files always hold output.weight."""
    dim, q, kv = shape.dim, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    names: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (shape.vocab_size, dim)}
    for i in range(shape.n_layers):
        layer = {
            "attention.wq": (q, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, q),
            "feed_forward.w1": (shape.hidden_dim, dim),
            "feed_forward.w2": (dim, shape.hidden_dim),
            "feed_forward.w3": (shape.hidden_dim, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        names |= {f"layers.{i}.{name}.weight": size for name, size in layer.items()}
    return names | {"norm.weight": (dim,), "output.weight": (shape.vocab_size, dim)}
