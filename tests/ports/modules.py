"""Llamas as strangers write them in torch: other names, other shapes of the same weights, other ways to be called.

python -m parity.check --candidate torch:tests/ports/modules.py:Plain
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frequencies(head_dim: int, theta: float, scaling: dict | None) -> Tensor:
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return freqs
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    share = ((turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])).clamp(
        0, 1
    )
    return freqs * share + freqs / scaling["factor"] * (1 - share)


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.scale = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.scale


def attend(q: Tensor, k: Tensor, v: Tensor, past: int = 0) -> Tensor:
    """(B, T, H, D) and (B, S, K, D) twice -> (B, T, H * D)."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(past)
    weights = scores.masked_fill(~keep, -torch.inf).float().softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


# --- A dict, halves that turn together, names that do not tell gate from up ------------------------------------------


class Attention(nn.Module):
    def __init__(self, cfg: dict) -> None:
        super().__init__()
        self.head_dim = cfg["emb_dim"] // cfg["n_heads"]
        kv = cfg["n_kv_groups"] * self.head_dim
        self.W_key, self.W_value = (nn.Linear(cfg["emb_dim"], kv, bias=False, dtype=cfg["dtype"]) for _ in range(2))
        self.W_query, self.out_proj = (
            nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False, dtype=cfg["dtype"]) for _ in range(2)
        )
        self.freqs = frequencies(self.head_dim, cfg["rope_base"], cfg["rope_freq"])

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.freqs)[:, None]
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.head_dim)) for m in (self.W_query, self.W_key, self.W_value))
        return self.out_proj(attend(self.rotate(q), self.rotate(k), v))


class Feed(nn.Module):
    def __init__(self, cfg: dict) -> None:
        super().__init__()
        dim, hidden = cfg["emb_dim"], cfg["hidden_dim"]
        self.fc1, self.fc2 = (nn.Linear(dim, hidden, bias=False, dtype=cfg["dtype"]) for _ in range(2))
        self.fc3 = nn.Linear(hidden, dim, bias=False, dtype=cfg["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc1(x) * F.silu(self.fc2(x)))


class PlainBlock(nn.Module):
    def __init__(self, cfg: dict, eps: float) -> None:
        super().__init__()
        self.att, self.ff = Attention(cfg), Feed(cfg)
        self.norm2, self.norm1 = Norm(cfg["emb_dim"], eps), Norm(cfg["emb_dim"], eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Plain(nn.Module):
    eps: float | None = None

    def __init__(self, cfg) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        eps = self.eps or cfg["norm_eps"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"], dtype=cfg["dtype"])
        self.blocks = nn.ModuleList(PlainBlock(cfg, eps) for _ in range(cfg["n_layers"]))
        self.final_norm = Norm(cfg["emb_dim"], eps)
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False, dtype=cfg["dtype"])

    def forward(self, in_idx: Tensor) -> Tensor:
        x = self.tok_emb(in_idx)
        for block in self.blocks:
            x = block(x)
        return self.out_head(self.final_norm(x))


class WrongEps(Plain):
    eps = 1e-3


class Biased(Plain):
    def __init__(self, cfg) -> None:  # type: ignore[no-untyped-def]
        super().__init__(cfg)
        for block in self.blocks:
            block.att.W_query.bias = nn.Parameter(torch.zeros(cfg["emb_dim"] + 1))


class Wide(Plain):
    def __init__(self, cfg) -> None:  # type: ignore[no-untyped-def]
        super().__init__({**cfg, "hidden_dim": cfg["hidden_dim"] + 8})


class Asking(Plain):
    def __init__(self, cfg) -> None:  # type: ignore[no-untyped-def]
        super().__init__(cfg)
        self.depth_of_the_sea = cfg["depth_of_the_sea"]


def near(dim: int) -> bool:
    return dim > 0


class Unknown(Plain):
    def __init__(self, cfg, colour, sound) -> None:  # type: ignore[no-untyped-def]
        super().__init__(cfg)


# --- A dataclass, everything fused, a head that is tied, the last position alone without targets ---------------------


@dataclass
class FusedConfig:
    n_embd: int
    n_layer: int
    n_head: int
    num_key_value_heads: int
    vocab_size: int = 50257
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    dropout: float = 0.1


class FusedBlock(nn.Module):
    def __init__(self, config: FusedConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_head, config.num_key_value_heads
        self.head_dim = config.n_embd // config.n_head
        hidden = int(2 * 4 * config.n_embd / 3)
        hidden = int((config.ffn_dim_multiplier or 1) * hidden)
        hidden = -(-hidden // config.multiple_of) * config.multiple_of
        self.c_attn = nn.Linear(config.n_embd, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.mlp = nn.ModuleDict(
            {
                "w13": nn.Linear(config.n_embd, 2 * hidden, bias=False),
                "w2": nn.Linear(hidden, config.n_embd, bias=False),
            }
        )
        self.ln_1, self.ln_2 = Norm(config.n_embd, config.eps), Norm(config.n_embd, config.eps)
        self.freqs = frequencies(self.head_dim, config.rope_theta, config.rope_scaling)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.freqs)[:, None]
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.c_attn(self.ln_1(x)).unflatten(-1, (self.kv_heads, -1, self.head_dim))  # (B, T, K, n, D)
        q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        x = x + self.c_proj(attend(self.rotate(q), self.rotate(k), v))
        up, gate = self.mlp["w13"](self.ln_2(x)).chunk(2, -1)
        return x + self.mlp["w2"](F.silu(gate) * up)


class Fused(nn.Module):
    def __init__(self, config: "FusedConfig") -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(FusedBlock(config) for _ in range(config.n_layer)),
                "ln_f": Norm(config.n_embd, config.eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- Keyword arguments, a cache that is set up, a token at a time -----------------------------------------------------


class Step(FusedBlock):
    cache: tuple[Tensor, Tensor]

    def forward(self, x: Tensor, start: int) -> Tensor:  # type: ignore[override]
        assert x.shape[1] == 1, "one token at a time"
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in self.c_attn(self.ln_1(x)).split(sizes, -1))
        angle = start * self.freqs
        turn = lambda x: torch.view_as_real(
            torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
        ).flatten(-2)
        for cache, new in zip(self.cache, (turn(k), v), strict=True):
            cache[: len(x), start] = new[:, 0]
        keys, values = (cache[: len(x), : start + 1] for cache in self.cache)
        x = x + self.c_proj(attend(turn(q).to(x.dtype), keys, values, start))
        gate, up = self.mlp["w13"](self.ln_2(x)).chunk(2, -1)
        return x + self.mlp["w2"](F.silu(gate) * up)


class Stepwise(nn.Module):
    def __init__(self, dim: int, num_layers: int, num_heads: int, num_kv_heads: int, intermediate_size: int,
                 vocab_size: int, rms_norm_eps: float, theta: float, rope_scaling: dict | None,
                 max_seq_len: int = 32) -> None:  # fmt: skip
        super().__init__()
        config = FusedConfig(dim, num_layers, num_heads, num_kv_heads, vocab_size, None, intermediate_size,
                             rms_norm_eps, theta, rope_scaling)  # fmt: skip
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Step(config) for _ in range(num_layers))
        self.norm, self.unembed, self.length = (
            Norm(dim, rms_norm_eps),
            nn.Linear(dim, vocab_size, bias=False),
            max_seq_len,
        )

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        for layer in self.layers:
            size = (max_batch_size, max_seq_length, layer.kv_heads, layer.head_dim)
            layer.cache = (torch.zeros(size), torch.zeros(size))

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, start_pos)
        return self.unembed(self.norm(x))
