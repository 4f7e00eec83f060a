"""Ways of training against each other at equal tokens, several seeds: does a teacher help?

    python -m benchmarks.methods distil --teacher stories260K.bin --tokenizer tok512.bin --data tinystories.txt

Every run is `finetune.text`, as a user types it; the figures are its own validations. Prints a line for each run and
one verdict; exit code 1 where the way in question is not better with every seed.
"""

import json as jsonlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanollama.cli import run

STUDENT = {"dim": 64, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172}
Ways = Mapping[str, list[Any]]  # name -> flags; the second is in question


def distil(
    *,
    teacher: Path,  # a trained checkpoint
    tokenizer: Path,  # the teacher's, as a file
    data: Path,  # what both students read, but for what they are validated on
    temperature: float = 1.0,  # of the teacher
    distill_mix: float = 0.9,  # share of the teacher in the loss
    steps: int = 300,  # optimizer steps
    batch_size: int = 4,  # rows a step
    seq_len: int = 256,  # tokens a row
    lr: float = 1e-2,  # peak learning rate of both
    seeds: int = 3,  # runs of each way
    json: Path | None = None,  # the figures, as a file
) -> int:
    """Train a 4-layer student on text alone, and with a teacher beside it."""
    with tempfile.TemporaryDirectory(prefix="methods-") as folder:
        (Path(folder) / "shape.json").write_text(jsonlib.dumps(STUDENT))
        common = ["--init", Path(folder) / "shape.json", "--tokenizer", tokenizer, "--data", data, "--lr", lr]
        taught = ["--teacher", teacher, "--temperature", temperature, "--distill_mix", distill_mix]
        ways: Ways = {"text alone": [], "teacher": taught}
        return compare(ways, [*common, *sized(steps, batch_size, seq_len)], seeds, Path(folder), json)


def sized(steps: int, batch_size: int, seq_len: int) -> list[Any]:
    every = max(1, steps // 3)
    return ["--max_steps", steps, "--batch_size", batch_size, "--seq_len", seq_len, "--eval_every", every]


def compare(ways: Ways, common: list[Any], seeds: int, folder: Path, json: Path | None) -> int:
    """Every way with every seed; 0 where the second ends better than the first with each of them."""
    courses: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in ways}
    for seed in range(seeds):
        for name, flags in ways.items():
            scores = one_run([*common, *flags, "--seed", seed], folder)
            course = ", ".join(f"{step}: {bpb:.4f}" for step, bpb in scores)
            print(f"seed {seed}, {name}: bits per byte at step {course}", flush=True)
            courses[name].append(scores)
    ends = {name: [scores[-1][1] for scores in found] for name, found in courses.items()}
    first, second = ends
    better = [b < a for a, b in zip(ends[first], ends[second], strict=True)]
    means = ", ".join(f"{name} {sum(found) / len(found):.4f}" for name, found in ends.items())
    print(f"mean bits per byte at the end: {means}; {second} better with {sum(better)} of {seeds} seeds")
    if json:
        named = lambda flags: [flag.name if isinstance(flag, Path) else flag for flag in flags]
        report = {
            "schema": "nanollama.methods/1",
            "flags": named(common),
            "ways": {name: named(flags) for name, flags in ways.items()},
            "val_bpb_at_step": courses,
        }
        json.write_text(jsonlib.dumps(report | {"better": better}, indent=1) + "\n")
    return int(not all(better))


def one_run(flags: list[Any], folder: Path) -> list[tuple[int, float]]:
    """(step, bits per byte) of each validation. Raises ValueError with the run's last line."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    usual = ["--doctor", "off", "--keep", "last", "--save_every", 10**9, "--cache", folder / "cache", "--out", out]
    line = [sys.executable, "-m", "finetune.text", *map(str, [*flags, *usual])]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise ValueError(f"{' '.join(line)}: exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    lines = [jsonlib.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["val_bpb"]) for entry in lines if "val_bpb" in entry]


if __name__ == "__main__":
    run({"distil": distil})
