"""How much memory each GPU of a run will need, the largest batch that fits, and what it sends, before there is any GPU.

    python -m finetune.plan --shape 8B --gpus 8 --mesh fsdp=8 --dtype bf16 --seq_len 8192 --activation_checkpointing
    planned, not measured: 8B (8,030,261,248 parameters), --method full, --dp 1 --fsdp 8 --tp 1
    ...

A step of the training loop itself is traced (finetune/trace.py), on two depths and two batch sizes. Blocks are alike
and so are rows, so every moment of the step grows by the same bytes a block and a row, and the depth and the batch
that are asked for follow. The flags of a run are flags here: its line can be planned as it is.
"""

import json as jsonlib
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from finetune.config import FROM_CHECKPOINT, TrainConfig, init_shape, preset
from finetune.errors import UserError
from finetune.mesh import DIMENSIONS, MeshSizes, mesh_sizes
from finetune.sharding import refuse_unshardable
from finetune.trace import Traced, trace_batches
from finetune.tracker import Kind
from nanollama.checkpoint import open_checkpoint
from nanollama.cli import run
from nanollama.model import ModelConfig, RopeScaling, Transformer

CARDS_GB = (24, 80, 141)  # RTX 4090, H100, H200; GB of 10^9 bytes
RESERVED_GB = 1.5  # of a card, for CUDA's context, NCCL's and cuBLAS's own buffers, and what the allocator cannot use
SHOWN_SHARE = 0.001  # of the traffic: sums of labels and norms are less
DEPTHS = (3, 4)  # a first block, a last one, and one or two between


def _llama(
    dim: int, n_layers: int, n_heads: int, hidden_dim: int, factor: float = 8.0, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        dim, n_layers, n_heads, 8, 128256, hidden_dim, rope_scaling=RopeScaling(factor), tied=tied, max_seq_len=131072
    )


SHAPES = {  # of Llama 3.1 and 3.2
    "1B": _llama(2048, 16, 32, 8192, factor=32.0, tied=True),
    "3B": _llama(3072, 28, 24, 8192, factor=32.0, tied=True),
    "8B": _llama(4096, 32, 32, 14336),
    "70B": _llama(8192, 80, 64, 28672),
    "405B": _llama(16384, 126, 128, 53248),
}


@dataclass(frozen=True)
class Grid:
    """Steps traced at one or two depths and at two batch sizes."""

    traced: dict[tuple[int, int], Traced]  # by (layers, rows)
    layers: int  # of the model that is planned

    def moments(self, rows: int) -> dict[str, Counter[Kind]]:
        """Bytes by kind at each moment of a step of so many rows."""
        names = set.intersection(*(set(traced.moments) for traced in self.traced.values()))
        return {
            name: Counter({kind: round(self._at(lambda t: t.moments[name][kind], rows)) for kind in Kind})  # noqa: B023
            for name in sorted(names)
        }

    def sent(self) -> Counter[tuple[str, int]]:
        """Bytes by (collective, ranks)."""
        (_, rows), first = next(iter(self.traced.items()))
        return Counter({key: round(self._at(lambda t: t.sent[key], rows)) for key in first.sent})  # noqa: B023

    def largest(self, limit_bytes: float) -> int:
        """Rows in a batch that need no more."""
        one, two = self.moments(1), self.moments(2)
        rows = math.inf
        for name, moment in one.items():
            first, slope = moment.total(), two[name].total() - moment.total()
            if first > limit_bytes:
                return 0
            if slope > 0:
                rows = min(rows, 1 + (limit_bytes - first) // slope)
        return int(rows)

    def _at(self, value: Callable[[Traced], int], rows: int) -> float:
        """Of a quantity that is linear in layers, in rows, and in both."""
        depths = sorted({layers for layers, _ in self.traced})
        batches = sorted({rows for _, rows in self.traced})
        by_batch = [_line(depths, [value(self.traced[d, b]) for d in depths], self.layers) for b in batches]
        return _line(batches, by_batch, rows)


def _line(places: list[int], values: list[float], place: int) -> float:
    if len(places) == 1:
        return values[0]
    return values[0] + (values[1] - values[0]) * (place - places[0]) / (places[1] - places[0])


@dataclass(frozen=True)
class Plan:
    """Of one rank; bytes."""

    moment: str  # the fullest one
    kinds: Counter[Kind]  # what is there then
    grid: Grid
    sent: Counter[tuple[str, int]]  # in a step, by (collective, ranks)

    @property
    def total(self) -> int:
        return self.kinds.total()


def plan_step(shape: ModelConfig, config: TrainConfig, sizes: MeshSizes, *, gpu: bool) -> Plan:
    """Trace what is needed for the memory and traffic of one rank. Raises UserError for what cannot be traced."""
    if config.method == "qlora":
        raise UserError("--method qlora: torchao's tensors cannot be traced: plan --method lora --weights bf16 instead")
    if config.adapter:
        raise UserError("--adapter is not opened by a plan: give its --lora_rank and --lora_targets instead")
    refuse_unshardable("text", config, sizes)
    depths = (shape.n_layers,) if shape.n_layers <= max(DEPTHS) else DEPTHS
    rows = config.batch_size

    def grid(batches: tuple[int, ...], accumulate: int) -> Grid:
        steps = replace(config, accumulate=accumulate)
        traced: dict[tuple[int, int], Traced] = {}
        for depth in depths:
            found = trace_batches(replace(shape, n_layers=depth), steps, sizes, batches, gpu=gpu)
            traced |= {(depth, batch): step for batch, step in zip(batches, found, strict=True)}
        return Grid(traced, shape.n_layers)

    traced = grid((rows, rows + 1), min(2, config.accumulate))  # gradients wait while the second micro-batch runs
    sent = traced.sent()
    if config.accumulate > 2:
        once = grid((rows,), 1).sent()
        sent = Counter({key: sent[key] + (config.accumulate - 2) * (sent[key] - once[key]) for key in sent})
    moments = traced.moments(rows)
    fullest = max(moments, key=lambda name: moments[name].total())
    return Plan(fullest, moments[fullest], traced, sent)


# --- The command -----------------------------------------------------------------------------------------------------


def main(
    *,
    shape: Literal["1B", "3B", "8B", "70B", "405B"] | None = None,  # of Llama 3; else --ckpt or --init; default: 8B
    gpus: int = 1,  # processes, one a GPU
    mesh: str | None = None,  # dp=N,fsdp=N,tp=N, what is left out is inferred; or --dp, --fsdp, --tp
    json: Path | None = None,  # also write the plan here
    config: TrainConfig = TrainConfig(),  # noqa: B008
) -> None:
    """Plan a run, with the flags that it would have: memory of each GPU, the largest batch that fits, bytes sent.

    Nothing is read but the shape of --ckpt; --device cpu plans for processes on the CPU.
    """
    began = time.perf_counter()
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: expected at least 1")
    config = _with_mesh(config, mesh)
    name, model = _shape_of(shape, config)
    config = _complete(config, model)
    sizes = mesh_sizes(config.dp, config.fsdp, config.tp, world_size=gpus)
    plan = plan_step(model, config, sizes, gpu=config.device != "cpu")
    print("\n".join(describe(plan, name, model, config, sizes)))
    print(f"traced in {time.perf_counter() - began:.0f} s")
    if json:
        json.write_text(jsonlib.dumps(to_json(plan, name, config, sizes), indent=2) + "\n", encoding="utf-8")


def _with_mesh(config: TrainConfig, mesh: str | None) -> TrainConfig:
    chosen: dict[str, Any] = {}
    for part in (mesh or "").split(",") if mesh else ():
        name, _, number = part.strip().partition("=")
        if name not in DIMENSIONS or not number.isdigit() or not int(number):
            raise UserError(f"--mesh {mesh}: expected dp=N,fsdp=N,tp=N or some of them, not {part!r}")
        if getattr(config, name) not in (0, int(number)) or name in chosen:
            raise UserError(f"--mesh {mesh} and --{name}: say it once")
        chosen[name] = int(number)
    return replace(config, **chosen)


def _shape_of(name: str | None, config: TrainConfig) -> tuple[str, ModelConfig]:
    given = [flag for flag, value in (("--shape", name), ("--ckpt", config.ckpt), ("--init", config.init)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} together: plan one of them")
    if config.ckpt:
        return config.ckpt, open_checkpoint(config.ckpt).config
    if config.init:
        recipe = preset(config)
        known = replace(config, seq_len=config.seq_len or recipe.seq_len)
        return config.init, init_shape(known, config.vocab_size or recipe.vocab_size)
    return name or "8B", SHAPES[name or "8B"]


def _complete(config: TrainConfig, shape: ModelConfig) -> TrainConfig:
    """What the plan depends on, as `finetune.config.resolve` fills it in."""
    recipe = preset(config) if config.init else FROM_CHECKPOINT
    seq_len, rows = config.seq_len or recipe.seq_len, config.batch_size or recipe.batch_size
    if seq_len > shape.max_seq_len:
        raise UserError(f"--seq_len {seq_len}: the model was made for at most {shape.max_seq_len} tokens")
    dtype: Any = "bf16" if config.weights == "bf16" else config.dtype
    filled: dict[str, Any] = {"seq_len": seq_len, "batch_size": rows, "dtype": dtype, "eval_tokens": 1}
    return replace(config, **filled, lr=config.lr or 1e-5, max_steps=100, warmup_steps=0)


def describe(plan: Plan, name: str, shape: ModelConfig, config: TrainConfig, sizes: MeshSizes) -> list[str]:
    """The lines that the command prints."""
    data = sizes.dp * sizes.fsdp
    tokens = config.batch_size * config.accumulate * config.seq_len * data
    rows = f"{config.batch_size} x {config.accumulate} rows of {config.seq_len:,} tokens"
    lines = [
        f"planned, not measured: {name} ({parameters_of(shape):,} parameters), --method {config.method}, {sizes}",
        f"a step: {rows}{f' on each of {data} ranks' if data > 1 else ''}, {tokens:,} tokens",
        f"memory of a rank in GB (10^9 bytes), at its fullest moment ({plan.moment}):",
        *(f"  {kind.value:18}{plan.kinds[kind] / 1e9:9.2f}" for kind in Kind),
        f"  {'total':18}{plan.total / 1e9:9.2f}",
        f"largest --batch_size that fits, with {RESERVED_GB} GB left to CUDA and NCCL: {_fits(plan)}",
    ]
    note = ["--compile: planned as it runs without, which keeps more"] if config.compile else []
    return [*lines, *_traffic(plan), *note]


def _fits(plan: Plan) -> str:
    least = plan.grid.moments(1)
    need = max(moment.total() for moment in least.values()) / 1e9
    shown = []
    for card in CARDS_GB:
        rows = plan.grid.largest((card - RESERVED_GB) * 1e9)
        shown.append(f"{card} GB: {rows or f'none (one row needs {need:.1f})'}")
    return ", ".join(shown)


def _traffic(plan: Plan) -> list[str]:
    total = plan.sent.total()
    if not total:
        return ["sent by a rank in a step: nothing"]
    sent = {key: size for key, size in plan.sent.items() if size >= SHOWN_SHARE * total}
    shown = [f"{name} {size / 1e9:.3g} GB over {ranks} ranks" for (name, ranks), size in sent.items()]
    return [f"sent by a rank in a step: {total / 1e9:.3g} GB: {', '.join(shown)}"]


def parameters_of(shape: ModelConfig) -> int:
    with torch.device("meta"):
        model: nn.Module = Transformer(replace(shape, n_layers=1))
    block = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers."))
    return sum(p.numel() for p in model.parameters()) + (shape.n_layers - 1) * block


def to_json(plan: Plan, name: str, config: TrainConfig, sizes: MeshSizes) -> dict[str, Any]:
    fits = {str(card): plan.grid.largest((card - RESERVED_GB) * 1e9) for card in CARDS_GB}
    return {
        "schema": "nanollama.plan/1",
        "shape": name,
        "mesh": {"dp": sizes.dp, "fsdp": sizes.fsdp, "tp": sizes.tp},
        "method": config.method,
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "moment": plan.moment,
        "bytes": {kind.value: plan.kinds[kind] for kind in Kind},
        "total_bytes": plan.total,
        "largest_batch_size": fits,
        "sent_bytes": {f"{collective} over {ranks}": size for (collective, ranks), size in plan.sent.items()},
    }


if __name__ == "__main__":
    run(main)
