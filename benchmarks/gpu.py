"""What only a GPU can show, in one command for a bare machine with a CUDA torch, in under 8 minutes.

First the GPU tests and `parity.check --device cuda`, side by side. Then, each alone on the machine: decoding, training
and parity of models with the shapes of Llama 3.2 1B and Llama 3.1 8B. Every speed stands beside its limit, measured in
the same process. Weights are random and made on the GPU. A section is a process with a time limit: what fails or takes
too long leaves its traceback, and the rest goes on.

    make gpu                              # JSON in $OUT/gpu.json if OUT is set, else benchmarks/results/gpu.json
    decode    1B bf16 compiled             410.3 steps/s   0.412 of the limit

Without a CUDA device it says so and exits 0. `--rehearse` tries the script itself on a CPU, with tiny models.
"""

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanollama.cli import run

RESULTS = Path(__file__).parent / "results"
# Seconds. They add up to less than 8 minutes; what a section leaves goes to the next ones.
BUDGETS = {"checks": 150, "attention": 25, "decode": 110, "training": 110, "parity": 60}
SPARE_S = 10.0  # that a section's process has to write its last result before it is ended
TESTS = ("test_gpu", "test_gpu_runs")
TAIL_CHARACTERS = 8000  # of a log that goes into the JSON
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "llama_models", "fairscale", "numpy", "safetensors")


def main(
    *,
    sections: list[str] | None = None,  # checks, attention, decode, training, parity; several by repeating it
    rehearse: bool = False,  # tiny models on the CPU: tries the script, measures nothing
) -> int:
    """GPU tests, then decoding, training and parity figures, each beside its limit."""
    try:
        import torch
    except ImportError:
        print(f"{sys.executable} has no torch: nothing to test or measure")
        return 0
    if not torch.cuda.is_available() and not rehearse:
        print(f"torch {torch.__version__} sees no CUDA device here: nothing to test or measure")
        return 0
    chosen = sections or list(BUDGETS)
    if unknown := [name for name in chosen if name not in BUDGETS]:
        raise ValueError(
            f"section {unknown[0]!r} is unknown: expected one of {', '.join(BUDGETS)}; repeat --sections for several"
        )
    report = Report(result_path(), rehearse)
    report.found["environment"] = environment(torch)
    for name in chosen:
        report.allow(BUDGETS[name])
        try:
            (run_checks if name == "checks" else run_section)(report, name)
        except Exception:
            report.found.setdefault("errors", []).append(traceback.format_exc())
            traceback.print_exc()
        report.write()
    report.found["seconds"] = round(time.monotonic() - report.started, 1)
    report.write()
    print(f"{report.path}: {report.found['seconds']:.0f} s", flush=True)
    return 0 if report.passed() else 1


def result_path() -> Path:
    """$OUT/gpu.json, or in the repository."""
    return (Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS) / "gpu.json"


@dataclass
class Report:
    """What was found so far; on disk after each section."""

    path: Path
    rehearse: bool
    found: dict[str, Any] = field(default_factory=lambda: {"schema": "nanollama.gpu/1"})
    started: float = field(default_factory=time.monotonic)
    allowed_s: float = 0.0  # since the start

    def allow(self, seconds: float) -> None:
        self.allowed_s += seconds

    @property
    def left_s(self) -> float:
        return max(1.0, self.started + self.allowed_s - time.monotonic())

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def passed(self) -> bool:
        """Whether every test and check that was run passed and no measurement ended in a traceback."""
        checks = self.found.get("checks", {})
        good = all(found["status"] in ("pass", "skip") for found in checks.values())
        items = [item for name in BUDGETS if name != "checks" for item in self.found.get(name, [])]
        return good and "errors" not in self.found and not any("error" in item for item in items)


def environment(torch: Any) -> dict[str, Any]:
    """The machine, the versions, and which packages are not there."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "packages": {}}
    for name in PACKAGES:
        try:
            found["packages"][name] = version(name)
        except PackageNotFoundError:
            found["packages"][name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    print(f"{found.get('device', 'no GPU')}, torch {torch.__version__}, Python {found['python']}", flush=True)
    return found


# --- Tests and checks ------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A process of its own group, its output in a file."""

    name: str
    process: subprocess.Popen
    log: Path
    started: float

    def finish(self, seconds: float) -> dict[str, Any]:
        """Wait so long, then end it and its children; returns its exit code (None: ended here) and the log's end."""
        try:
            code: int | None = self.process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            code = None
        took = round(time.monotonic() - self.started, 1)
        text = self.log.read_text(errors="replace")
        print(f"--- {self.name}: {'out of time' if code is None else f'exit code {code}'} after {took} s", flush=True)
        return {"exit_code": code, "seconds": took, "log": text[-TAIL_CHARACTERS:]}


def begin(name: str, module: str, arguments: list[str], folder: Path) -> Running:
    """Start `python -m module`; the log goes to $OUT where that is set."""
    log = (Path(os.environ["OUT"]) if os.environ.get("OUT") else folder) / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if module != "benchmarks.gpu_sections":  # several compile at once, and each would start a thread a core
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    print(f"--- {name}: python -m {module} {' '.join(arguments)}", flush=True)
    with log.open("w") as out:
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Running(name, process, log, time.monotonic())


def run_checks(report: Report, name: str) -> None:
    """The GPU tests beside the parity check: neither is timed, so they may share the machine."""
    with TemporaryDirectory() as place:
        folder, checks = Path(place), report.found.setdefault(name, {})
        tests = [begin_tests(one, folder) for one in TESTS]
        check = begin_check(folder, "cpu" if report.rehearse else "cuda")
        checks |= {running.name: read_tests(running.finish(report.left_s)) for running in tests}
        checks["parity_check"] = read_check(check.finish(report.left_s), folder) if check else skipped()
        for one, found in checks.items():
            print(f"checks    {one:24} {found['status']}", flush=True)
            if found["status"] == "fail":
                print(found["log"], flush=True)


def begin_tests(name: str, folder: Path) -> Running:
    """One file of tests; those that start no processes share the cores where pytest-xdist is there."""
    at_once = ["-n", "6"] if name == TESTS[0] and importlib.util.find_spec("xdist") else []
    file = f"tests/{name}.py"
    # The machine's own packages may warn of anything, and its plugins quarrel with xdist.
    others = ["-W", "default", "-p", "no:benchmark", *at_once]
    return begin(name, "pytest", ["-m", "gpu", file, "-q", "--durations=10", "-rfs", *others], folder)


def read_tests(found: dict[str, Any]) -> dict[str, Any]:
    status = {0: "pass", 5: "skip"}.get(found["exit_code"], "fail")
    return {"status": status, "summary": found["log"].strip().splitlines()[-1:], **found}


def references() -> list[str]:
    """The reference implementations whose packages are here."""
    needed = {"meta": ("llama_models", "fairscale"), "hf": ("transformers",)}
    return [name for name, packages in needed.items() if all(importlib.util.find_spec(p) for p in packages)]


def skipped() -> dict[str, Any]:
    print("SKIP parity.check: neither llama_models with fairscale nor transformers is installed", flush=True)
    return {"status": "skip", "log": ""}


def begin_check(folder: Path, device: str) -> Running | None:
    """parity.check of nanollama on a tiny seeded model with every check; None where there is no reference."""
    from dataclasses import replace

    from parity.synth.checkpoint import synthesise
    from parity.synth.shapes import SHAPES

    found = references()
    if not found:
        return None
    if "meta" not in found:
        print("SKIP Meta's reference: llama_models or fairscale is not installed", flush=True)
    # A small vocabulary: no tokenizer is needed, and each reference writes its traces in a moment.
    synthesise(replace(SHAPES["tiny"], vocab_size=1024), folder / "ckpt", format="hf")
    flags = ["--ckpt", str(folder / "ckpt"), "--device", device, "--references", ",".join(found), "--cache", "off"]
    return begin("parity_check", "parity.check", [*flags, "--json", str(folder / "report.json")], folder)


def read_check(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The verdict, and each result that is a number."""
    path = folder / "report.json"
    if not path.exists():
        return {"status": "fail", **found}
    report = json.loads(path.read_text())
    keys = ("check", "gate", "dtype", "path", "metric", "status", "value", "bound", "reason")
    results = [{key: result[key] for key in keys if result.get(key) is not None} for result in report["results"]]
    return {"status": report["verdict"], "references": references(), "results": results, **found}


# --- Measurements ----------------------------------------------------------------------------------------------------


def run_section(report: Report, name: str) -> None:
    """One section of `benchmarks.gpu_sections` in a process of its own; its results are read from its file."""
    with TemporaryDirectory() as place:
        results, limit_s = Path(place) / "results.jsonl", report.left_s
        arguments = [name, str(results), "--limit_s", f"{max(1.0, limit_s - SPARE_S):.0f}"]
        arguments += ["--rehearse"] if report.rehearse else []
        running = begin(name, "benchmarks.gpu_sections", arguments, Path(place))
        follow(running, results, limit_s)
        ended = running.finish(1.0)
        items = read_results(results)
        if ended["exit_code"] != 0:
            items.append({"name": f"{name}: the process", "error": ended["log"]})
        report.found[name] = items


def follow(running: Running, results: Path, seconds: float) -> None:
    """Print each result as it comes, until the process ends or its time is over."""
    shown, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = running.process.poll() is not None
        items = read_results(results)
        for item in items[shown:]:
            print(f"{running.name:9} {as_line(item)}", flush=True)
        shown = len(items)
        if ended:
            return
        time.sleep(0.2)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a section's file."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


LINE: dict[str, Callable[[Any], str]] = {
    "skipped": str,
    "error": lambda error: f"FAILED {error.strip().splitlines()[-1]}",
    "read_bytes_per_s": lambda x: f"memory reads {x / 1e12:.3f} TB/s",
    "matmul_flops_per_s": lambda x: f"bf16 products {x / 1e12:.0f} TFLOP/s",
    "steps_per_s": lambda x: f"{x:9.1f} steps/s",
    "tokens_per_s": lambda x: f"{x:9.0f} tok/s",
    "share_of_limit": lambda x: f"{x:6.3f} of the limit",
    "step_share_of_limit": lambda x: f"{x:6.3f} by the step alone",
    "peak_bytes": lambda x: f"{x / 1e9:5.1f} GB at the peak",
    "planned_bytes": lambda x: f"{x / 1e9:5.1f} GB planned",
    "milliseconds": lambda x: ", ".join(
        f"{n} {'refused' if isinstance(t, str) else f'{t:.3f} ms'}" for n, t in x.items()
    ),
    "distance": lambda x: ", ".join(f"{name} {value:.2e}" for name, value in x.items()),
}


def as_line(item: dict[str, Any]) -> str:
    shown = [show(item[key]) for key, show in LINE.items() if key in item]
    return f"{item['name']:32} {'  '.join(shown)}"


if __name__ == "__main__":
    run(main)
