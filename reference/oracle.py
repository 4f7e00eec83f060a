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

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference import oracle_math as ops
from reference.command import Parser, parse, parser, run_command
from reference.driver import set_numerics, versions, weight_hashes, write_rope
from reference.files import Checkpoint, open_folder
from reference.oracle_trace import OtherTrace
from reference.protocol import (
    TRACE_SCHEMA,
    Case,
    Taps,
    check_positions,
    check_sequences,
    progress,
    read_case,
    write_json,
)
from reference.rounding import NOTHING, Rounded
from reference.weights import DTYPES, Unusable, row_blocks

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


def run_case(
    case: Case, out: Path, ops_of: Path | None = None, rounded: Rounded = NOTHING, off_ulp: float = 0.0
) -> None:
    """Write the oracle's trace, or with `ops_of` its values of that trace's operations."""
    set_numerics(case.threads)
    checkpoint = open_folder(case.checkpoint)
    groups = rounding_groups(checkpoint, case.dtypes)
    if ops_of is None:
        sequences, positions = _prompts(case, checkpoint), case.positions
        lossless = [name for name in case.dtypes if groups[name] is None]
        folders = {name: lossless[0] if name in lossless else name for name in case.dtypes}
    else:
        sequences, positions = OtherTrace.sequences(ops_of), None
        folders = {name: name for name in case.dtypes}
    check_sequences(sequences, checkpoint.config["vocab_size"])
    check_positions(positions, sequences)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for i, folder in enumerate(sorted(set(folders.values()), key=case.dtypes.index)):
        oracle = Oracle(checkpoint, sequences, groups[folder], off_ulp=off_ulp, rounded=rounded)
        taps = Taps(
            out / folder,
            checkpoint.config,
            lengths=[len(sequence) for sequence in sequences],
            positions=positions,
            dtype=torch.float64 if positions is None else torch.float32,
            logits_dtype=torch.float64,
            record=case.record if ops_of is None else "taps",
        )
        other = None if ops_of is None else OtherTrace(ops_of, folder, sequences)
        _run(oracle, taps, other, i / len(set(folders.values())), 1 / len(set(folders.values())))
    seconds = time.perf_counter() - started
    training = None
    if case.training is not None and ops_of is None:
        from reference.oracle_training import train  # which is built on this module

        training = train(checkpoint, case.training, out)
    rows = torch.tensor(case.rope_positions, dtype=torch.long)
    write_rope(out, *ops.rope_table(checkpoint.config, rows, off_ulp))
    write_json(
        out / "trace.json",
        {
            "schema": TRACE_SCHEMA,
            "implementation": "oracle" if ops_of is None else "oracle-ops",
            "versions": versions(()) | {"threads": str(case.threads), "device": "cpu"},
            "config": checkpoint.config,
            "sequences": sequences,
            "prompt_lengths": [len(sequence) for sequence in sequences],
            "positions": positions,
            "dtypes": folders,
            "streamed": dict.fromkeys(case.dtypes, True),
            "generated_by": None,
            "seconds_forward": seconds,
            "errata": [],
            "notices": list(checkpoint.notices),
            "token_ids": None,
            "corpus_ids": None,
            "dialog_ids": None,
            "weights": weight_hashes(checkpoint) if case.weights else None,
            "training": training,
        },
    )
    progress("done", 1.0)


def _run(oracle: Oracle, taps: Taps, other: OtherTrace | None, done: float, share: float) -> None:
    n_layers = oracle.config["n_layers"]

    def emit(name: str, packed: Tensor) -> None:
        for s, value in enumerate(oracle.split(packed)):
            taps.put(s, name, value)

    def stage(layer: int) -> None:
        taps.close(f"layers.{layer - 1}")
        progress(f"oracle layer {layer + 1}/{n_layers}", done + share * layer / (n_layers + 1))

    with torch.inference_mode():
        normed = forward(oracle, emit, stage) if other is None else teacher_forced(oracle, other, emit, stage)
        progress("oracle output head", done + share * n_layers / (n_layers + 1))
        for start, stop, block in oracle.logit_blocks(normed):
            for s, value in enumerate(oracle.split(block)):
                taps.target(s, "logits")[:, start:stop].copy_(value)
    taps.finish()


def _prompts(case: Case, checkpoint: Checkpoint) -> list[list[int]]:
    """The oracle generates nothing: a case for it holds the sequences that another implementation made."""
    if case.prompts is not None:
        return case.prompts
    if case.texts is None:
        raise Unusable(f"{case.checkpoint}: the case has neither prompts nor texts")
    from reference.meta_text import open_text

    text = open_text(checkpoint, case.tokenizer)
    return [text.encode(one, bos=True) for one in case.texts]


def next_tokens(
    checkpoint: Checkpoint, tokens: list[int], dtype: str, rounded: Rounded = NOTHING, count: int = 5
) -> list[tuple[int, float]]:
    """The likeliest next tokens with their logits."""
    oracle = Oracle(checkpoint, [tokens], rounding_groups(checkpoint, (dtype,))[dtype], rounded=rounded)
    with torch.inference_mode():
        last = forward(oracle, lambda name, value: None)[-1:]
        logits = torch.cat([block[0] for _, _, block in oracle.logit_blocks(last)])
    best = logits.topk(min(count, len(logits)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def add_conditions(flags: Parser) -> None:
    """What is rounded, by declaration."""
    flags.add_argument("--integers", metavar="SCHEME", help="round weights to int8 (a scale a row), int4/32, ... first")
    flags.add_argument("--activations", metavar="SCHEME", help="round the inputs of linear layers: int8/32, fp16, ...")
    flags.add_argument("--kv", metavar="SCHEME", help="round keys and values: fp16, bf16, fp8, int8 (a scale a head)")
    flags.add_argument("--attention_dtype", metavar="SCHEME", help="round queries and attention weights: fp16, bf16")


def main(arguments: list[str]) -> None:
    flags = parser("reference.oracle", "The float64 forward pass that the references are judged by.")
    flags.add_argument("--ops", type=Path, help="trace folder whose operations are computed on its own inputs")
    add_conditions(flags)
    flags.add_argument("--off_ulp", type=float, default=0.0, metavar="N", help="RoPE frequencies off by N ulp")
    options = parse(flags, arguments)
    rounded = Rounded.declared(options.integers, options.activations, options.kv, options.attention_dtype)
    if options.case is not None:
        run_case(read_case(options.case), options.out, options.ops, rounded, options.off_ulp)
        return
    from reference.meta_text import open_text

    set_numerics(options.threads)
    checkpoint = open_folder(options.ckpt)
    text = open_text(checkpoint, options.tokenizer)
    tokens = text.encode(options.prompt, bos=True)
    check_sequences([tokens], checkpoint.config["vocab_size"])
    best = next_tokens(checkpoint, tokens, options.dtype, rounded)
    print(f"{'token':>7} {'logit':>9} {'margin':>9}  text")
    for token, logit in best:
        print(f"{token:7d} {logit:9.4f} {best[0][1] - logit:9.4f}  {text.decode([token])!r}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
