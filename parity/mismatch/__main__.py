"""Which of trainer and engine is wrong? Two columns of log-probabilities of the same tokens, and a checkpoint.

    python -m parity.mismatch --tokens ids.jsonl --a trainer.jsonl --b engine.jsonl --ckpt Meta-Llama-3.1-8B

Without --ckpt: the statistics that RL stacks print. With it, a float64 oracle that opens the checkpoint itself says
which side is off, by how many noise floors of its precision, from which token on, and why. Exit code 0: neither is off;
1: one is, or both; 2: unusable input. The files: parity/mismatch/columns.py.
"""

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors.torch import save_file

from nanollama.cli import execute
from parity.contract import Case, UsageError
from parity.mismatch.columns import Columns, read
from parity.mismatch.statistics import statistics
from parity.mismatch.verdict import BOUND, Side, judge
from parity.run.process import Crash, start_process

Dtype = Literal["fp32", "bf16", "fp16"]


def mismatch(
    *,
    tokens: Path,  # .jsonl, the token ids of a sequence a line
    a: Path,  # .jsonl, log-probabilities of these tokens (nats): the trainer's
    b: Path,  # the same of the engine
    ckpt: str | None = None,  # the weights that both claim to have; default: statistics alone
    dtype_a: Dtype = "bf16",  # in which a claims to compute
    dtype_b: Dtype = "bf16",  # in which b claims to compute
    max_tokens: int = 512,  # of the first sequences, that the oracle is asked about
    seconds: float = 120.0,  # no further cause is tried after so long
    threads: int = 2,  # CPU threads
    json: Path | None = None,  # where the result goes, too
) -> int:
    """Which of two columns of log-probabilities is off, and why?"""
    columns = read(tokens, a, b)
    found: dict[str, Any] = {"schema": "nanollama.mismatch/1", "statistics": statistics(columns.a, columns.b)}
    found["left_out"] = columns.left_out
    sides: list[Side] = []
    if ckpt is not None:
        if not Path(ckpt).exists():
            raise UsageError(f"--ckpt {ckpt}: no such file or folder")
        asked = first_tokens(columns, max_tokens)
        answer = ask(asked, ckpt, (dtype_a, dtype_b), threads, seconds)
        sides = judge(asked, answer, {"a": dtype_a, "b": dtype_b})
        found |= {"sides": [asdict(side) | {"off": side.off} for side in sides], "asked": answer["asked"]}
    for line in as_lines(found["statistics"], columns, sides):
        print(line)
    if json:
        json.write_text(jsonlib.dumps(found, indent=1) + "\n")
    return int(any(side.off for side in sides))


def first_tokens(columns: Columns, count: int) -> Columns:
    """The first `count` tokens of sequences, and what is listed of them."""
    kept, left = [], count
    for ids in columns.sequences:
        kept.append(ids[:left])
        left -= len(kept[-1])
        if left < 2:
            break
    lengths = [len(ids) for ids in kept]
    inside = [
        s < len(kept) and p < lengths[s]
        for s, p in zip(columns.sequence.tolist(), columns.position.tolist(), strict=True)
    ]
    if not any(inside):
        raise UsageError(f"none of the first {count} tokens is listed: raise --max_tokens")
    mask = columns.sequence.new_tensor(inside).bool()
    return Columns(kept, columns.sequence[mask], columns.position[mask], columns.a[mask], columns.b[mask])


def ask(columns: Columns, ckpt: str, dtypes: tuple[str, str], threads: int, seconds: float) -> dict[str, Any]:
    """The oracle's answer, from a process of its own."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        of = folder / "columns.safetensors"
        save_file({key: getattr(columns, key).contiguous() for key in ("sequence", "position", "a", "b")}, of)
        case = Case(str(Path(ckpt).resolve()), [dtypes[0]], prompts=columns.sequences, threads=threads)
        path = case.write(folder / "case.json", "prompt_lengths", "too_large", "vocab_size", "context")
        flags = ["--case", str(path), "--of", str(of), "--out", str(folder / "out"), "--seconds", str(seconds)]
        flags += ["--dtype_a", dtypes[0], "--dtype_b", dtypes[1], "--bound", str(BOUND)]
        with start_process("oracle", "reference.mistakes.listed", flags, folder / "log", lambda *_: None) as process:
            process.popen.wait()
            process.finish()
        found: dict[str, Any] = jsonlib.loads((folder / "out" / "listed.json").read_text())
        return found


def as_lines(numbers: dict[str, float], columns: Columns, sides: list[Side]) -> list[str]:
    only = f" ({columns.left_out} listed by one side alone)" if columns.left_out else ""
    lines = [f"tokens       {int(numbers['tokens']):,} in {len(columns.sequences)} sequences{only}"]
    lines += [
        f"difference   mean {numbers['mean_abs_difference']:.3g}, largest {numbers['max_abs_difference']:.3g} nats"
    ]
    lines += [f"KL(b || a)   k1 {numbers['k1']:.3g}, k2 {numbers['k2']:.3g}, k3 {numbers['k3']:.3g} nats a token"]
    lines += [
        f"ratio a / b  p01 {numbers['ratio_p01']:.4g}, p50 {numbers['ratio_p50']:.4g}, p99 {numbers['ratio_p99']:.4g}"
    ]
    for side in sides:
        word = (
            f"off by {side.floors:.3g} noise floors" if side.off else f"within its rounding, {side.floors:.2g} floors"
        )
        lines.append(f"{side.name}            {word} (of {BOUND:g}), {side.rms:.3g} nats against the oracle")
        if side.off:
            where = "" if side.first is None else f"from sequence {side.first[0]}, token {side.first[1]} on: "
            lines.append(f"             {where}{side.cause}")
    if sides:
        blamed = [side.name for side in sides if side.off]
        who = {0: "neither: they differ by rounding", 1: f"{''.join(blamed)} is off", 2: "both are off"}[len(blamed)]
        lines.append(f"verdict      {who}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    return execute(mismatch, argv, prog="python -m parity.mismatch", doc=__doc__, errors=(UsageError, Crash, OSError))


if __name__ == "__main__":
    sys.exit(main())
