"""Training steps on CPU: ours and transformers', the same shapes, batches and optimizer, in one run.

Every cell (implementation, dtype, eager or compiled) has a process of its own; they take turns, round after round, and
ratios are medians of the rounds' own. A step is forward, loss, backward, AdamW (fused) and freeing the gradients.
`wide` is a vocabulary of 128,256 words, where the logits of all tokens are most of the memory.

    python -m benchmarks.train --json benchmarks/results/train.json
    {"cells": {"15M fp32 eager": {"ours": {"tokens_per_s": ..., "peak_bytes": ...}, "transformers": ..., "ratio": ...}}}
"""

import json as jsonlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.decode import _pool as pool_of
from benchmarks.machine import Company, disturbance, disturbed, environment, refuse_busy
from nanollama.cli import run
from nanollama.machine import peak_memory_bytes

# dim, layers, heads, hidden dim, words, tied head, rows x tokens of a batch
SHAPES: dict[str, tuple[int, int, int, int, int, bool, int, int]] = {
    "tiny": (64, 2, 4, 160, 500, True, 2, 32),
    "15M": (288, 6, 6, 768, 32_000, True, 8, 256),
    "wide": (512, 4, 8, 1536, 128_256, False, 4, 512),
}
CELLS = ["15M fp32 eager", "15M fp32 compiled", "15M bf16 eager", "15M bf16 compiled", "wide fp32 eager"]
ENGINES = ("ours", "transformers")
LR = 1e-4


def main(
    *,
    threads: int = 2,  # of every process
    rounds: int = 5,  # the cells take turns
    steps: int = 3,  # timed in each round
    cells: list[str] | None = None,  # several by repeating it; default: all
    json: Path | None = None,  # where the result goes
    anyway: bool = False,  # even where others are at work; the rounds that they disturb are named
) -> None:
    """Speed and memory of training steps on CPU, ours over transformers'."""
    chosen = cells or CELLS
    for cell in chosen:
        shape, dtype, mode = (cell.split() + ["", ""])[:3]
        if shape not in SHAPES or dtype not in ("fp32", "bf16") or mode not in ("eager", "compiled"):
            raise ValueError(
                f"cell {cell!r} is unknown: expected a shape ({', '.join(SHAPES)}), fp32 or bf16, eager or compiled"
            )
    refuse_busy(anyway)
    found = {"schema": "nanollama.train/1", "threads": threads, "rounds": rounds, "steps": steps}
    found |= {"cells": {cell: compare(cell, threads, rounds, steps) for cell in chosen}, "environment": environment()}
    if json:
        json.write_text(jsonlib.dumps(found, indent=2) + "\n")
    print(as_text(found))


def compare(cell: str, threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Both implementations of one cell, in turns."""
    pools = {name: pool_of(threads) for name in ENGINES}
    try:
        for name in ENGINES:
            pools[name].submit(speed, name, cell, 2).result()  # builds, compiles and warms up
        speeds: dict[str, list[float]] = {name: [] for name in ENGINES}
        others: list[float | None] = []
        working = [pools[name].submit(os.getpid).result() for name in ENGINES]
        for _ in range(rounds):
            with Company(working) as company:
                for name in ENGINES:
                    speeds[name].append(pools[name].submit(speed, name, cell, steps).result())
            others.append(company.cores)
        peaks = {name: pools[name].submit(peak_memory_bytes).result() or 0 for name in ENGINES}
        losses = {name: pools[name].submit(first_losses, name, cell).result() for name in ENGINES}
    finally:
        for pool in pools.values():
            pool.shutdown()
    figures: dict[str, Any] = {
        name: {
            "tokens_per_s": statistics.median(speeds[name]),
            "tokens_per_s_rounds": speeds[name],
            "peak_bytes": peaks[name],
            "first_losses": losses[name],
        }
        for name in ENGINES
    }
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    print(f"{cell}: {ratio:.3f}", file=sys.stderr, flush=True)
    figures |= {"cores_of_others_rounds": others, "disturbed_rounds": disturbed(others)}
    return figures | {"ratio": ratio, "peak_ratio": peaks["ours"] / peaks["transformers"]}


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{'tok/s (peak MB)':20} {'ours':>16} {'transformers':>16}  speed  memory"]
    for cell, figures in found["cells"].items():
        shown = [f"{figures[n]['tokens_per_s']:.0f} ({figures[n]['peak_bytes'] / 1e6:.0f})" for n in ENGINES]
        lines.append(f"{cell:20} {shown[0]:>16} {shown[1]:>16}  {figures['ratio']:.2f}x  {figures['peak_ratio']:.2f}x")
        lines += disturbance(figures["disturbed_rounds"])
    return "\n".join(lines)


# What follows runs in the cells' processes.


def speed(name: str, cell: str, steps: int) -> float:
    """Tokens a second over so many steps."""
    step, tokens, _ = engine(name, cell)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * tokens / (time.perf_counter() - start)


def first_losses(name: str, cell: str) -> list[float]:
    """The losses of the first two steps: both implementations train the same model on the same batch."""
    return engine(name, cell)[2][:2]


@lru_cache
def engine(name: str, cell: str) -> tuple[Callable[[], None], int, list[float]]:
    """(one step, tokens in a step, the losses of all steps so far)."""
    import torch

    shape, dtype, mode = cell.split()
    *_, words, _, rows, tokens = SHAPES[shape]
    batch = torch.randint(0, words, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    build = ours if name == "ours" else transformers_model
    model, loss_of = build(shape, batch, mode == "compiled")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    losses: list[float] = []

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    return step, rows * tokens, losses


def weights_of(shape: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from finetune.build import fresh_weights
    from nanollama.model import ModelConfig

    dim, layers, heads, hidden, words, tied, *_ = SHAPES[shape]
    config = ModelConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, hidden_dim=hidden, vocab_size=words, tied=tied,
        max_seq_len=1024, rope_theta=10_000.0,
    )  # fmt: skip
    return config, fresh_weights(config, torch.Generator().manual_seed(0))


def ours(shape: str, batch: Any, compiled: bool) -> tuple[Any, Callable[[], Any]]:
    import torch

    from finetune.build import compile_blocks_
    from finetune.loss import LossModel
    from nanollama.model import Transformer

    config, weights = weights_of(shape)
    model = Transformer.from_weights(config, weights, dtype=torch.float32)
    if compiled:
        compile_blocks_(model)
    loss_model, count = LossModel(model).train(), batch[:, 1:].numel()
    positions = torch.arange(batch.shape[1] - 1).expand(batch.shape[0], -1)
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    return model, lambda: loss_model(tokens, labels, positions, None) / count


def transformers_model(shape: str, batch: Any, compiled: bool) -> tuple[Any, Callable[[], Any]]:
    import torch
    import transformers

    from nanollama.checkpoint.hf import make_hf_config
    from nanollama.checkpoint.names import hf_name, is_rotary, to_hf_rows

    config, weights = weights_of(shape)
    like = transformers.LlamaConfig.from_dict(make_hf_config(config, torch.float32) | {"use_cache": False})
    model = transformers.LlamaForCausalLM(like).train()
    state = {hf_name(n): to_hf_rows(w, config.head_dim) if is_rotary(n) else w for n, w in weights.items()}
    model.load_state_dict(state, strict=not config.tied)
    forward = torch.compile(model) if compiled else model
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    # shift_labels: the labels are the next tokens already; its loss is the mean over them, in fp32.
    return model, lambda: forward(input_ids=tokens, labels=tokens, shift_labels=labels).loss


if __name__ == "__main__":
    run(main)
