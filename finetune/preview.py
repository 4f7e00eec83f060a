"""What a run is about to do, said before its first step: how much data, how often over it, at which rate, what is
trained, how much memory and time.

    plan: 256 tokens a step (2 rows of 128); 300 steps are 4.2 epochs of 18,211 tokens
    plan: rate 0.0002 (lora's own), cosine after 15 steps; trains 2,442,240 of 134,515,008 parameters (1.8%)
    plan: about 12 min; memory plan: ...
"""

import time

import numpy as np
import torch

from finetune.build import mixed_precision
from finetune.config import LORA_METHODS, RATES, TrainConfig
from finetune.data.documents import Documents, whole
from finetune.data.packing import Packing
from finetune.evaluate import HeldOut
from finetune.memory import Plan
from finetune.metrics import in_words
from finetune.optim import trained
from nanollama.model import Transformer

FEW_TOKENS = 1000  # of validation: its loss then says little
MANY_EPOCHS = 50
COMPARED_DOCUMENTS = 200_000


def plan_lines(
    config: TrainConfig, model: Transformer, packer: Packing, held_out: HeldOut, memory: Plan | None, rows: int
) -> list[str]:
    """What is said before the first step. memory: None for a sharded run. rows: of a step, on all ranks together."""
    tokens = int(packer.documents.lengths.sum())
    epochs = config.max_steps * rows / packer.rows_an_epoch()
    share = _trained_share(model)
    whose = f" ({config.method}'s own)" if config.ckpt and config.lr == RATES[config.method] else ""
    needs = "memory plan: python -m finetune.plan makes that of a sharded run"
    if memory:
        seconds = config.max_steps * step_s(model, config, torch.device(config.device))
        needs = f"plan: about {in_words(seconds)}, and the validations; {memory.text()}"
    lines = [
        f"plan: {rows * config.seq_len:,} tokens a step ({rows:,} rows of {config.seq_len:,}); {config.max_steps:,} "
        f"steps are {_short(epochs)} epochs of {tokens:,} tokens",
        f"plan: rate {config.lr:g}{whose}, {config.schedule} after {config.warmup_steps:,} steps; {share}",
        needs,
    ]
    return [*lines, *warnings(packer.documents, held_out, epochs)]


def _short(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def _trained_share(model: Transformer) -> str:
    count, whole_model = sum(p.numel() for p in trained(model).values()), sum(p.numel() for p in model.parameters())
    percent = 100 * count / whole_model
    return f"trains {count:,} of {whole_model:,} parameters ({percent:.{0 if percent >= 10 else 2}f}%)"


def warnings(train: Documents, held_out: HeldOut, epochs: float) -> list[str]:
    """A line on each thing that makes the run's validation loss, or the run, worth little."""
    lines, val = [], held_out.packer.documents
    if epochs > MANY_EPOCHS:
        lines.append(f"data: little for so many steps: each document is seen about {epochs:,.0f} times")
    if held_out.tokens < FEW_TOKENS:
        lines.append(f"data: only {held_out.tokens:,} tokens are held out: their loss says little")
    same = copies(train, val, held_out.documents)
    if same and not _same_documents(train, val):
        lines.append(
            f"data: {same:,} of {held_out.documents:,} held-out documents stand among those trained on, word for word: "
            "their loss says nothing of new text"
        )
    return lines


def _same_documents(train: Documents, val: Documents) -> bool:
    """Few dialogues are trained on and validated on, which is said where they are read."""
    return len(train.lengths) == len(val.lengths) and bool((train.lengths == val.lengths).all())


def copies(train: Documents, val: Documents, documents: int) -> int:
    """How many of the first documents held out are trained on as well; among the first COMPARED_DOCUMENTS of these."""
    held = {whole(val, i).tobytes() for i in range(documents)}
    lengths = np.unique(val.lengths[:documents])
    candidates = np.flatnonzero(np.isin(train.lengths[:COMPARED_DOCUMENTS], lengths)).tolist()
    found = {text for i in candidates if (text := whole(train, i).tobytes()) in held}
    return sum(1 for i in range(documents) if whole(val, i).tobytes() in found)


@torch.no_grad()
def step_s(model: Transformer, config: TrainConfig, device: torch.device) -> float:
    """About how long a step takes: a block's forward pass on one row, times blocks and rows, times three (the backward
    pass is twice the forward), with the head as its share of the weights says.
    """
    tokens = torch.zeros(1, config.seq_len, dtype=torch.int64, device=device)
    positions = torch.arange(config.seq_len, device=device).expand_as(tokens)
    hidden = torch.zeros(1, config.seq_len, model.config.dim, dtype=model.tok_embeddings.weight.dtype, device=device)
    context = model.context(tokens, positions, torch.zeros_like(tokens) if config.doc_mask == "on" else None)
    with mixed_precision(config, device):
        taken = min(_timed(model, hidden, context, device) for _ in range(3))
    block = sum(p.numel() for p in model.layers[0].parameters())
    passes = 2.5 if config.method in LORA_METHODS else 3 + config.activation_checkpointing
    rows = config.batch_size * config.accumulate
    return taken * rows * passes * (len(model.layers) + model.config.vocab_size * model.config.dim / block)


def _timed(model: Transformer, hidden: torch.Tensor, context: object, device: torch.device) -> float:
    block = model.layers[0]
    _finish(device)
    started = time.perf_counter()
    type(block).forward(block, hidden, context)
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
