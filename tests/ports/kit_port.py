"""A Llama in NumPy, forward and backward, as a stranger's port would be: it reads a kit (python -m parity.kit), makes
every tap with all sequences packed in one row, then loss, gradients and AdamW steps, and judges itself.

    python kit_port.py KIT OUT
    PASS: 79 arrays within their bounds, the worst at 67% (grad.tok_embeddings.weight)

A third argument plants one mistake: eps, scaling, pairing, heads, document, bf16, swapped, labels, gradient or decay.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
KINDS = {"f32": "<f4", "f64": "<f8", "i32": "<i4"}
KIT, OUT = (Path(part) for part in sys.argv[1:3])
MISTAKE = sys.argv[3] if len(sys.argv) > 3 else ""

# --- The kit ---------------------------------------------------------------------------------------------------------

config: dict[str, float] = {"low_freq_factor": 1, "high_freq_factor": 4, "original_context": 8192}
training: dict[str, list[float]] = {}
sequences: list[int] = []
table: dict[str, tuple[str, int, list[int]]] = {}
bounds: dict[str, list[tuple[str, int, int, float]]] = {}
lines = (KIT / "kit.txt").read_text("ascii").splitlines()
assert lines[0] == "nanollama.kit/1", f"not a kit: {KIT}"
for word, *rest in map(str.split, lines[1:]):
    if word == "config":
        config[rest[0]] = float(rest[1])
    elif word == "training":
        training[rest[0]] = [float(x) for x in rest[1:]]
    elif word == "sequence":
        sequences.append(int(rest[1]))
    elif word == "array":
        table[rest[0]] = rest[1], int(rest[2]), [int(x) for x in rest[4:]]
    elif word == "bound" and rest[0] == "fp32":
        bounds.setdefault(rest[1], []).append((rest[2], int(rest[3]), int(rest[4]), float(rest[5])))


def load(name: str) -> Array:
    file, offset, shape = table[name]
    kind, count = KINDS[file.rpartition(".")[2]], int(np.prod(shape))
    return np.fromfile(KIT / file, kind, count, offset=offset).reshape(shape)


shares: dict[str, float] = {}  # of each array, in order: its largest error by its bound


def emit(name: str, mine: Array) -> None:
    mine = np.asarray(mine, np.float32)
    mine.astype("<f4").tofile(OUT / f"{name}.f32")
    exact = load(name)
    # KL is left to parity.kit --check. A NaN is beyond every bound.
    found = [measure(metric, mine, exact, slice(first, first + rows)) / bound if bound else
             np.inf * measure(metric, mine, exact, slice(first, first + rows)) if metric != "tokens" else
             1e9 * measure(metric, mine, exact, slice(first, first + rows))
             for metric, first, rows, bound in bounds[name] if not metric.startswith("kl_")]  # fmt: skip
    shares[name] = float(np.max(found))


def measure(metric: str, mine: Array, exact: Array, rows: slice) -> float:
    if metric == "tokens":
        return float(((mine.argmax(-1) != load("best"))[rows] & (load("decided.fp32")[rows] == 1)).sum())
    off = np.abs(mine[rows].astype(np.float64) - exact[rows].reshape(mine[rows].shape))
    if metric == "relative":
        return float((off / np.maximum(np.abs(exact[rows]), training["lr"][0])).max())
    return float(off.max() if metric == "max" else np.sqrt((off**2).mean()))


# --- The model -------------------------------------------------------------------------------------------------------

layers, heads, kv_heads, width = (int(config[key]) for key in ("n_layers", "n_heads", "n_kv_heads", "head_dim"))
weights = {name: load(name) for name, (file, _, _) in table.items() if file == "weights.f32"}
eps = np.float32(1e-6 if MISTAKE == "eps" else config["norm_eps"])
root = np.float32(np.sqrt(width))


def bf16(x: Array) -> Array:
    words = np.ascontiguousarray(x).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def linear(x: Array, name: str) -> Array:
    y = x @ weights[name].T
    return bf16(y) if MISTAKE == "bf16" else y


def norm(x: Array, name: str) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + eps) * weights[name]


def angles(positions: Array) -> Array:
    """(positions, pairs), float32 at each step: part of the model, and far out it shows."""
    one, pairs = np.float32(1), np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    turn = one / np.float32(config["rope_theta"]) ** pairs
    if config["factor"] and MISTAKE != "scaling":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_context")
        factor, low, high, context = (np.float32(config[key]) for key in keys)
        s = np.clip((context / (np.float32(2 * np.pi) / turn) - low) / (high - low), 0, 1)
        turn = (one - s) * turn / factor + s * turn
    return positions.astype(np.float32)[:, None] * turn


def rotate(x: Array, angle: Array) -> Array:
    """(N, heads, width). Meta's layout: features 2j and 2j+1 turn together."""
    half = (slice(0, width // 2), slice(width // 2, width))
    a, b = half if MISTAKE == "pairing" else (slice(0, width, 2), slice(1, width, 2))
    cos, sin, y = np.cos(angle)[:, None], np.sin(angle)[:, None], np.empty_like(x)
    y[..., a] = x[..., a] * cos - x[..., b] * sin
    y[..., b] = x[..., a] * sin + x[..., b] * cos
    return y


def kv_of(x: Array) -> Array:
    """(N, kv_heads, width) -> (N, heads, width): query head h reads kv head h / group."""
    head = np.arange(heads)
    return x[:, head % kv_heads if MISTAKE == "heads" else head // (heads // kv_heads)]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(tokens: Array, documents: Array, positions: Array, tap: Callable[[str, Array], None]) -> dict[str, Array]:
    """Every tap, and what the backward pass needs besides: P, the attention weights (heads, N, N)."""
    kept, angle = dict[str, Array](), angles(positions)

    def step(name: str, x: Array) -> Array:
        kept[name] = x
        tap(name, x)
        return x

    seen = np.tril(np.ones((len(tokens), len(tokens)), bool))
    seen &= (documents[:, None] == documents) | (MISTAKE == "document")
    h = step("embed", weights["tok_embeddings.weight"][tokens])
    for i in range(layers):
        p = f"layers.{i}."
        x = step(p + "attn_norm", norm(h, p + "attention_norm.weight"))
        q, k, v = (step(p + n, linear(x, f"{p}attention.w{n}.weight").reshape(len(x), -1, width)) for n in "qkv")
        q, k = step(p + "q_rope", rotate(q, angle)), step(p + "k_rope", rotate(k, angle))
        scores = np.einsum("thd,uhd->htu", q, kv_of(k), optimize=True) / root
        kept[p + "P"] = softmax(np.where(seen, scores, np.float32(-np.inf)))
        mix = np.einsum("htu,uhd->thd", kept[p + "P"], kv_of(v), optimize=True).reshape(len(x), -1)
        kept[p + "mid"] = h = h + step(p + "attn_out", linear(step(p + "attn_mix", mix), p + "attention.wo.weight"))
        x = step(p + "ffn_norm", norm(h, p + "ffn_norm.weight"))
        one, three = ("w3", "w1") if MISTAKE == "swapped" else ("w1", "w3")
        gate, up = (step(p + n, linear(x, f"{p}feed_forward.{w}.weight")) for n, w in (("gate", one), ("up", three)))
        mix = step(p + "ffn_mix", gate / (1 + np.exp(-gate)) * up)
        h = step(p + "out", h + step(p + "ffn_out", linear(mix, p + "feed_forward.w2.weight")))
    x = step("final_norm", norm(h, "norm.weight"))
    step("logits", linear(x, "tok_embeddings.weight" if config["tied"] else "output.weight"))
    return kept


# --- Training --------------------------------------------------------------------------------------------------------


def through_norm(x: Array, dy: Array, name: str, grads: dict[str, Array]) -> Array:
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + eps)
    grads[name] = (dy * x * r).sum(0)
    dy = dy * weights[name]
    return r * dy - x * r**3 * (dy * x).mean(-1, keepdims=True, dtype=np.float32)


def through_linear(x: Array, dy: Array, name: str, grads: dict[str, Array]) -> Array:
    grads[name] = grads.get(name, 0) + dy.T @ x
    return dy @ weights[name]


def to_kv(d: Array) -> Array:
    """The gradient of a kv head is the sum over the query heads that read it."""
    return d.reshape(len(d), kv_heads, heads // kv_heads, width).sum(2)


def backward(tokens: Array, targets: Array, positions: Array, kept: dict[str, Array]) -> dict[str, Array]:
    """Gradients of the mean loss, by weight."""
    grads, used, angle = dict[str, Array](), targets >= 0, angles(positions)
    d = softmax(kept["logits"])
    d[np.arange(len(d)), np.maximum(targets, 0)] -= 1
    d *= (used / np.float32(used.sum()))[:, None]
    d = through_linear(kept["final_norm"], d, "tok_embeddings.weight" if config["tied"] else "output.weight", grads)
    d = through_norm(kept[f"layers.{layers - 1}.out"], d, "norm.weight", grads)
    for i in reversed(range(layers)):
        p = f"layers.{i}."
        gate, up = kept[p + "gate"], kept[p + "up"]
        dm, s = through_linear(kept[p + "ffn_mix"], d, p + "feed_forward.w2.weight", grads), 1 / (1 + np.exp(-gate))
        d_gate, d_up = dm * up * s * (1 if MISTAKE == "gradient" else 1 + gate * (1 - s)), dm * gate * s
        dx = through_linear(kept[p + "ffn_norm"], d_gate, p + "feed_forward.w1.weight", grads)
        dx += through_linear(kept[p + "ffn_norm"], d_up, p + "feed_forward.w3.weight", grads)
        d = d + through_norm(kept[p + "mid"], dx, p + "ffn_norm.weight", grads)
        d_mix = through_linear(kept[p + "attn_mix"], d, p + "attention.wo.weight", grads).reshape(-1, heads, width)
        weight, q, k, v = (kept[p + name] for name in ("P", "q_rope", "k_rope", "v"))
        dv = to_kv(np.einsum("htu,thd->uhd", weight, d_mix, optimize=True))
        dw = np.einsum("thd,uhd->htu", d_mix, kv_of(v), optimize=True)
        ds = weight * (dw - (dw * weight).sum(-1, keepdims=True)) / root
        dq = rotate(np.einsum("htu,uhd->thd", ds, kv_of(k), optimize=True), -angle)
        dk = rotate(to_kv(np.einsum("htu,thd->uhd", ds, q, optimize=True)), -angle)
        dx = sum(through_linear(kept[p + "attn_norm"], g.reshape(len(g), -1), f"{p}attention.w{n}.weight", grads)
                 for n, g in (("q", dq), ("k", dk), ("v", dv)))  # fmt: skip
        before = kept["embed"] if i == 0 else kept[f"layers.{i - 1}.out"]
        d = d + through_norm(before, dx, p + "attention_norm.weight", grads)
    table = grads.get("tok_embeddings.weight", np.zeros_like(weights["tok_embeddings.weight"]))
    np.add.at(table, tokens, d)
    return grads | {"tok_embeddings.weight": table}


def loss(logits: Array, targets: Array) -> Array:
    """Mean -log p of the labels that are not ignored, nats."""
    used = targets >= (-200 if MISTAKE == "labels" else 0)
    z = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    nats = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), np.maximum(targets, 0)]
    return np.array([nats[used].mean()])


def adamw(p: Array, gradient: Array, step: int, m: Array, v: Array) -> Array:
    """The weight after a step; m and v are changed in place. Decay of matrices alone."""
    lr, eps, decay = (np.float32(training[key][0]) for key in ("lr", "eps", "weight_decay"))
    (b1, b2), one = (np.float32(b) for b in training["betas"]), np.float32(1)
    m[:], v[:] = b1 * m + (one - b1) * gradient, b2 * v + (one - b2) * gradient * gradient
    if p.ndim > 1 or MISTAKE == "decay":
        p = p * (one - lr * decay)
    return p - lr * (m / (one - b1**step)) / (np.sqrt(v / (one - b2**step)) + eps)


def train() -> None:
    tokens, targets = load("train.tokens")[0], load("train.targets")[0]  # batch 0, a document a row
    rows, columns = np.indices(tokens.shape)
    flat = [part.reshape(-1) for part in (tokens, rows, columns)]
    kept = forward(flat[0], flat[1], flat[2], lambda name, x: None)
    emit("train.loss", loss(kept["logits"], targets.reshape(-1)))
    for name, gradient in backward(flat[0], targets.reshape(-1), flat[2], kept).items():
        emit(f"grad.{name}", gradient)
    for name in [name.removeprefix("adamw.1.") for name in table if name.startswith("adamw.1.")]:
        p, m, v = weights[name], np.zeros_like(weights[name]), np.zeros_like(weights[name])
        for step in (1, 2):
            p = adamw(p, load(f"adamw.grad.{step}.{name}"), step, m, v)
            emit(f"adamw.{step}.{name}", p)


def main() -> int:
    documents = np.repeat(np.arange(len(sequences)), sequences)
    forward(load("tokens"), documents, np.concatenate([np.arange(n) for n in sequences]), emit)
    angle = angles(load("rope.positions"))
    emit("rope.cos", np.cos(angle))
    emit("rope.sin", np.sin(angle))
    if "train.loss" in table:
        train()
    beyond = [name for name, share in shares.items() if not share <= 1]
    if beyond:
        print(f"FAIL: {len(beyond)} arrays beyond their bounds, first at {beyond[0]}")
        return 1
    worst = max(shares, key=lambda name: shares[name])
    print(f"PASS: {len(shares)} arrays within their bounds, the worst at {shares[worst]:.0%} ({worst})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
