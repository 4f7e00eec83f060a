"""Does training here end where training with transformers ends? 300 CPU steps of `finetune.tinyshakespeare`, then the
same shape from the same weights on the same batches with transformers' LlamaForCausalLM, its own loss and torch's
AdamW.

    python -m benchmarks.tinyshakespeare_vs_transformers --json benchmarks/results/tinyshakespeare_vs_transformers.json

The second arm takes from this project only the batches and the learning rate of each step. The text is
tinyshakespeare.txt in $NANOLLAMA_TEST_DATA or ../shared/data, or --data.
"""

import json as jsonlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune.build import Start, build_model
from finetune.config import TrainConfig, from_json
from finetune.data.documents import first_documents
from finetune.data.packing import Batch, Cursor, Packer
from finetune.loss import IGNORE
from finetune.metrics import read_metrics
from finetune.optim import learning_rate
from finetune.prepare.cache import Prepared, cache_folder, path_source, prepare
from finetune.prepare.corpus import Format
from nanollama.checkpoint.hf import write_hf
from nanollama.cli import run

REPOSITORY = Path(__file__).resolve().parent.parent
BOUND = 0.01  # relative difference of the validation losses


@dataclass(frozen=True)
class Arm:
    """What one of the two came to."""

    first_loss: float
    last_loss: float
    val_loss: float


def train_here(data: Path, steps: int, threads: int, out: Path) -> tuple[Arm, TrainConfig, dict[str, Any]]:
    """The command of the issue, as a user types it."""
    flags = ["--data", str(data), "--max_steps", str(steps), "--threads", str(threads), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "finetune.tinyshakespeare", *flags, "--device", "cpu"], check=True)
    saved = jsonlib.loads((out / "config.json").read_text())
    saved = {key: value for key, value in saved.items() if key not in ("entry", "world_size")}
    summary = jsonlib.loads((out / "summary.json").read_text())
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    return Arm(losses[0], losses[-1], summary["val_loss"]), from_json(saved, out), summary


def train_there(config: TrainConfig, prepared: Prepared, folder: Path) -> Arm:
    """The same with transformers: its model, its loss."""
    from transformers import LlamaForCausalLM

    shape = build_model(Start(), config, prepared.vocabulary.size, torch.device("cpu"))
    write_hf(folder, shape.config, shape.state_dict())
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = make_adamw(model, config)
    packer, cursor, losses = Packer(prepared.train, config.seq_len, seed=config.seed), Cursor(), []
    for step in tqdm(range(config.max_steps), desc="transformers", unit="step"):
        rows, cursor = packer.take(cursor, config.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = loss_of(model, packer.batch(rows))[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Arm(losses[0], losses[-1], validate(model.eval(), prepared, config))


def make_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """transformers' own loss, on labels that it shifts itself, over the batch's number of labels.

    Rows are whole pieces of one long document; a row of several would need a mask per document: then it is given one.
    """
    labels = torch.full_like(batch.tokens, IGNORE)
    has_label = batch.labels[:, :-1] != IGNORE
    labels[:, 1:][has_label] = batch.tokens[:, 1:][has_label]
    assert batch.doc_ids is not None
    same = batch.doc_ids.unsqueeze(2) == batch.doc_ids.unsqueeze(1)
    mask = (same & torch.ones_like(same).tril()).unsqueeze(1)  # (B, 1, T, T)
    answer = model(
        input_ids=batch.tokens, attention_mask=mask, position_ids=batch.positions, labels=labels, use_cache=False
    )
    return answer.loss, batch.valid


@torch.no_grad()
def validate(model: nn.Module, prepared: Prepared, config: TrainConfig) -> float:
    """Nats per token of the documents that the other arm evaluates."""
    packer = Packer(prepared.val, config.seq_len)
    rows = packer.in_order(first_documents(prepared.val, config.eval_tokens))
    results = [loss_of(model, packer.batch(rows[i : i + 8])) for i in range(0, len(rows), 8)]
    return sum(loss.item() * valid for loss, valid in results) / sum(valid for _, valid in results)


def find_text(given: Path | None) -> Path:
    folder = Path(os.environ.get("NANOLLAMA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    path = given or folder / "tinyshakespeare.txt"
    if not path.exists():
        raise ValueError(f"{path}: no such file: name tinyshakespeare.txt with --data")
    return path


def main(
    data: Path | None = None,  # tinyshakespeare.txt
    steps: int = 300,  # optimizer steps
    threads: int = 2,  # CPU threads
    json: Path | None = None,  # write the result there
) -> int:
    """Train on tinyshakespeare here and with transformers; exit 1 when the validation losses differ by 1% or more."""
    path = find_text(data)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        ours, config, summary = train_here(path, steps, threads, Path(folder) / "run")
        tokenizer = Path(folder) / "run" / "final" / "tokenizer.model"
        source = path_source(path, Format())
        prepared = prepare(
            source, cache=cache_folder(None), tokenizer=tokenizer, vocab_size=config.vocab_size, workers=1, say=print
        )
        theirs = train_there(config, prepared, Path(folder) / "hf")
    difference = abs(ours.val_loss - theirs.val_loss) / theirs.val_loss
    result = {
        "benchmark": "tinyshakespeare_vs_transformers",
        "command": f"python -m benchmarks.tinyshakespeare_vs_transformers --steps {steps} --threads {threads}",
        "torch": torch.__version__,
        "steps": steps,
        "threads": threads,
        "init": config.init,
        "vocab_size": config.vocab_size,
        "tokens_per_step": config.batch_size * config.seq_len,
        "lr": config.lr,
        "nanollama": vars(ours),
        "transformers": vars(theirs),
        "val_loss_relative_difference": difference,
        "bound": BOUND,
        "bigram_val_loss": summary["bigram_loss"],
        "val_bpb": summary["val_bpb"],
        "bigram_bpb": summary["bigram_bpb"],
    }
    print(f"validation loss: here {ours.val_loss:.4f}, transformers {theirs.val_loss:.4f} ({difference:.3%} apart)")
    print(f"a bigram model: {summary['bigram_loss']:.4f}")
    if json:
        json.write_text(jsonlib.dumps(result, indent=2) + "\n")
    return 0 if difference < BOUND and ours.val_loss < summary["bigram_loss"] else 1


if __name__ == "__main__":
    run(main)
