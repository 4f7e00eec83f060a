"""Mistakes of one layer, of one of two norms or of one kind of matrix alone: the rest of the model is right."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from reference.files import Config
from reference.mistakes.attention import causal, mixed
from reference.oracle import math as ops
from reference.oracle.forward import STEPS, Layer, Operation, Oracle
from reference.oracle.rounding import Round, rounding

Changes = Mapping[str, Operation]
RIGHT: dict[str, Operation] = {tap: operation for tap, _, operation in STEPS}
MATRICES = {
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "attn_out": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "ffn_out": "feed_forward.w2",
}
HEADS = ("q", "k", "v")
FEW = 6  # layers that are asked one by one: of a deep model the first and the last ones
SCHEMES = ("int8", "int4/32", "fp8", "bf16", "fp16")


def of_one_layer(config: Config) -> Iterator[tuple[str, Changes]]:
    """(name, what is done otherwise) of every layer that is asked; none of one that is all there is."""
    n = config["n_layers"]
    for i in range(n if n > 1 else 0) if n <= FEW else (*range(FEW // 2), *range(n - FEW // 2, n)):
        for name, changes in {**_kinds(config), **_other_weights(i, n)}.items():
            yield f"{name} in layer {i} alone", {tap: only(i, tap, operation) for tap, operation in changes.items()}


def only(index: int, tap: str, operation: Operation) -> Operation:
    right = RIGHT[tap]
    return lambda layer, *inputs: (operation if layer.index == index else right)(layer, *inputs)


def _kinds(config: Config) -> dict[str, Changes]:
    skipped: Operation = lambda layer, x: x
    found: dict[str, Changes] = {
        "gate and up are swapped": {"gate": Layer.up, "up": Layer.gate},
        "the weights of k and v are exchanged": {"k": Layer.v, "v": Layer.k},
        "attention's norm is skipped": {"attn_norm": skipped},
        "the feed-forward's norm is skipped": {"ffn_norm": skipped},
        "the two norm weights are exchanged": {"attn_norm": Layer.ffn_norm, "ffn_norm": Layer.attn_norm},
        "RoPE is not applied": {"q_rope": skipped, "k_rope": skipped},
        "RoPE is not applied to keys": {"k_rope": skipped},
        "the causal mask is off by one: each token sees the next": {"attn_mix": mixed(see=lambda t, s: s <= t + 1)},
        "there is no causal mask": {"attn_mix": mixed(see=lambda t, s: s >= 0)},
        "the scores are not divided by sqrt(head_dim)": {"attn_mix": mixed(scale=lambda config: 1.0)},
        "query heads take kv heads in turn (h % K), not in blocks": {
            "attn_mix": mixed(heads=lambda x, n: x.repeat(1, n, 1))
        },
        "the attention's output is not added": {"mid": lambda layer, x, y: x},
        "the feed-forward's output is not added": {"out": lambda layer, x, y: x},
        "the up projection is left out": {"ffn_mix": lambda layer, gate, up: torch.nn.functional.silu(gate)},
    }
    dim, heads = config["dim"], config["n_heads"] * config["head_dim"]
    square = [tap for tap in ("q", "attn_out") if dim == heads]
    square += ["k", "v"] if dim == config["n_kv_heads"] * config["head_dim"] else []
    return found | {f"{MATRICES[tap]} is transposed": {tap: by_matrix(tap, Tensor.t)} for tap in square}


def _other_weights(i: int, n: int) -> dict[str, Changes]:
    """A matrix of the layer before, or of the one behind."""
    return {
        f"{name} is that of layer {j},": {tap: of_layer(tap, j)}
        for tap, name in MATRICES.items()
        for j in (i - 1, i + 1)
        if 0 <= j < n
    }


def of_layer(tap: str, index: int) -> Operation:
    right = RIGHT[tap]
    return lambda layer, x: right(Layer(layer.oracle, index, layer.cos, layer.sin), x)


def by_matrix(tap: str, change: Callable[[Tensor], Tensor]) -> Operation:
    """A linear layer whose whole matrix is changed first."""

    def linear(layer: Layer, x: Tensor) -> Tensor:
        rows = [rows for _, _, rows in layer.oracle.blocks(f"layers.{layer.index}.{MATRICES[tap]}.weight")]
        out = layer.oracle.rounded.inputs(x) @ change(torch.cat(rows)).t()
        return out.unflatten(-1, (-1, layer.oracle.config["head_dim"])) if tap in HEADS else out

    return linear


def of_all_layers(config: Config) -> Iterator[tuple[str, Changes]]:
    """One of two norms, one kind of matrix, one kind of result."""
    for eps in (1e-6, 1e-5, 1e-8, 0.0):
        for tap, norm in (("attn_norm", "attention_norm"), ("ffn_norm", "ffn_norm")):
            if eps != config["norm_eps"]:
                says = f"{norm}'s eps is {eps:g}, the config says {config['norm_eps']:g}"
                yield says, {tap: _with_eps(norm, eps)}
    for tap, name in MATRICES.items():
        for scheme in SCHEMES:
            yield f"{name} alone is rounded to {scheme}", {tap: by_matrix(tap, rounding(scheme))}
    for name in ("bf16", "fp16"):
        low = rounding(name)
        yield f"the residual stream is rounded to {name} after each layer", {"out": _after("out", low)}
        yield (
            f"the activation's result is rounded to {name}",
            {"ffn_mix": lambda layer, gate, up, low=low: low(torch.nn.functional.silu(gate)) * up},
        )
        for tap in ("ffn_mix", "attn_mix", "attn_out", "ffn_out", "attn_norm", "ffn_norm"):
            yield f"{tap} alone is rounded to {name}", {tap: _after(tap, low)}
    yield "the up projection is left out", {"ffn_mix": lambda layer, gate, up: torch.nn.functional.silu(gate)}
    yield "RoPE is not applied to keys", {"k_rope": lambda layer, x: x}
    yield "no token sees the first one, once there are 16 behind it", {"attn_mix": mixed(see=_forgets_first)}
    yield "the first token's embedding is zero", {"embed": _without_first}


def _with_eps(norm: str, eps: float) -> Operation:
    return lambda layer, x: ops.rms_norm(x, layer.oracle.vector(f"layers.{layer.index}.{norm}.weight"), eps)


def _after(tap: str, low: Round) -> Operation:
    right = RIGHT[tap]
    return lambda layer, *inputs: low(right(layer, *inputs))


def _forgets_first(t: Tensor, s: Tensor) -> Tensor:
    return causal(t, s) & ((s > 0) | (t < 16))


def _without_first(oracle: Oracle) -> Tensor:
    starts = torch.tensor([n for sequence in oracle.sequences for n in range(len(sequence))])
    return torch.where((starts == 0)[:, None], 0.0, oracle.embed())
