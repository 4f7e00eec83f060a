"""From the first wrong tap to a probable cause in words: signatures, computed from the traces alone.

A signature recomputes the tap from the taps before it, in float64, with one mistake in it; the mistake that explains
the candidate's numbers much better than the truth does is named. Nothing here knows who made the traces.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity.explain.rotation import rope_cause
from parity.trace import Readable

EXPLAINS = 0.25  # a mistake is named when it leaves less than this part of the error unexplained


@dataclass
class View:
    """One sequence's tensors in float64: the candidate's, what they should be, and what the operation was given."""

    candidate: Readable
    oracle: Readable
    inputs: Readable  # whose taps the operation read: the candidate's own, or the reference's when teacher-forced
    dtype: str
    sequence: int
    positions: list[int] | None  # of the rows, None: 0, 1, 2, ...
    _cache: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)

    def _get(self, trace: Readable, tap: str) -> Tensor | None:
        key = (id(trace), tap)
        if key not in self._cache:
            held = trace.has(self.dtype, self.sequence, tap)
            self._cache[key] = trace.get(self.dtype, self.sequence, tap).double() if held else None
        return self._cache[key]

    def mine(self, tap: str) -> Tensor | None:
        return self._get(self.candidate, tap)

    def exact(self, tap: str) -> Tensor | None:
        return self._get(self.oracle, tap)

    def given(self, tap: str) -> Tensor | None:
        return self._get(self.inputs, tap)

    @property
    def config(self) -> dict[str, Any]:
        return self.oracle.meta["config"]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def best(c: Tensor, o: Tensor, mistakes: Mapping[str, Tensor | None]) -> str | None:
    """The mistake that leaves the least of c - o unexplained, if that is little enough.

    Little beside c, too: next to nothing, as of a head of tiny numbers, is like any small multiple of o.
    """
    error = min(rms(torch.nan_to_num(x, nan=1e30)) for x in (c - o, c))
    left = {
        name: rms(torch.nan_to_num(c - x, nan=1e30))
        for name, x in mistakes.items()
        if x is not None and x.shape == c.shape
    }
    name = min(left, key=left.__getitem__, default=None)
    return name if name is not None and left[name] < EXPLAINS * error else None


def scaled(c: Tensor, o: Tensor) -> dict[str, Tensor | None]:
    """The one factor between c and o, as the mistake that it would be."""
    factor = float((c * o).sum() / o.square().sum())
    return {f"the values are {factor:.6g} times what they should be": factor * o}


def probable_cause(view: View, tap: str) -> str | None:
    """The signature that fits, else a guess; None where there is neither."""
    return signature(view, tap) or guess(view, tap)


def signature(view: View, tap: str) -> str | None:
    """The mistake that explains the tap's error; None where none does."""
    c, o = view.mine(tap), view.exact(tap)
    if c is None or o is None or c.shape != o.shape:
        return None
    prefix, _, name = tap.rpartition(".")
    found = SIGNATURES[name](view, prefix + "." if prefix else "", c, o)
    if found is None and name not in ("q_rope", "k_rope"):
        found = best(c, o, scaled(c, o))
    return found


def guess(view: View, tap: str) -> str | None:
    """What the tap looks like; None where it looks like nothing known."""
    c, o = view.mine(tap), view.exact(tap)
    prefix, _, name = tap.rpartition(".")
    if c is None or o is None or c.shape != o.shape or name not in GUESSES:
        return None
    return GUESSES[name](view, prefix + "." if prefix else "", c, o)


# --- Embedding, norms, projections -----------------------------------------------------------------------------------


def _embed(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    mistakes = {
        "the embedding is multiplied by sqrt(dim)": o * math.sqrt(o.shape[-1]),
        "the token ids are shifted by one to the right": o.roll(1, 0),
        "the token ids are shifted by one to the left": o.roll(-1, 0),
    }
    return best(c, o, mistakes)


def before(view: View, prefix: str) -> str:
    """The tap that holds the residual stream before a block."""
    layer = int(prefix.split(".")[1])
    return "embed" if layer == 0 else f"layers.{layer - 1}.out"


def normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _norm_mistakes(view: View, c: Tensor, o: Tensor, x: Tensor, true_x: Tensor) -> str | None:
    """x: the norm's input in the candidate, true_x: in the oracle, which gives its weight."""
    eps = view.config["norm_eps"]
    weight = (o / normed(true_x, eps)).nanmedian(0).values
    centred = x - x.mean(-1, keepdim=True)
    mistakes = {
        "the norm is skipped": x,
        "the norm's weight is not applied": normed(x, eps),
        "the norm adds 1 to its weight": normed(x, eps) * (1 + weight),
        "the mean is subtracted: a LayerNorm in place of the RMSNorm": normed(centred, eps) * weight,
        "the norm divides by the sum of squares, not their mean": x
        / (x.square().sum(-1, keepdim=True) + eps).sqrt()
        * weight,
    }
    named = best(c, o, mistakes)
    return named or _eps(c, o, x, eps, weight)


def _eps(c: Tensor, o: Tensor, x: Tensor, eps: float, weight: Tensor) -> str | None:
    """A position of mean square m is scaled by sqrt((m + eps) / (m + wrong eps)): solve for the wrong eps.

    Added outside of the root, it looks like a smaller one, of another size at each position.
    """
    scale = (c * o).sum(-1) / o.square().sum(-1)  # (T,)
    if not rms(c - scale.unsqueeze(-1) * o) < EXPLAINS * rms(c - o):
        return None
    mean_square = x.square().mean(-1)
    small = mean_square <= mean_square.quantile(0.25)
    found = float(((mean_square + eps) / scale.square() - mean_square)[small].median())
    inside = o * ((mean_square + eps) / (mean_square + max(found, 0))).sqrt().unsqueeze(-1)
    outside = x / (mean_square.sqrt() + eps).unsqueeze(-1) * weight
    if rms(c - outside) < EXPLAINS * rms(c - inside):
        return "the norm adds eps outside of the root"
    if found < -0.5 * eps or abs(found - eps) < 0.02 * eps:
        return None
    return f"the norm's eps looks like {max(found, 0):.2g}, the config says {eps:.2g}"


def _attn_norm(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    x, true_x = view.given(before(view, prefix)), view.exact(before(view, prefix))
    return None if x is None else _norm_mistakes(view, c, o, x, x if true_x is None else true_x)


def _ffn_norm(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    x, attn_out, attn_norm = (view.given(t) for t in (before(view, prefix), prefix + "attn_out", prefix + "attn_norm"))
    if x is None or attn_out is None:
        return None
    eps, mid = view.config["norm_eps"], x + attn_out
    weight = (o / normed(mid, eps)).nanmedian(0).values
    mistakes = {
        "the attention's output is not added to the residual stream": normed(x, eps) * weight,
        "the residual stream is lost: the norm sees the attention's output alone": normed(attn_out, eps) * weight,
        "the residual is taken after the norm": None
        if attn_norm is None
        else normed(attn_norm + attn_out, eps) * weight,
    }
    return best(c, o, mistakes) or _norm_mistakes(view, c, o, mid, mid)


def _final_norm(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    n, eps = view.config["n_layers"], view.config["norm_eps"]
    last = view.exact(f"layers.{n - 1}.out")
    x = view.given(f"layers.{n - 1}.out")
    if last is None:
        return None
    weight = (o / normed(last, eps)).nanmedian(0).values
    mistakes: dict[str, Tensor | None] = {}
    for i in range(n - 1):
        out = view.given(f"layers.{i}.out")
        mistakes[f"the layers after {i} are skipped"] = None if out is None else normed(out, eps) * weight
    return best(c, o, mistakes) or _norm_mistakes(view, c, o, last if x is None else x, last)


def half_split(x: Tensor) -> Tensor:
    """(T, heads, D) in Meta's order -> pairs (j, j + D/2)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _projection(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    other = {n: view.exact(prefix + n) for n in ("q", "k", "v")}
    mistakes: dict[str, Tensor | None] = {
        "its rows are in the half-split RoPE order: q/k rows of the Hugging Face file not un-permuted": half_split(o),
        "its rows were permuted twice": o.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
        "its heads are in reverse order": o.flip(1),
    }
    mistakes |= {f"it holds what {n} should hold: weights exchanged": x for n, x in other.items() if x is not o}
    return best(c, o, mistakes | permuted(c, o))


def permuted(c: Tensor, o: Tensor) -> dict[str, Tensor | None]:
    """The rows of a projection in another order, where each of them is found: (T, heads, D) each."""
    a, b = c.flatten(1), o.flatten(1)
    alike = (a / a.norm(dim=0).clamp_min(1e-300)).T @ (b / b.norm(dim=0).clamp_min(1e-300))  # (rows of c, rows of o)
    order = alike.argmax(1)
    if len(order.unique()) < len(order) or torch.equal(order, torch.arange(len(order))):
        return {}
    return {"the right numbers in another order: rows permuted": b[:, order].view_as(o)}


# --- Attention -------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, scale: float, interleaved: bool = False) -> Tensor:
    """q (T, H, D), k and v (T, K, D), mask (T, T) True where seen -> (T, H*D)."""
    n_rep = q.shape[1] // k.shape[1]
    k, v = ((x.repeat(1, n_rep, 1) if interleaved else x.repeat_interleave(n_rep, 1)).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) * scale  # (H, T, T)
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def _attn_mix(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    q, k, v = (view.given(prefix + t) for t in ("q_rope", "k_rope", "v"))
    if q is None or k is None or v is None or view.positions is not None:
        return None
    T, D = q.shape[0], q.shape[-1]
    causal, everything, scale = torch.ones(T, T, dtype=torch.bool).tril(), torch.ones(T, T, dtype=torch.bool), D**-0.5
    earlier = everything.tril(-1)
    earlier[0, 0] = True
    true = attention(q, k, v, mask=causal, scale=scale)
    mistakes = {
        "query heads take kv heads in turn (h % K), not in blocks": attention(
            q, k, v, mask=causal, scale=scale, interleaved=True
        ),
        "there is no causal mask": attention(q, k, v, mask=everything, scale=scale),
        "the causal mask is off by one: each token sees the next": attention(
            q, k, v, mask=everything.tril(1), scale=scale
        ),
        "the causal mask is off by one: no token sees itself": attention(q, k, v, mask=earlier, scale=scale),
        "the scores are not divided by sqrt(head_dim)": attention(q, k, v, mask=causal, scale=1.0),
        "the scores are divided by head_dim, not by its root": attention(q, k, v, mask=causal, scale=1.0 / D),
        "the scores are divided by sqrt(dim), not by sqrt(head_dim)": attention(
            q, k, v, mask=causal, scale=view.config["dim"] ** -0.5
        ),
        "heads and features change places when they are joined": true.unflatten(1, (-1, D)).transpose(1, 2).flatten(1),
    }  # fmt: skip
    factor = score_factor(c, lambda factor: attention(q, k, v, mask=causal, scale=factor * scale))
    fitted = {f"the scores are {factor:.4g} times what they should be": attention(
        q, k, v, mask=causal, scale=factor * scale
    )}  # fmt: skip
    return best(c, true, mistakes) or best(c, true, fitted)


def score_factor(c: Tensor, mixed: Callable[[float], Tensor]) -> float:
    """The factor on all scores that comes nearest to c, from 1 on by Newton's method; 1 where that leads nowhere."""
    factor = 1.0
    for _ in range(3):
        here = mixed(factor)
        slope = (mixed(1.001 * factor) - here) / (0.001 * factor)
        factor += float(((c - here) * slope).sum() / slope.square().sum().clamp_min(1e-300))
        if not 0.1 < factor < 10:
            return 1.0
    return factor


def _softmax(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    q, k, v = (view.given(prefix + t) for t in ("q_rope", "k_rope", "v"))
    if q is None or k is None or v is None or view.positions is not None:
        return None
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    true = attention(q, k, v, mask=causal, scale=q.shape[-1] ** -0.5)
    heads = [x.unflatten(1, (-1, q.shape[-1])) for x in (c, true)]
    factor = (heads[0] * heads[1]).sum(-1, keepdim=True) / heads[1].square().sum(-1, keepdim=True)  # (T, H, 1)
    if rms(heads[0] - factor * heads[1]) < 2 * EXPLAINS * rms(c - true):
        return "the attention weights do not sum to 1: the softmax's sum runs in too low a precision"
    return None


# --- Feed-forward, residual, head ------------------------------------------------------------------------------------


def _gate(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    return best(c, o, {"it holds what up should hold: gate and up swapped": view.exact(prefix + "up")})


def _up(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    return best(c, o, {"it holds what gate should hold: gate and up swapped": view.exact(prefix + "gate")})


def _ffn_mix(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    gate, up = view.given(prefix + "gate"), view.given(prefix + "up")
    if gate is None or up is None:
        return None
    mistakes = {
        "the activation is on up, not on gate: gate and up swapped": gate * F.silu(up),
        "the activation is GELU, not SiLU": F.gelu(gate) * up,
        "the activation is tanh-GELU, not SiLU": F.gelu(gate, approximate="tanh") * up,
        "the activation is SiLU of 1.702 x (quick GELU), not SiLU": gate * torch.sigmoid(1.702 * gate) * up,
        "the activation is ReLU, not SiLU": F.relu(gate) * up,
        "the activation is a sigmoid, not SiLU": torch.sigmoid(gate) * up,
        "there is no activation": gate * up,
        "up is not multiplied in": F.silu(gate),
    }
    return best(c, F.silu(gate) * up, mistakes)


def _out(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    names = (before(view, prefix), *(prefix + t for t in ("attn_out", "ffn_out", "ffn_norm", "attn_norm")))
    x, attn_out, ffn_out, ffn_norm, attn_norm = (view.given(t) for t in names)
    if x is None or attn_out is None or ffn_out is None:
        return None
    mistakes = {
        "the feed-forward's output is not added": x + attn_out,
        "the attention's output is not added": x + ffn_out,
        "the residual stream is lost: only the feed-forward's output is left": ffn_out,
        "the residual of the block is lost": attn_out + ffn_out,
        "the residual is taken after the norm, not before it": None if ffn_norm is None else ffn_norm + ffn_out,
        "the residual is taken after the first norm": None if attn_norm is None else attn_norm + attn_out + ffn_out,
        "the block is skipped": x,
    }
    return best(c, x + attn_out + ffn_out, mistakes)


def _logits(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    embed, hidden, tokens = view.given("embed"), view.given("final_norm"), view.oracle.sequences[view.sequence]
    if embed is not None and hidden is not None and view.positions is None:
        seen = torch.tensor(tokens)
        tied = hidden @ embed.T  # (T, T): the logit of each token of the sequence, were its embedding its head
        named = best(c[:, seen], o[:, seen], {"the embedding is used as the output head": tied})
        if named and rms((c - o)[:, seen]) > EXPLAINS * rms(c - o):  # else these tokens' error is rounding
            return named
    mistakes = {
        "the vocabulary is shifted by one": o.roll(1, -1),
        "the vocabulary is shifted by one back": o.roll(-1, -1),
    }
    return best(c, o, mistakes)


def _unrelated(view: View, prefix: str, c: Tensor, o: Tensor) -> str | None:
    if float(torch.cosine_similarity(c.flatten(), o.flatten(), dim=0)) < 0.3:
        return "the output head is unrelated to the checkpoint's: random, left uninitialised, or another matrix"
    return None


NONE: Callable[..., str | None] = lambda view, prefix, c, o: None
SIGNATURES: dict[str, Callable[[View, str, Tensor, Tensor], str | None]] = {
    "embed": _embed,
    "attn_norm": _attn_norm,
    "q": _projection,
    "k": _projection,
    "v": _projection,
    "q_rope": lambda view, prefix, c, o: rope_cause(view.given(prefix + "q"), c, view.config, view.positions),
    "k_rope": lambda view, prefix, c, o: rope_cause(view.given(prefix + "k"), c, view.config, view.positions),
    "attn_mix": _attn_mix,
    "attn_out": NONE,
    "ffn_norm": _ffn_norm,
    "gate": _gate,
    "up": _up,
    "ffn_mix": _ffn_mix,
    "ffn_out": NONE,
    "out": _out,
    "final_norm": _final_norm,
    "logits": _logits,
}
# What a tap looks like, where nothing explains it: said last.
GUESSES: dict[str, Callable[[View, str, Tensor, Tensor], str | None]] = {"attn_mix": _softmax, "logits": _unrelated}
