"""What must not change when code moves: reports, a kit, training runs and texts, written down once, compared later.

    python -m benchmarks.frozen --small --store benchmarks/frozen     # ends: benchmarks/frozen/small.json: 9 cases
    python -m benchmarks.frozen --small --against benchmarks/frozen   # ends: 9 cases, nothing differs (bit for bit, ...
    python -m benchmarks.frozen --store before                        # all of it, 20 minutes on two cores
    python -m benchmarks.frozen --against before --only "texts;kit"   # some cases alone

Every case runs the commands as a user types them, one thread a process, and keeps what they wrote without seconds,
memory and folders. On the machine of the record, with its torch, every float is compared bit for bit; on another one,
where sums are rounded otherwise, what rounding has no part in: verdicts, checks and their statuses, where a wrong port
departs and why, token ids, texts, shapes and counts. The last line says which of the two was done.
Exit codes: 0 nothing differs, 1 something does, one line each: case, field, before, after; 2 unusable input.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.frozen_record import (
    REPOSITORY,
    ROUNDED,
    SCHEMA,
    THREADS,
    by_name,
    compare,
    digest,
    kept_of_report,
    laid_out,
    machine,
    read_record,
    without_fleeting,
)
from nanollama.cli import run

PORTS = "plain_port.py"  # somewhere in tests/: right and wrong ones, each a function of it
ONE_THREAD = {
    "OMP_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}

# Small members: two layers, no tokenizer, so that a check takes seconds.
MEMBER = ("--dim", 64, "--heads", 4, "--kv_heads", 2, "--hidden", 96, "--vocab", 512, "--layers", 2)
TINY_SHAPES = ("tiny", "tiny-3", "tiny-3.2", "tiny-llama2")
TRAINED = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 172}
STEPS = 20
PROMPTS = ("--prompt", "Once upon a time", "--prompt", "")


# --- The cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The temporary folder of one case, and the commands that run there."""

    folder: Path

    def start(self, module: object, *arguments: object) -> subprocess.Popen[str]:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        caches = {name: str(self.folder / "cache") for name in ("NANOLLAMA_CACHE", "XDG_CACHE_HOME")}
        return subprocess.Popen(
            [sys.executable, "-m", str(module), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, **ONE_THREAD, **caches, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def command(self, module: object, *arguments: object, codes: tuple[int, ...] = (0,)) -> str:
        """What the command printed. Raises ValueError for another exit code."""
        process = self.start(module, *arguments)
        out, err = process.communicate()
        if process.returncode not in codes:
            line = " ".join(map(str, ("python -m", module, *arguments)))
            raise ValueError(f"{line}\nended with exit code {process.returncode}: {err.strip()[-2000:]}")
        return out

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def synth(self, *flags: object) -> Path:
        self.command("parity.synth", "--out", "checkpoint", *flags)
        return self.folder / "checkpoint"


def check(work: Work, *, shape: tuple[object, ...], flags: tuple[object, ...] = ()) -> dict[str, Any]:
    """The report of parity.check on a checkpoint of that shape; of the embedded default where none is given."""
    ckpt = ("--ckpt", work.synth("--shape", *shape)) if shape else ()
    work.command("parity.check", *ckpt, *flags, "--cache", "off", "--json", "report.json", codes=(0, 1, 3))
    return kept_of_report(work.read("report.json"))


def mutants(work: Work, *, flags: tuple[object, ...] = ()) -> dict[str, Any]:
    """The kill matrix."""
    work.command("parity.mutants", *flags, "--json", "matrix.json", codes=(0, 1))
    return work.read("matrix.json")


def kit(work: Work, *, dtypes: str = "fp32,bf16") -> dict[str, Any]:
    """A kit's manifest, its bounds by name, and a digest of every array."""
    work.command("parity.kit", "--out", "kit", "--dtype", dtypes)
    table = work.read("kit/kit.json")
    for row in table["arrays"]:
        del row["meaning"]  # words for its reader
    arrays = {row.pop("name"): {**row, ROUNDED: array_digest(work.folder / "kit", row)} for row in table.pop("arrays")}
    gates = by_name(table.pop("gates"), ("array", "dtype", "check", "gate", "metric", "label", "first"))
    noise = {key: table.pop(key) for key in ("noise_floor", "float32_share")}
    return table | {"arrays": arrays, "gates": gates, ROUNDED: noise}


def array_digest(folder: Path, row: dict[str, Any]) -> str:
    """SHA-256 of an array's bytes, shortened."""
    size = int(row["kind"][1:]) // 8
    for length in row["shape"]:
        size *= length
    with (folder / row["file"]).open("rb") as file:
        file.seek(row["offset"])
        return hashlib.sha256(file.read(size)).hexdigest()[:16]


def training_line(work: Work, *flags: object) -> tuple[object, ...]:
    """A command that trains a small model from scratch on the bundled sample."""
    (work.folder / "shape.json").write_text(json.dumps(TRAINED))
    size = ("--init", "shape.json", "--vocab_size", 512, "--seq_len", 128, "--batch_size", 16, "--keep", "last")
    return ("finetune.tinystories", "--data", "sample", *size, "--threads", THREADS, "--workers", 1, *flags)


def training(work: Work) -> dict[str, Any]:
    """A run from scratch, and the same one ended by a signal and resumed."""
    ends = ("--eval_every", 10, "--eval_tokens", 4000, "--save_every", 5)
    line = training_line(work, "--max_steps", STEPS, "--dropout", 0.1, *ends)
    work.command(*line, "--out", "straight")
    interrupt(work.start(*line, "--out", "resumed"), work.folder / "resumed" / "metrics.jsonl")
    work.command(*line, "--out", "resumed", "--resume")
    return {name: run_of(work.folder / name) for name in ("straight", "resumed")}


def interrupt(process: subprocess.Popen[str], metrics: Path) -> None:
    """End a run with SIGTERM after some steps. Raises ValueError where it was over before."""
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= STEPS // 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if not 0 < done < STEPS:
        raise ValueError(f"the run to be resumed was to end between steps 1 and {STEPS}, it did {done}: {err[-2000:]}")


def run_of(out: Path) -> dict[str, Any]:
    """A run's metrics by step and the digest of its final weights."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"]]  # the validation of step 0 is younger than the first records
    files = sorted(path for path in (out / "final").iterdir())
    weights = [path for path in files if path.suffix in (".pth", ".safetensors")]
    return {"metrics": lines, "files": [path.name for path in files], ROUNDED: {"weights": digest(*weights)}}


def adapter(work: Work) -> dict[str, Any]:
    """A LoRA run on a seeded checkpoint with Llama 3's tokenizer."""
    ckpt = work.synth("--shape", "tiny", *MEMBER[:8], "--layers", 2)
    size: tuple[object, ...] = (
        "--method",
        "lora",
        "--lora_dropout",
        0.1,
        "--seq_len",
        64,
        "--batch_size",
        4,
        "--max_steps",
        STEPS,
    )
    size += ("--lr", 2e-5, "--keep", "last")  # as when the record was made
    start = ("--data", "sample", "--ckpt", ckpt, "--eval_tokens", 1000, "--threads", 1, "--workers", 1)
    work.command("finetune.tinystories", *start, *size, "--out", "lora")
    weights = digest(*(work.folder / "lora" / "adapter").glob("*.safetensors"))
    return {**run_of(work.folder / "lora"), "adapter": {ROUNDED: weights}}


FORMATS = {
    "hf": ("--format", "hf"),
    "gguf": ("--format", "gguf"),
    "bin": ("--format", "llama2c"),
    "int8.bin": ("--format", "llama2c", "--version", 2),
    "q8_0.gguf": ("--format", "gguf", "--dtype", "q8_0"),
}


def texts(work: Work) -> dict[str, Any]:
    """What each checkpoint format, and a load into integers, answers greedily; a tokenizer is trained for it."""
    work.command(*training_line(work, "--max_steps", 1, "--out", "one"))
    shape = ("--shape", "tiny-llama2", "--eps", 1e-5, *MEMBER)
    ckpt = work.synth(*shape, "--tokenizer", work.folder / "one" / "final" / "tokenizer.model")
    made: dict[str, tuple[object, ...]] = {"meta": (ckpt,)}
    for name, flags in FORMATS.items():
        work.command("nanollama", "convert", ckpt, f"ckpt.{name}", *flags)
        made[name] = (f"ckpt.{name}",)
    made |= {name: (ckpt, "--quantize", name) for name in ("int8", "int4")}
    return {name: answers(work, *line) for name, line in made.items()}


def answers(work: Work, *line: object) -> Any:
    flags = ("--dtype", "fp32", "--temperature", 0, "--max_new_tokens", 16, "--logprobs", "--json")
    return json.loads(work.command("nanollama", "generate", *line, *PROMPTS, *flags))


def check_wrong(work: Work, *, port: str) -> dict[str, Any]:
    """The report of a wrong port, which is copied: where the tests keep it is no difference."""
    (source,) = (REPOSITORY / "tests").rglob(PORTS)
    shutil.copyfile(source, work.folder / PORTS)
    candidate = ("--candidate", f"{work.folder / PORTS}:{port}", "--references", "meta", "--dtype", "fp32")
    return check(work, shape=TINY, flags=candidate)


INT8 = ("--candidate", "parity.candidates.quantized:int8", "--max_new_tokens", 16)
# The gradient of this one's embedding is rounded so coarsely that the two references differ by more than the bound:
# another machine, another verdict.
CHECKS = "config,weights,rope,ops,taps,logits,bitwise,kl,argmax,greedy,cache,metamorphic"
UNTRAINED = ("--dtype", "fp32", "--checks", CHECKS)
TINY = ("tiny", *MEMBER)
# The longest first, since several run side by side.
SMALL: dict[str, Callable[[Work], Any]] = {
    "check meta": partial(check, shape=TINY),
    "mutants 1 and 14": partial(mutants, flags=("--only", "1,14")),
    "texts": texts,
    "check int8": partial(check, shape=TINY, flags=(*INT8, "--references", "meta")),
    "check hf": partial(check, shape=("tiny-llama2", *MEMBER, "--format", "hf"), flags=UNTRAINED),
    "training": training,
    "kit fp32": partial(kit, dtypes="fp32"),
    "check wrong eps, logits alone": partial(check_wrong, port="bare_with_wrong_eps"),
    "check wrong base": partial(check_wrong, port="wrong_base"),
}
WHOLE: dict[str, Callable[[Work], Any]] = {
    "mutants": mutants,
    "check 8B-shaped": partial(check, shape=("8B", "--layers", 2)),
    "check default": partial(check, shape=()),
    **{
        f"check {shape} {format}": partial(check, shape=(shape, "--format", format))
        for shape in TINY_SHAPES
        for format in ("meta", "hf")
    },
    "check int8, both references": partial(check, shape=TINY, flags=INT8),
    "adapter": adapter,
    "kit": kit,
    **SMALL,
}


# --- Records ---------------------------------------------------------------------------------------------------------


def run_case(name: str, case: Callable[[Work], Any]) -> Any:
    """What is kept of one case, made in a temporary folder; a line of text where one of its commands failed."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="frozen-") as made:
        folder = Path(made).resolve()
        try:
            found = without_fleeting(case(Work(folder)), folder)
        except ValueError as error:
            found = f"could not run: {error}"
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def run_cases(cases: dict[str, Callable[[Work], Any]], jobs: int) -> dict[str, Any]:
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(cases, pool.map(run_case, cases, cases.values()), strict=True))
    return json.loads(json.dumps(found))  # tuples as lists: what a record holds


def chosen_cases(small: bool, only: str) -> dict[str, Callable[[Work], Any]]:
    """The cases of the part, or some of them. Raises ValueError for a name that none has."""
    cases = SMALL if small else WHOLE
    names = [name.strip() for name in only.split(";") if name.strip()] or list(cases)
    for name in names:
        if name not in cases:
            raise ValueError(f"--only {name}: expected some of {'; '.join(cases)}")
    return {name: case for name, case in cases.items() if name in names}


def main(
    *,
    store: Path | None = None,  # folder to write the record to, small.json or whole.json
    against: Path | None = None,  # folder of the record to compare with
    small: bool = False,  # the part of about 3 minutes on two cores
    only: str = "",  # with --against: names of cases with ; between them; else all
    jobs: int = 2,  # cases that run side by side, each about one core
) -> int:
    """Write down what must not change, or compare with what was written down."""
    if (store is None) == (against is None) or (store and only):
        raise ValueError("give either --store FOLDER or --against FOLDER; --only goes with --against")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: expected at least 1")
    cases, name = chosen_cases(small, only), "small.json" if small else "whole.json"
    before = read_record(against / name) if against else None
    if store:
        store.mkdir(parents=True, exist_ok=True)
    after: dict[str, Any] = {"schema": SCHEMA, "machine": machine(), "cases": run_cases(cases, jobs)}
    if store:
        broken = [f"{case} {found}" for case, found in after["cases"].items() if isinstance(found, str)]
        if broken:
            raise ValueError("nothing was stored: " + "; ".join(broken))
        (store / name).write_text(laid_out(after) + "\n", encoding="utf-8")
        print(f"{store / name}: {len(cases)} cases")
        return 0
    assert before is not None
    if only:
        before["cases"] = {case: found for case, found in before["cases"].items() if case in cases}
    found, how = compare(before, after)
    for difference in found:
        print(difference)
    print(f"{len(cases)} cases, {len(found) or 'nothing'} {'differ' if len(found) > 1 else 'differs'} ({how})")
    return int(bool(found))


if __name__ == "__main__":
    run(main)
