"""What a run shows while it goes: a progress bar, OUT/metrics.jsonl, and TensorBoard or Weights & Biases where asked
for.

{"step": 7, "loss": 5.1, "lr": 0.001, "grad_norm": 0.9, "tokens": 28553, "tokens_per_s": 9000.0, "peak_bytes": 41000}
{"step": 100, "val_loss": 3.2, "val_bpb": 1.4}
{"step": 100, "changed": {"lr": [0.001, 0.0005]}}      of a run that was resumed otherwise
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from finetune.config import TrainConfig, to_json
from finetune.data.files import write_atomically
from finetune.errors import UserError
from finetune.evaluate import Score
from finetune.parallelize import World
from finetune.resume import RunFolder
from nanollama.gate import CheckpointError, require_file, shown
from nanollama.machine import peak_memory_bytes
from nanollama.model import ModelConfig

# Dense peak of the tensor cores in FLOP/s by the names that CUDA gives (vendors' data sheets), fp32 without TF32.
PEAK_FLOPS = {
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "4090": {"bf16": 165e12, "fp32": 82.6e12},
    "3090": {"bf16": 71e12, "fp32": 35.6e12},
}


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    loss: float  # nats per label
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # labels trained on so far
    tokens_per_s: float  # labels of this step
    peak_bytes: int
    mfu: float | None = None  # share of the GPUs' peak in FLOP/s; None where that is not known
    more: dict[str, float] = field(default_factory=dict)  # of losses that have more to say

    def values(self) -> dict[str, float]:
        """As metrics.jsonl has them."""
        known = {name: value for name, value in asdict(self).items() if name != "more" and value is not None}
        return known | self.more


class Writer(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard needs the package tensorboard: pip install 'llama-parity[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, out: Path, config: TrainConfig) -> None:
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise UserError("--wandb needs the package wandb: pip install 'llama-parity[wandb]'") from None
        # The run's folder is its name there too, so a resumed run continues its own curves.
        self.run = wandb.init(project="nanollama", id=out.name, resume="allow", dir=str(out), config=to_json(config))

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Lines:
    """Progress where nobody watches a bar move: a line for the first step, then one every ten seconds."""

    def __init__(self, max_steps: int, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_steps, self.every_s, self.clock = max_steps, every_s, clock
        self.first: tuple[int, float] | None = None  # step, when it was done
        self.last_s = -math.inf  # when a line was given

    def of_step(self, step: int, metrics: StepMetrics) -> str:
        """The line for a step that is done; "" where it is too early for another."""
        now = self.clock()
        self.first = self.first or (step, now)
        if now - self.last_s < self.every_s and step != self.max_steps:
            return ""
        self.last_s = now
        done, taken = step - self.first[0], now - self.first[1]
        left = f", {in_words(taken / done * (self.max_steps - step))} left" if done and step < self.max_steps else ""
        return f"step {step:,}/{self.max_steps:,}: loss {metrics.loss:.3f}, {metrics.tokens_per_s:,.0f} tok/s{left}"


def in_words(seconds: float) -> str:
    """About so long: 8 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


TEXTS = ("sample", "changed", "text")  # keys of a line whose values are no numbers
SAMPLES = "samples.jsonl"  # {"step": 100, "sample": "Once upon a time there was a llama"}


class Metrics:
    """The writers of the main rank; on the others it does nothing."""

    def __init__(self, folder: RunFolder, world: World, first_step: int) -> None:
        self.is_main, self.writers = world.is_main, list[Writer]()
        self.out = out = folder.path
        config = folder.config
        if self.is_main:
            if config.tensorboard:
                self.writers.append(TensorBoard(out))
            if config.wandb:
                self.writers.append(WandB(out, config))
            keep_until_(out / "metrics.jsonl", first_step)
            keep_until_(out / SAMPLES, first_step)
            self.file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        at_terminal = sys.stderr.isatty()
        self.lines = None if at_terminal or not self.is_main else Lines(config.max_steps)
        self.bar = tqdm(
            total=config.max_steps,
            initial=first_step,
            unit="step",
            disable=not self.is_main or not at_terminal,
            mininterval=0.2,
        )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.is_main:
            self.file.close()
            for writer in self.writers:
                writer.close()

    def write_step(self, step: int, metrics: StepMetrics) -> None:
        """One step more."""
        self._write(step, metrics.values())
        shown = {"loss": f"{metrics.loss:.3f}", "tok/s": f"{metrics.tokens_per_s:,.0f}"}
        self.bar.set_postfix({**shown, "MB": f"{metrics.peak_bytes / 1e6:,.0f}"}, refresh=False)
        self.bar.update()
        if self.lines and (line := self.lines.of_step(step, metrics)):
            print(line, file=sys.stderr, flush=True)

    def write_score(self, step: int, score: Score) -> None:
        self._write(step, {"val_loss": score.loss, "val_bpb": score.bpb, **score.more})
        more = "".join(f", {name.removeprefix('val_')} {value:.4f}" for name, value in score.more.items())
        self.say(f"step {step}: validation loss {score.loss:.4f}, {score.bpb:.4f} bits per byte{more}")

    def write_changes(self, step: int, changed: dict[str, tuple[Any, Any]]) -> None:
        """What a resumed run does otherwise from `step` on, said and logged."""
        for name, (before, after) in changed.items():
            self.say(f"step {step}: --{name} {before} -> {after}")
        if self.is_main and changed:
            self.file.write(json.dumps({"step": step, "changed": changed}) + "\n")
            self.file.flush()

    def write_sample(self, step: int, text: str) -> None:
        if self.is_main:
            note_sample(self.out, step, text)
        self.say(f"step {step}: {text}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for writer in self.writers:
            writer.write(step, values)

    def say(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()


def note_sample(out: Path, step: int, text: str) -> None:
    """Keep a sample for the report: in a file of its own, since it depends on what is looked at and when."""
    with (out / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "sample": text}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out. Raises UserError for what no run writes."""
    lines: list[dict[str, Any]] = []
    if path.is_symlink() or path.exists():
        try:
            require_file(path)
        except CheckpointError as error:
            raise UserError(str(error)) from None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_entry(found):
            raise UserError(f"{path} line {len(lines) + 1}: is not as a run wrote it: {shown(found)}")
        lines.append(found)
    return lines


def _is_entry(found: Any) -> bool:
    """A step, and numbers but for what is a text."""
    if type(found) is not dict or type(found.get("step")) is not int or not 0 <= found["step"] < 1 << 53:
        return False
    numbers = [value for key, value in found.items() if key not in TEXTS and value is not None]
    # A loss may be infinite or none: a run that diverged says so. A whole number may be larger than any float.
    return all(type(value) is float or (type(value) is int and abs(value) < 1 << 63) for value in numbers)


def keep_until_(path: Path, step: int) -> None:
    """Drop the lines behind `step`: the steps that a resumed run does again, all of them where it begins anew."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes() or 0


def flops_per_token(shape: ModelConfig, parameters: int, seq_len: int) -> float:
    """Forward and backward: 6 per weight, 12 per layer, feature and key (PaLM, arXiv 2204.02311, appendix B)."""
    multiplied = parameters if shape.tied else parameters - shape.vocab_size * shape.dim
    return 6 * multiplied + 12 * shape.n_layers * shape.n_heads * shape.head_dim * seq_len


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """None where it is not known: no MFU is shown then."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((peaks for key, peaks in PEAK_FLOPS.items() if key in name), None)
    return known[dtype] if known else None
