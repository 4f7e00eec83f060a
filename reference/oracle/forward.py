"""The third reference: an independent float64 forward pass, one layer in memory at a time.

It judges the other two: their rounding error is measured against it. Weights are first rounded to the run dtype, then
upcast; run dtypes to which the stored weights convert without loss share one folder of results.

With --ops it computes every operation on another trace's own inputs instead, so that each operation of that trace
can be judged alone. With --integers its linear layers' weights are rounded to integers first, with --activations these
layers' inputs, with --kv the keys and values: the error that no implementation of such numbers can avoid. With
--off_ulp its RoPE frequencies are coarse: how much of a table's rounding reaches each tap.

    python -m reference.oracle --case case.json --out DIR [--ops TRACE_DIR | --integers int8 | --kv fp16 | --off_ulp 4]
    python -m reference.oracle --ckpt Meta-Llama-3.1-8B --prompt "Simply put,"    # likeliest next tokens, margins
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reference.files import Checkpoint
from reference.files.weights import DTYPES, row_blocks
from reference.oracle import math as ops
from reference.oracle.rounding import NOTHING, Rounded
from reference.oracle.trace import OtherTrace

BLOCK_BYTES = 1 << 28  # of float64 weights at a time

LOSSLESS = {  # stored dtype -> run dtypes that hold its numbers exactly
    torch.float32: ("fp32",),
    torch.bfloat16: ("fp32", "bf16"),
    torch.float16: ("fp32", "fp16"),
}

Emit = Callable[[str, Tensor], None]
Operation = Callable[..., Tensor]  # (layer, inputs as in STEPS); of embed and final_norm: (oracle, inputs)


@dataclass(frozen=True)
class Oracle:
    """A checkpoint, a case's sequences one after another (N tokens), what is rounded, and what is done otherwise."""

    checkpoint: Checkpoint
    sequences: list[list[int]]
    rounding: torch.dtype | None  # of all weights; None: the stored numbers as they are
    block_bytes: int = BLOCK_BYTES
    off_ulp: float = 0.0  # of each RoPE frequency
    rounded: Rounded = NOTHING
    order: tuple[int, ...] | None = None  # of the layers; None: each once
    changed: Mapping[str, Operation] = field(default_factory=dict)  # by tap, of every layer: in place of the right one

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def split(self, packed: Tensor) -> list[Tensor]:
        """(N, ...) -> (T, ...) per sequence."""
        return list(packed.split([len(sequence) for sequence in self.sequences]))

    def rope(self) -> tuple[Tensor, Tensor]:
        positions = torch.cat([torch.arange(len(sequence)) for sequence in self.sequences])
        return ops.rope_table(self.config, positions, self.off_ulp)

    def vector(self, name: str) -> Tensor:
        return self.checkpoint.weights.load(name, self.rounding or torch.float64).double()

    def blocks(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """A matrix in float64, some rows at a time."""
        shape = self.checkpoint.weights.shapes[name]
        for start, stop in row_blocks(shape, torch.float64, self.block_bytes):
            rows = self.checkpoint.weights.load(name, self.rounding or torch.float64, start=start, stop=stop).double()
            yield start, stop, self.rounded.weights(rows)

    def embed(self) -> Tensor:
        tokens = torch.tensor([token for sequence in self.sequences for token in sequence])
        return self.checkpoint.weights.embed(tokens, self.rounding or torch.float64).double()  # (N, dim)

    def final_norm(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.vector("norm.weight"), self.config["norm_eps"])

    def logit_blocks(self, normed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(N, dim) -> (start, stop, (N, stop - start)) over the vocabulary."""
        inputs = self.rounded.inputs(normed)
        for start, stop, rows in self.blocks(self.checkpoint.head):
            yield start, stop, inputs @ rows.T


@dataclass(frozen=True)
class Layer:
    """The operations of one layer, one method per tap."""

    oracle: Oracle
    index: int
    cos: Tensor  # (N, D/2) float32
    sin: Tensor

    def _linear(self, name: str, x: Tensor) -> Tensor:
        name = f"layers.{self.index}.{name}.weight"
        return ops.linear(
            self.oracle.rounded.inputs(x), self.oracle.blocks(name), self.oracle.checkpoint.weights.shapes[name][0]
        )

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return self._linear(name, x).unflatten(-1, (-1, self.oracle.config["head_dim"]))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.oracle.vector(f"layers.{self.index}.{name}.weight")
        return ops.rms_norm(x, weight, self.oracle.config["norm_eps"])

    def attn_norm(self, x: Tensor) -> Tensor:
        return self._norm("attention_norm", x)

    def q(self, x: Tensor) -> Tensor:
        return self._heads("attention.wq", x)

    def k(self, x: Tensor) -> Tensor:
        return self._heads("attention.wk", x)

    def v(self, x: Tensor) -> Tensor:
        return self._heads("attention.wv", x)

    def rotate(self, x: Tensor) -> Tensor:
        return ops.rotate(x, self.cos, self.sin)

    def attn_mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rounded = self.oracle.rounded
        inputs = (rounded.attention(q), rounded.cache(k), rounded.cache(v))
        parts = zip(*(self.oracle.split(x) for x in inputs), strict=True)
        return torch.cat([ops.attention(q, k, v, rounded.attention) for q, k, v in parts])

    def attn_out(self, x: Tensor) -> Tensor:
        return self._linear("attention.wo", x)

    def ffn_norm(self, x: Tensor) -> Tensor:
        return self._norm("ffn_norm", x)

    def gate(self, x: Tensor) -> Tensor:
        return self._linear("feed_forward.w1", x)

    def up(self, x: Tensor) -> Tensor:
        return self._linear("feed_forward.w3", x)

    def ffn_mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.silu_mul(gate, up)

    def ffn_out(self, x: Tensor) -> Tensor:
        return self._linear("feed_forward.w2", x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


STEPS: tuple[tuple[str, tuple[str, ...], Callable[..., Tensor]], ...] = (  # tap, its inputs, the operation
    ("attn_norm", ("in",), Layer.attn_norm),
    ("q", ("attn_norm",), Layer.q),
    ("k", ("attn_norm",), Layer.k),
    ("v", ("attn_norm",), Layer.v),
    ("q_rope", ("q",), Layer.rotate),
    ("k_rope", ("k",), Layer.rotate),
    ("attn_mix", ("q_rope", "k_rope", "v"), Layer.attn_mix),
    ("attn_out", ("attn_mix",), Layer.attn_out),
    ("mid", ("in", "attn_out"), Layer.add),  # the residual stream between the halves: no tap of its own
    ("ffn_norm", ("mid",), Layer.ffn_norm),
    ("gate", ("ffn_norm",), Layer.gate),
    ("up", ("ffn_norm",), Layer.up),
    ("ffn_mix", ("gate", "up"), Layer.ffn_mix),
    ("ffn_out", ("ffn_mix",), Layer.ffn_out),
    ("out", ("mid", "ffn_out"), Layer.add),
)


def forward(oracle: Oracle, emit: Emit, stage: Callable[[int], None] = lambda layer: None) -> Tensor:
    """Free-running: each operation on the oracle's own values. Returns the final norm, (N, dim)."""
    x = oracle.changed.get("embed", Oracle.embed)(oracle)
    emit("embed", x)
    cos, sin = oracle.rope()
    order = range(oracle.config["n_layers"]) if oracle.order is None else oracle.order
    for place, index in enumerate(order):
        stage(place)
        layer, values = Layer(oracle, index, cos, sin), {"in": x}
        for tap, inputs, right in STEPS:
            operation = oracle.changed.get(tap, right)
            values[tap] = operation(layer, *(values[name] for name in inputs))
            if tap != "mid":
                emit(f"layers.{place}.{tap}", values[tap])
        x = values["out"]
    normed = oracle.changed.get("final_norm", Oracle.final_norm)(oracle, x)
    emit("final_norm", normed)
    return normed


def teacher_forced(oracle: Oracle, other: OtherTrace, emit: Emit, stage: Callable[[int], None]) -> Tensor:
    """Each operation on the inputs that the other trace recorded. Returns its final norm, the input of its head."""
    emit("embed", oracle.embed())
    cos, sin = oracle.rope()
    for index in range(oracle.config["n_layers"]):
        stage(index)
        layer, given = Layer(oracle, index, cos, sin), other.layer_inputs(index)
        for tap, inputs, operation in STEPS:
            if tap != "mid":
                emit(f"layers.{index}.{tap}", operation(layer, *(given(name) for name in inputs)))
    emit("final_norm", oracle.final_norm(other.last_out()))
    return other.read("final_norm")


def rounding_groups(checkpoint: Checkpoint, dtypes: tuple[str, ...]) -> dict[str, torch.dtype | None]:
    """Run dtype -> rounding of the weights; None where the stored numbers survive."""
    stored = set(checkpoint.weights.dtypes.values())
    return {name: None if all(name in LOSSLESS[kind] for kind in stored) else DTYPES[name] for name in dtypes}
