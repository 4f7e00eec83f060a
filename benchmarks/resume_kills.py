"""Is a killed run the same run? 60 steps straight, then the same 60 steps killed with SIGKILL at 20 random moments and
resumed each time: every loss, every validation loss and every final weight must be equal bit by bit.

    python -m benchmarks.resume_kills --json benchmarks/results/resume_kills.json
    20 kills in a run of 60 steps: losses equal, weights equal
    python -m benchmarks.resume_kills --flags "--method lora --lora_dropout 0.1 --lr 0.01"      # on a base of one step

Moments are drawn from before the run's first step to some steps behind it: it dies importing, resuming, stepping,
saving.
"""

import random
import subprocess
import sys
import tempfile
import time
from json import dumps
from pathlib import Path
from statistics import median

import torch

from finetune.metrics import read_metrics
from nanollama.checkpoint import open_checkpoint
from nanollama.cli import run

SHAPE = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172}
STEPS = 60
BATCH_TOKENS = 1024  # about


def command(out: Path, work: Path, flags: str) -> list[str]:
    """A run with dropout and several epochs of windows, so that RNG and data order count."""
    size = "--data sample --seq_len 128 --batch_size 8 --save_every 2 --eval_every 20 --threads 1"
    more = ["--cache", str(work / "cache"), "--out", str(out), "--max_steps", str(STEPS), *flags.split()]
    return [sys.executable, "-m", "finetune.tinystories", *size.split(), *more]


def start_of(work: Path, flags: str) -> str:
    """The flags that begin every run: from scratch, or with --method lora from a base that is made here."""
    scratch = f"--vocab_size 512 --init {work / 'shape.json'}"
    if "--method" not in flags:
        return f"{scratch} --dropout 0.1"
    finish([*command(work / "base", work, scratch), "--max_steps", "1"])
    return f"--ckpt {work / 'base' / 'final'}"


def finish(argv: list[str]) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def startup_s(argv: list[str], out: Path) -> float:
    """How long a run takes until its first step; then it is left to finish."""
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not last_step(out):
        time.sleep(0.01)
    taken = time.perf_counter() - started
    if process.wait():
        raise ValueError(f"the run failed: {' '.join(argv)}")
    return taken


def kill_once(argv: list[str], out: Path, *, wait_for_a_step: bool, delay_s: float) -> bool:
    """Start, wait (for a new step in metrics.jsonl, then for the delay), SIGKILL; whether it was still alive."""
    size = metrics_bytes(out)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while wait_for_a_step and process.poll() is None and metrics_bytes(out) <= size:
        size = min(size, metrics_bytes(out))  # a resumed run first drops the lines behind its checkpoint
        time.sleep(0.001)
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def metrics_bytes(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def numbers(out: Path) -> list[dict[str, float]]:
    """The run's metrics without its speed and memory."""
    drop = ("tokens_per_s", "peak_bytes")
    return [{k: v for k, v in line.items() if k not in drop} for line in read_metrics(out / "metrics.jsonl")]


def steps(out: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def last_step(out: Path) -> int:
    return max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)


def main(
    kills: int = 20,  # how often the run is killed
    seed: int = 0,  # of the moments
    flags: str = "",  # more flags of the run
    json: Path | None = None,  # where the result goes
) -> int:
    """Kill a training run at random moments and compare it with one that was left alone."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "shape.json").write_text(dumps(SHAPE))
        straight, killed = work / "straight", work / "killed"
        used = f"{start_of(work, flags)} {flags}"
        first_s = startup_s(command(straight, work, used), straight)
        step_s = median(BATCH_TOKENS / line["tokens_per_s"] for line in steps(straight))
        moments: list[dict[str, float]] = []
        while len(moments) < kills:
            begun = (killed / "config.json").exists()
            argv = command(killed, work, used) + (["--resume"] if begun else [])
            stepping = rng.random() < 0.75
            delay_s = rng.uniform(0, 8 * step_s if stepping else first_s)
            if kill_once(argv, killed, wait_for_a_step=stepping, delay_s=delay_s):
                moments.append({"while_stepping": stepping, "after_s": round(delay_s, 3), "at_step": last_step(killed)})
                print(f"kill {len(moments)} at step {last_step(killed)}", flush=True)
        if not (killed / "config.json").exists():
            raise ValueError("every kill came before the run had begun: choose another --seed")
        finish([*command(killed, work, used), "--resume"])
        weights = [open_checkpoint(out / "final").weights for out in (straight, killed)]
        same_weights = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        same_losses = numbers(straight) == numbers(killed)
        result = {
            "benchmark": "resume_kills",
            "command": f"python -m benchmarks.resume_kills --kills {kills} --seed {seed}"
            + (f" --flags {flags!r}" if flags else ""),
            "torch": torch.__version__,
            "steps": STEPS,
            "kills": moments,
            "losses_bit_identical": same_losses,
            "weights_bit_identical": same_weights,
            "final_loss": steps(killed)[-1]["loss"],
        }
    words = {True: "equal", False: "DIFFERENT"}
    print(f"{kills} kills in a run of {STEPS} steps: losses {words[same_losses]}, weights {words[same_weights]}")
    if json:
        json.write_text(dumps(result, indent=2) + "\n")
    return 0 if same_losses and same_weights else 1


if __name__ == "__main__":
    run(main)
