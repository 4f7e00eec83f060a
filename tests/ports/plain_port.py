"""A Llama written from scratch in plain functions, as a stranger's port would be, and five ways of getting it wrong.

It shares no code with nanollama: its own reader of Meta's files, half-split RoPE on permuted rows, attention by einsum.

    python -m parity.check --candidate tests/ports/plain_port.py:load
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Right by default; each field is one known mistake."""

    theta: float | None = None
    eps: float | None = None
    scaling: bool = True
    permuted: bool = True
    swapped: bool = False


class Port:
    """tokens (B, T) -> logits (B, T, V), with taps."""

    def __init__(self, folder: Path, dtype: torch.dtype, settings: Settings) -> None:
        self.params = json.loads((folder / "params.json").read_text())
        state = torch.load(folder / "consolidated.00.pth", weights_only=True)
        self.w = {name: tensor.to(dtype) for name, tensor in state.items()}
        self.settings = settings
        self.heads, self.kv_heads = self.params["n_heads"], self.params["n_kv_heads"]
        self.head_dim = self.params["dim"] // self.heads

    def frequencies(self) -> Tensor:
        theta = self.settings.theta or self.params.get("rope_theta", 10000.0)
        freqs = 1.0 / theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        if not (self.params.get("use_scaled_rope") and self.settings.scaling):
            return freqs
        factor = self.params.get("rope_scaling_factor", 8.0)
        share = ((8192 * freqs / (2 * math.pi) - 1) / 3).clamp(0, 1)
        return freqs * share + freqs / factor * (1 - share)

    def norm(self, x: Tensor, name: str) -> Tensor:
        x32 = x.float()
        eps = self.settings.eps or self.params["norm_eps"]
        return F.rms_norm(x32, x32.shape[-1:], eps=eps).to(x.dtype) * self.w[name]

    def rotate(self, x: Tensor) -> Tensor:
        """(B, T, heads, D) in Meta's interleaved layout; computed half-split, as most ports do."""
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.frequencies())  # (T, D/2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., 0::2].float(), x[..., 1::2].float()
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return out.flatten(-2).to(x.dtype)

    def projected(self, x: Tensor, name: str, heads: int) -> Tensor:
        weight = self.w[name]
        if not self.settings.permuted and name.endswith(("wq.weight", "wk.weight")):
            # Rows as a Hugging Face file holds them, taken for Meta's.
            weight = weight.view(heads, self.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
        return F.linear(x, weight).unflatten(-1, (heads, self.head_dim))

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        T, taps = tokens.shape[1], {}
        h = taps["embed"] = F.embedding(tokens, self.w["tok_embeddings.weight"])
        keep = torch.ones(T, T, dtype=torch.bool).tril()
        for i in range(self.params["n_layers"]):
            p = f"layers.{i}."
            x = taps[p + "attn_norm"] = self.norm(h, p + "attention_norm.weight")
            q = taps[p + "q"] = self.projected(x, p + "attention.wq.weight", self.heads)
            k = taps[p + "k"] = self.projected(x, p + "attention.wk.weight", self.kv_heads)
            v = taps[p + "v"] = self.projected(x, p + "attention.wv.weight", self.kv_heads)
            q, k = self.rotate(q), self.rotate(k)
            taps[p + "q_rope"], taps[p + "k_rope"] = q, k
            group = q.unflatten(2, (self.kv_heads, -1))  # (B, T, K, H/K, D)
            scores = torch.einsum("btkgd,bskd->bkgts", group, k).float() / self.head_dim**0.5
            weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).to(q.dtype)
            x = taps[p + "attn_mix"] = torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2)
            x = taps[p + "attn_out"] = F.linear(x, self.w[p + "attention.wo.weight"])
            h = h + x
            x = taps[p + "ffn_norm"] = self.norm(h, p + "ffn_norm.weight")
            gate, up = (p + f"feed_forward.w{n}.weight" for n in ((3, 1) if self.settings.swapped else (1, 3)))
            taps[p + "gate"], taps[p + "up"] = F.linear(x, self.w[gate]), F.linear(x, self.w[up])
            x = taps[p + "ffn_mix"] = F.silu(taps[p + "gate"]) * taps[p + "up"]
            x = taps[p + "ffn_out"] = F.linear(x, self.w[p + "feed_forward.w2.weight"])
            h = taps[p + "out"] = h + x
        taps["final_norm"] = self.norm(h, "norm.weight")
        return taps

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.linear(self.taps(tokens)["final_norm"], self.w["output.weight"]).float()


RIGHT = Settings()


def loader(settings: Settings):  # type: ignore[no-untyped-def]
    return lambda checkpoint, dtype, device: Port(Path(checkpoint), dtype, settings)


load = loader(RIGHT)
wrong_base = loader(replace(RIGHT, theta=10_000.0))
wrong_eps = loader(replace(RIGHT, eps=1e-5))
dropped_scaling = loader(replace(RIGHT, scaling=False))
unpermuted = loader(replace(RIGHT, permuted=False))
swapped = loader(replace(RIGHT, swapped=True))


def bare(checkpoint: str, dtype: torch.dtype, device: str):  # type: ignore[no-untyped-def]
    """A callable and nothing else."""
    port = load(checkpoint, dtype, device)
    return lambda tokens: port(tokens)


def bare_with_wrong_eps(checkpoint: str, dtype: torch.dtype, device: str):  # type: ignore[no-untyped-def]
    port = wrong_eps(checkpoint, dtype, device)
    return lambda tokens: port(tokens)
