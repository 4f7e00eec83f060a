"""Which parameter of a module is which weight of the checkpoint: by shape and name and, where these leave a choice, by
which choice computes the checkpoint's logits.

Blocks are told by the number in their parameters' names. q, k, v may be one matrix, gate and up as well; rows of q and
k may be in Meta's order, in which features 2j and 2j+1 turn together, or in Hugging Face's, j and j + D/2.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parity.candidates.nano.opening import ModelConfig
from parity.contract import UsageError

MOST = 400  # choices that are tried
Shape = tuple[int, ...]
# Weight of a block -> how its parameter is called, without the final `.weight`.
CALLED: dict[str, str] = {
    "attention.wq": r"wq|q_proj|w_?query|query|to_q|q",
    "attention.wk": r"wk|k_proj|w_?key|key|to_k|k",
    "attention.wv": r"wv|v_proj|w_?value|value|to_v|v",
    "attention.wo": r"wo|o_proj|out_proj|output_proj|c_proj|proj|dense|to_out|o",
    "feed_forward.w1": r"w1|gate_proj|gate|w_gate",
    "feed_forward.w3": r"w3|up_proj|up|w_up",
    "feed_forward.w2": r"w2|down_proj|down|w_down|c_proj|proj",
    "attention_norm": r"attention_norm|attn_norm|input_layernorm|sa_norm|input_norm",
    "ffn_norm": r"ffn_norm|mlp_norm|post_attention_layernorm|post_attention_norm|ff_norm",
}
EMBEDDING, HEAD = r"emb|wte|tok", r"output|head|unembed|lm_|logits|final_proj"
FUSED = {"qkv": ("attention.wq", "attention.wk", "attention.wv"), "gate_up": ("feed_forward.w1", "feed_forward.w3")}


@dataclass(frozen=True)
class Choice:
    """One way to read a module. blocks: parameter within a block -> weight, or "qkv", "gate_up"."""

    blocks: tuple[tuple[str, str], ...]
    half: bool  # q and k rows as Hugging Face has them
    grouped: bool = False  # a fused q, k, v is so for each kv head
    swapped: bool = False  # a fused gate and up begins with up

    def said(self) -> str:
        order = "j and j + D/2 (Hugging Face's)" if self.half else "2j and 2j+1 (Meta's)"
        return f"rows of q and k are in the order in which features {order} turn together"


@dataclass(frozen=True)
class Layout:
    """The parameters of a module: those of its blocks by their name in one, and the three others."""

    block: str  # "layers.{}." with the block's number
    within: tuple[tuple[str, Shape], ...]
    outer: tuple[tuple[str, str], ...]  # parameter -> tok_embeddings, norm, output


def slots(config: ModelConfig) -> dict[str, Shape]:
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    return {"attention.wq": (q, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim), "attention.wo": (dim, q),
            "feed_forward.w1": (hidden, dim), "feed_forward.w3": (hidden, dim), "feed_forward.w2": (dim, hidden),
            "attention_norm": (dim,), "ffn_norm": (dim,)}  # fmt: skip


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """All, tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def layout(model: nn.Module, config: ModelConfig) -> Layout:
    """Raises UsageError for a module whose parameters are not a Llama's of this config."""
    found: dict[str, dict[int, dict[str, Shape]]] = defaultdict(lambda: defaultdict(dict))
    outer: dict[str, Shape] = {}
    for name, value in parameters(model).items():
        if match := re.match(r"(.*?\.|)(\d+)\.(.+)", name):
            found[match[1] + "{}."][int(match[2])][match[3]] = tuple(value.shape)
        else:
            outer[name] = tuple(value.shape)
    blocks = [(prefix, by) for prefix, by in found.items() if sorted(by) == list(range(config.n_layers))]
    if len(blocks) != 1 or len(found) > 1:
        raise UsageError(f"torch: of {len(outer)} parameters and {sorted(found)}, none are {config.n_layers} blocks")
    (prefix, by), = blocks  # fmt: skip
    for number, block in by.items():
        if block != by[0]:
            raise UsageError(f"torch: block {number} has other parameters than block 0")
    return Layout(prefix, tuple(by[0].items()), tuple(_outer(outer, config).items()))


def _outer(found: dict[str, Shape], config: ModelConfig) -> dict[str, str]:
    """Embedding, final norm and head."""
    table, named = (config.vocab_size, config.dim), {}
    for name, shape in found.items():
        if shape == (config.dim,):
            named[name] = "norm"
        elif shape == table and re.search(HEAD, name.lower()):
            named[name] = "output"
        elif shape == table and re.search(EMBEDDING, name.lower()):
            named[name] = "tok_embeddings"
        else:
            raise UsageError(f"torch: parameter {name} {shape} is no weight of the checkpoint; nearest by shape "
                             f"{nearest(shape, {'tok_embeddings': table, 'norm': (config.dim,)})}")  # fmt: skip
    if {"tok_embeddings", "norm"} - set(named.values()) or ("output" not in named.values() and not config.tied):
        missing = next(w for w in ("tok_embeddings", "norm", "output") if w not in named.values())
        shape = (config.dim,) if missing == "norm" else table
        raise UsageError(f"torch: no parameter is {missing}.weight {shape}; nearest by shape {nearest(shape, found)}")
    return named


def nearest(shape: Shape, among: Mapping[str, Shape]) -> str:
    """The name and shape that is least off, in words."""
    if not among:
        return "none"
    off = lambda other: sum(abs(a - b) for a, b in itertools.zip_longest(shape, other, fillvalue=0))
    name = min(among, key=lambda n: off(among[n]))
    return f"{name} {among[name]}"


# --- Choices ---------------------------------------------------------------------------------------------------------


def choices(found: Layout, config: ModelConfig) -> list[Choice]:
    """Every reading that shapes and names allow. Raises UsageError where there is none."""
    readings = list(itertools.islice(_readings(dict(found.within), config), MOST))
    kinds = {kind for reading in readings for _, kind in reading}
    ways = itertools.product(
        (False, True), (False, True)[: 1 + ("qkv" in kinds)], (False, True)[: 1 + ("gate_up" in kinds)]
    )
    return [Choice(r, *way) for way in ways for r in readings][:MOST]


def _readings(block: dict[str, Shape], config: ModelConfig) -> Iterator[tuple[tuple[str, str], ...]]:
    wanted = _wanted(block, config)
    named = {weight: _called(weight, shape, block) for weight, shape in wanted.items()}
    twice = [n for n, count in Counter(named.values()).items() if count > 1]
    fixed = {n: w for w, n in named.items() if n is not None and n not in twice}
    groups = []
    for shape in dict.fromkeys(wanted.values()):
        left = [w for w, s in wanted.items() if s == shape and w not in fixed.values()]
        free = [n for n, s in block.items() if s == shape and n not in fixed]
        groups.append([tuple(zip(order, left, strict=True)) for order in itertools.permutations(free)])
    for chosen in itertools.product(*groups):
        yield (*fixed.items(), *(pair for group in chosen for pair in group))


def _wanted(block: dict[str, Shape], config: ModelConfig) -> dict[str, Shape]:
    """The weights of a block, fused where the module has them so: exactly the shapes that are there."""
    variants = []
    for fused in ((), ("qkv",), ("gate_up",), ("qkv", "gate_up")):
        wanted = slots(config)
        for kind in fused:
            rows = sum(wanted.pop(part)[0] for part in FUSED[kind])
            wanted[kind] = (rows, config.dim)
        variants.append(wanted)
    there = Counter(block.values())
    for wanted in variants:
        if Counter(wanted.values()) == there:
            return wanted
    wanted = next((w for w in variants if len(w) == len(block)), variants[0])
    missing = Counter(wanted.values()) - there
    for weight, shape in wanted.items():
        if shape in missing:
            others = {n: s for n, s in block.items() if s not in wanted.values()} or block
            raise UsageError(f"torch: no parameter of a block is {weight}.weight {shape}; nearest by shape "
                             f"{nearest(shape, others)}")  # fmt: skip
    name = next(n for n, s in block.items() if s in there - Counter(wanted.values()))
    raise UsageError(f"torch: parameter {name} {block[name]} of a block is no weight of the checkpoint; nearest by "
                     f"shape {nearest(block[name], wanted)}")  # fmt: skip


def _called(weight: str, shape: Shape, block: dict[str, Shape]) -> str | None:
    """The one parameter of this shape that is called so; None where none is, or several."""
    pattern = CALLED.get(weight, r"w?qkv(_proj)?|c_attn|attn" if weight == "qkv" else r"gate_up(_proj)?|w1?3")
    last = lambda name: name.removesuffix(".weight").removesuffix(".scale").rpartition(".")[2].lower()
    found = [name for name, s in block.items() if s == shape and re.fullmatch(pattern, last(name))]
    return found[0] if len(found) == 1 else None


# --- Weights ---------------------------------------------------------------------------------------------------------


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from Meta's order to Hugging Face's."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def fill(
    choice: Choice, found: Layout, weights: Mapping[str, Tensor], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the module and what belongs there."""
    for name, weight in found.outer:
        tied = weight == "output" and "output.weight" not in weights
        yield name, weights["tok_embeddings.weight" if tied else f"{weight}.weight"]
    for layer in range(config.n_layers):
        get = lambda weight, layer=layer: _rows(weight, weights[f"layers.{layer}.{weight}.weight"], choice, config)
        for name, weight in choice.blocks:
            yield (
                found.block.format(layer) + name,
                _fused(weight, get, choice, config) if weight in FUSED else get(weight),
            )


def _rows(weight: str, value: Tensor, choice: Choice, config: ModelConfig) -> Tensor:
    heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}.get(weight)
    return half_split(value, heads) if heads and choice.half else value


def _fused(kind: str, get: object, choice: Choice, config: ModelConfig) -> Tensor:
    parts = [get(part) for part in FUSED[kind]]  # type: ignore[operator]
    if kind == "gate_up":
        return torch.cat(parts[::-1] if choice.swapped else parts)
    if choice.grouped:
        by_group = [part.unflatten(0, (config.n_kv_heads, -1)) for part in parts]
        return torch.cat(by_group, 1).flatten(0, 1)
    return torch.cat(parts)


@torch.no_grad()
def put_(model: nn.Module, name: str, value: Tensor, dtype: torch.dtype, device: str) -> None:
    """A new parameter of its own, so that what the module ties is untied where the checkpoint is not."""
    owner, _, attribute = name.rpartition(".")
    made = nn.Parameter(value.to(device=device, dtype=dtype, copy=True), requires_grad=False)
    setattr(model.get_submodule(owner), attribute, made)
