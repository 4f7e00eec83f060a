"""The table of mistakes: ways in which implementations of Llama were seen to be wrong, each as a change to the oracle.

To add one, add a line: its name, and what of the oracle it changes. reference/mistakes/explain.py runs them.

    python -m reference.mistakes      # prints the names for the shape of Llama 3.1
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reference.files import Config
from reference.mistakes.alone import of_all_layers, of_one_layer
from reference.mistakes.angles import angles
from reference.mistakes.attention import ATTENTION, mixed, windows
from reference.oracle import math as ops
from reference.oracle.forward import STEPS, Layer, Operation, Oracle
from reference.oracle.rounding import BF16, FLOATS, FP16, NOTHING, Round, Rounded, exact, rounding

HALVES: dict[str, Round] = {"bf16": BF16, "fp16": FP16}


@dataclass(frozen=True)
class Mistake:
    """What is not given stays right."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)  # what it takes for the config's
    changed: Mapping[str, Operation] = field(default_factory=dict)  # by tap
    rounded: Rounded = NOTHING
    order: tuple[int, ...] | None = None  # of the layers
    head: Rounded | None = None  # of the output head, where not as of the layers
    whole: str | None = None  # the precision of all of its arithmetic, where that is the mistake

    def applied(self, right: Oracle) -> Oracle:
        checkpoint = replace(right.checkpoint, config=right.config | dict(self.config))
        rounded = right.rounded if self.rounded is NOTHING else self.rounded
        return replace(right, checkpoint=checkpoint, order=self.order, changed=self.changed, rounded=rounded)


def mistakes(config: Config, tokens: int, first: int = 0) -> Iterator[list[Mistake]]:
    """Those that this config can show on so many tokens, like with like, the usual ones first.

    first: the position at which the error begins; where it is not 0, lengths of windows and of tables are tried by it.
    """
    yield list(_rope(config))
    yield list(_norms(config))
    yield list(_layout(config))
    yield [Mistake(name, changed={"attn_mix": op}) for name, op in (ATTENTION | windows(config, tokens, first)).items()]
    yield list(_cache())
    yield list(_weights())
    yield list(_layers(config))
    yield list(_precision())
    yield [Mistake(name, changed=_tables(angle)) for name, angle in angles(config, tokens, first)]
    yield [Mistake(name, changed=changes) for name, changes in of_all_layers(config)]
    yield [Mistake(name, changed=changes) for name, changes in of_one_layer(config)]


# --- RoPE ------------------------------------------------------------------------------------------------------------

BASES = (10_000.0, 500_000.0, 1_000_000.0)
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
BANDS: dict[str, tuple[float, ...]] = {
    "low_freq_factor": (1.0, 2.0),
    "high_freq_factor": (2.0, 4.0, 8.0),
    "original_context": (2048, 4096, 16_384, 131_072),
}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}


def _rope(config: Config) -> Iterator[Mistake]:
    base, scaling = config["rope_theta"], config["rope_scaling"]
    for other in BASES:
        if other != base:
            says = f"the RoPE base is {other:,.0f}, the config says {base:,.0f}"
            yield Mistake(says, {"rope_theta": other})
            if scaling is not None:
                yield Mistake(f"{says}, and its scaling is dropped", {"rope_theta": other, "rope_scaling": None})
    if scaling is not None:
        yield Mistake("the RoPE scaling of the checkpoint is dropped", {"rope_scaling": None})
    for factor in FACTORS:
        if factor != 1 and factor != (scaling or {}).get("factor"):
            says = f"the config says {scaling['factor']:g}" if scaling else "the config has none"
            name = f"RoPE is scaled by a factor of {factor:g}, {says}"
            yield Mistake(name, {"rope_scaling": (scaling or LLAMA31) | {"factor": factor}})
            yield Mistake(f"every RoPE frequency is divided by {factor:g}", changed=_tables(_slower(factor)))
    for key, values in BANDS.items() if scaling else ():
        for value in values:
            other = scaling | {key: value}
            if other != scaling and other["low_freq_factor"] < other["high_freq_factor"]:
                yield Mistake(f"RoPE's {key} is {value:g}, the config says {scaling[key]:g}", {"rope_scaling": other})
    yield Mistake("RoPE is not applied", changed=_rotations(lambda x, cos, sin: x))
    yield Mistake("RoPE is applied twice", changed=_rotations(lambda x, c, s: ops.rotate(ops.rotate(x, c, s), c, s)))
    yield Mistake("RoPE turns in the wrong direction", changed=_rotations(lambda x, c, s: ops.rotate(x, c, -s)))
    yield Mistake("RoPE pairs features i and i + D/2, but the rows are in the order of pairs (2i, 2i+1)",
                  changed=_rotations(_half_split))  # fmt: skip
    yield Mistake("q/k rows of the Hugging Face file are not un-permuted", changed=_rotations(
        lambda x, cos, sin: ops.rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)))  # fmt: skip
    yield Mistake("only the first half of each head is rotated", changed=_rotations(_partial))
    yield Mistake("RoPE is applied to values too", changed={"v": lambda layer, x: layer.rotate(layer.v(x))})
    for name, low in HALVES.items():
        yield Mistake(f"the cos/sin table is kept in {name}", changed=_rotations(_table_as(low)))
        yield Mistake(f"the RoPE frequencies are kept in {name}", changed=_tables(_angles(exact, low)))
        yield Mistake(f"positions are kept in {name}", changed=_tables(_angles(low, exact)))


def _table_as(low: Round) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, cos, sin: ops.rotate(x, low(cos), low(sin))


def _angles(positions_as: Round, frequencies_as: Round) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda at, frequencies: positions_as(at) * frequencies_as(frequencies)


def _rotations(turn: Callable[..., Tensor]) -> dict[str, Operation]:
    operation: Operation = lambda layer, x: turn(x, layer.cos, layer.sin)
    return {"q_rope": operation, "k_rope": operation}


def _tables(angle: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Operation]:
    """angle(positions (N, 1), frequencies (D/2,)) in float64."""

    def turned(layer: Layer, x: Tensor) -> Tensor:
        at = torch.cat([torch.arange(len(s), dtype=torch.float64) for s in layer.oracle.sequences])[:, None]
        angles = angle(at, ops.rope_frequencies(layer.oracle.config).double())
        return ops.rotate(x, angles.cos(), angles.sin())

    return {"q_rope": turned, "k_rope": turned}


def _slower(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda at, frequencies: at * frequencies / factor


def _half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 4 * 2
    return torch.cat((ops.rotate(x[..., :half], cos[:, : half // 2], sin[:, : half // 2]), x[..., half:]), -1)


# --- Norms, embedding ------------------------------------------------------------------------------------------------

NORMS = {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}


def _all_norms(norm: Callable[[Tensor, Tensor, float], Tensor]) -> dict[str, Operation]:
    return {**_block_norms(norm), "final_norm": _final(norm)}


def _block_norms(norm: Callable[[Tensor, Tensor, float], Tensor]) -> dict[str, Operation]:
    def of(name: str) -> Operation:
        return lambda layer, x: norm(x, _weight(layer, name), layer.oracle.config["norm_eps"])

    return {tap: of(name) for tap, name in NORMS.items()}


def _weight(layer: Layer, name: str) -> Tensor:
    return layer.oracle.vector(f"layers.{layer.index}.{name}.weight")


def _final(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Operation:
    return lambda oracle, x: norm(x, oracle.vector("norm.weight"), oracle.config["norm_eps"])


def _norms(config: Config) -> Iterator[Mistake]:
    for eps in (1e-6, 1e-5, 1e-8, 1e-12, 0.0):
        if eps != config["norm_eps"]:
            says = f"{eps:g}, the config says {config['norm_eps']:g}"
            other = lambda x, w, _, eps=eps: ops.rms_norm(x, w, eps)
            yield Mistake(f"the norms' eps is {says}", {"norm_eps": eps})
            yield Mistake(f"the final norm's eps is {says}", changed={"final_norm": _final(other)})
            yield Mistake(f"the layers' norms' eps is {says}", changed=_block_norms(other))
    ways: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "add 1 to their weight": lambda x, w, eps: ops.rms_norm(x, 1 + w, eps),
        "do not apply their weight": lambda x, w, eps: ops.rms_norm(x, torch.ones_like(w), eps),
        "subtract the mean: LayerNorm in place of RMSNorm": lambda x, w, eps: ops.rms_norm(
            x - x.mean(-1, keepdim=True), w, eps
        ),
        "add eps outside of the root": lambda x, w, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w,
        "divide by the sum of squares, not their mean": lambda x, w, eps: ops.rms_norm(x, w, eps) / x.shape[-1] ** 0.5,
        "are computed in bf16": lambda x, w, eps: BF16(BF16(ops.rms_norm(BF16(x), torch.ones_like(w), eps)) * w),
        "are computed in fp16": lambda x, w, eps: FP16(FP16(ops.rms_norm(FP16(x), torch.ones_like(w), eps)) * w),
    }
    for name, low in HALVES.items():  # fp32 within, as usual, but not around
        ways[f"take and give {name}"] = lambda x, w, eps, low=low: low(ops.rms_norm(low(x), w, eps))
    for name, norm in ways.items():
        yield Mistake(f"the norms {name}", changed=_all_norms(norm))
    yield Mistake("the final norm is skipped", changed={"final_norm": lambda oracle, x: x})
    yield Mistake("the layers' norms are skipped", changed=_block_norms(lambda x, w, eps: x))
    exchanged = {tap: _norm_of(name) for tap, name in zip(NORMS, reversed(NORMS.values()), strict=True)}
    yield Mistake("attention's and feed-forward's norm weights are exchanged", changed=exchanged)
    yield Mistake("each norm follows its block, not the other way round", changed={
        "attn_norm": lambda layer, x: x,
        "attn_out": lambda layer, x: layer.attn_norm(layer.attn_out(x)),
        "ffn_norm": lambda layer, x: x,
        "ffn_out": lambda layer, x: layer.ffn_norm(layer.ffn_out(x))})  # fmt: skip
    yield Mistake("each norm is taken of the sum after its block", changed={
        "attn_norm": lambda layer, x: x,
        "mid": lambda layer, x, y: layer.attn_norm(x + y),
        "ffn_norm": lambda layer, x: x,
        "out": lambda layer, x, y: layer.ffn_norm(x + y)})  # fmt: skip
    yield Mistake("the feed-forward's residual is taken after the norm", changed={
        "out": lambda layer, x, y: layer.ffn_norm(x) + y})  # fmt: skip
    yield Mistake("the attention's residual is taken after the norm", changed={
        "mid": lambda layer, x, y: layer.attn_norm(x) + y})  # fmt: skip
    yield Mistake("the attention's output is not added", changed={"mid": lambda layer, x, y: x})
    yield Mistake("the feed-forward's output is not added", changed={"out": lambda layer, x, y: x})
    yield Mistake("the residual around attention is lost", changed={"mid": lambda layer, x, y: y})
    yield Mistake("the residual around the feed-forward is lost", changed={"out": lambda layer, x, y: y})
    root = math.sqrt(config["dim"])
    yield Mistake("the embedding is multiplied by sqrt(dim)", changed={"embed": lambda oracle: oracle.embed() * root})
    yield Mistake("queries and keys are normed (QK-norm)", changed={
        "q": lambda layer, x: _unit(layer.q(x), layer), "k": lambda layer, x: _unit(layer.k(x), layer)})  # fmt: skip


def _norm_of(name: str) -> Operation:
    return lambda layer, x: ops.rms_norm(x, _weight(layer, name), layer.oracle.config["norm_eps"])


def _unit(x: Tensor, layer: Layer) -> Tensor:
    return ops.rms_norm(x, torch.ones(()).double(), layer.oracle.config["norm_eps"])


# --- Which weight is where -------------------------------------------------------------------------------------------


def _layout(config: Config) -> Iterator[Mistake]:
    if not config["tied"]:
        yield Mistake("the embedding is used as the output head", {"tied": True})
    yield Mistake("gate and up are swapped", changed={"gate": Layer.up, "up": Layer.gate})
    yield Mistake("the weights of k and v are exchanged", changed={"k": Layer.v, "v": Layer.k})
    tanh: Operation = lambda layer, g, u: torch.nn.functional.gelu(g, approximate="tanh") * u
    activations: dict[str, Operation] = {
        "GELU": lambda layer, g, u: torch.nn.functional.gelu(g) * u,
        "tanh-GELU": tanh,
        "ReLU": lambda layer, g, u: g.relu() * u,
        "a sigmoid": lambda layer, g, u: g.sigmoid() * u,
        "SiLU of 1.702 x (quick GELU)": lambda layer, g, u: g * (1.702 * g).sigmoid() * u,
    }
    for name, operation in activations.items():
        yield Mistake(f"the activation is {name}, not SiLU", changed={"ffn_mix": operation})


def _layers(config: Config) -> Iterator[Mistake]:
    n = config["n_layers"]
    whole = tuple(range(n))
    for i in whole if n > 1 else ():
        yield Mistake(f"layer {i} is skipped", order=whole[:i] + whole[i + 1 :])
        yield Mistake(f"layer {i} runs twice", order=whole[: i + 1] + whole[i:])
    for i in whole[:-1]:
        yield Mistake(f"layers {i} and {i + 1} are swapped", order=(*whole[:i], i + 1, i, *whole[i + 2 :]))
    if n > 2:
        yield Mistake("the layers run in reverse order", order=whole[::-1])


# --- Precision -------------------------------------------------------------------------------------------------------


def _cache() -> Iterator[Mistake]:
    for name in (*FLOATS, "int8", "int4"):
        yield Mistake(f"keys and values are kept in {name}", rounded=Rounded(cache=rounding(name)))


INTEGERS = ("int8", "int8/32", "int8/64", "int8/128", "int4/32", "int4/64", "int4/128", "int4", "int6/16", "int5/32")


def ggml_q8_0(x: Tensor) -> Tensor:
    """(n, K), K a multiple of 32 -> blocks of 32 with a scale stored in fp16: weights, and inputs of products."""
    if x.shape[-1] % 32:
        return x
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / torch.where(step == 0, 1.0, step)).round() * FP16(step)).flatten(-2)


def ggml_q4_0(x: Tensor) -> Tensor:
    """(n, K), K a multiple of 32 -> blocks of 32 by 16 steps, the largest number of a block being -8 of them."""
    if x.shape[-1] % 32:
        return x
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    step = largest / -8
    steps = (blocks / torch.where(step == 0, 1.0, step) + 8.5).floor().clamp(0, 15) - 8
    return (steps * FP16(step)).flatten(-2)


def _weights() -> Iterator[Mistake]:
    """Weights, inputs of linear layers, and both; with the output head and without it."""
    ways = {name: rounding(name) for name in (*INTEGERS, *FLOATS)}
    ways["fp8 with a scale for each row"] = rounding("fp8/row")
    both = [("int8/32", "int8/32"), ("int8", "int8")]
    both += [("fp8 with a scale for each row", "fp8 with a scale for each row")]
    for head, but in ((None, ""), (NOTHING, ", not of the head,")):
        for name, way in ways.items():
            yield Mistake(f"weights{but} are rounded to {name}", rounded=Rounded(weights=way), head=head)
        for name in ("int8/32", "int8", *FLOATS):
            rounded = Rounded(inputs=rounding(name))
            yield Mistake(f"the inputs of linear layers{but} are rounded to {name}", rounded=rounded, head=head)
    for weights, inputs in both:
        yield Mistake(f"weights are rounded to {weights}, the inputs of linear layers to {inputs}",
                      rounded=Rounded(ways[weights], ways[inputs]))  # fmt: skip
    q8 = Rounded(ggml_q8_0, ggml_q8_0)
    for name, way in {"Q8_0": ggml_q8_0, "Q4_0": ggml_q4_0}.items():
        says = f"weights and embedding are ggml's {name}, inputs of linear layers Q8_0"
        yield Mistake(says, rounded=Rounded(way, ggml_q8_0), head=q8, changed={"embed": _embed_as(way)})
        yield Mistake(f"weights are rounded to ggml's {name}", rounded=Rounded(way), head=Rounded(ggml_q8_0))
    for name, low in HALVES.items():
        yield Mistake(f"linear layers compute in {name}: their weights and inputs", rounded=Rounded(low, low))


def _embed_as(way: Round) -> Operation:
    return lambda oracle: way(oracle.embed())


def _precision() -> Iterator[Mistake]:
    for name, low in HALVES.items():
        rounded: Operation = lambda layer, x, y, low=low: low(x + y)
        yield Mistake(f"the residual stream is kept in {name}", changed={"mid": rounded, "out": rounded})
        yield Mistake(f"it computes in {name}", changed=everything(low), rounded=Rounded(low, low), whole=name)


def everything(low: Round) -> dict[str, Operation]:
    """Each operation's result rounded, and where most write several operations, each of theirs."""
    normed = _all_norms(lambda x, w, eps: low(low(ops.rms_norm(x, torch.ones_like(w), eps)) * w))
    right: dict[str, Operation] = {tap: operation for tap, _, operation in STEPS} | normed
    right |= {"embed": Oracle.embed, "attn_mix": mixed(scores_as=low, weights_as=low)}
    right["ffn_mix"] = lambda layer, gate, up: low(torch.nn.functional.silu(gate)) * up

    def rounded(operation: Operation) -> Operation:
        return lambda layer, *inputs: low(operation(layer, *inputs))

    return {tap: rounded(operation) for tap, operation in right.items()}
