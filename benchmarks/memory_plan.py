"""Is the memory plan right? Nine configurations, each a run of its own of three steps: planned against measured peak.

python -m benchmarks.memory_plan --tokenizer llama2/tokenizer.model --json benchmarks/results/memory_plan.json
15M fp32                planned 1,052 MB, peak 1,028 MB: +2.3%
"""

import json as jsonlib
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import environment
from nanollama.cli import run

SMALL = "--init 15M --batch_size 8 --seq_len 256"
CONFIGURATIONS = {
    "260K fp32": "--init 260K",
    "15M fp32": SMALL,
    "15M bf16": f"{SMALL} --dtype bf16",
    "15M activation checkpointing": f"{SMALL} --activation_checkpointing",
    "15M bf16 weights": f"{SMALL} --weights bf16",
    "15M moments in bytes": f"{SMALL} --optimizer adamw8bit",
    "15M optimizer in backward": f"{SMALL} --optimizer_in_backward --grad_clip 0",
    "15M LoRA": "--ckpt {base} --method lora --batch_size 8 --seq_len 256",
    "42M fp32": "--init 42M --batch_size 2 --seq_len 512 --accumulate 2",
}
LINE = re.compile(r"memory: ([\d,]+) MB at the peak, ([\d,]+) MB planned")


def main(
    *,
    tokenizer: Path,  # of 32,000 words
    threads: int = 2,  # of each run
    json: Path | None = None,  # where the result goes
) -> None:
    """Planned and measured peak memory of nine configurations."""
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        base = Path(folder) / "15M-fp32" / "final"
        for name, flags in CONFIGURATIONS.items():
            out = Path(folder) / name.replace(" ", "-")
            peak, planned = measure(flags.format(base=base).split(), tokenizer, threads, out, Path(folder) / "cache")
            found[name] = {"peak_mb": peak, "planned_mb": planned, "off": planned / peak - 1, "flags": flags}
            print(f"{name:30} planned {planned:,} MB, peak {peak:,} MB: {planned / peak - 1:+.1%}", flush=True)
    worst = max(abs(f["off"]) for f in found.values())
    print(f"largest departure {worst:.1%}")
    if json:
        result = {"schema": "nanollama.memory_plan/1", "configurations": found, "largest": worst}
        json.write_text(jsonlib.dumps(result | {"environment": environment()}, indent=2) + "\n")


def measure(flags: list[str], tokenizer: Path, threads: int, out: Path, cache: Path) -> tuple[int, int]:
    """(measured peak, plan) in MB."""
    common = ["--data", "sample", "--max_steps", "3", "--eval_tokens", "500", "--threads", str(threads)]
    where = ["--out", str(out), "--cache", str(cache), "--tokenizer", str(tokenizer)]
    command = [sys.executable, "-m", "finetune.tinystories", *common, *where, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    line = LINE.search(done.stdout)
    if line is None:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    peak, planned = (int(number.replace(",", "")) for number in line.groups())
    return peak, planned


if __name__ == "__main__":
    run(main)
