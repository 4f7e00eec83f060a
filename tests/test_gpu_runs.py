"""Whole commands on a CUDA device, each in a process of its own: a run of training, and the check of right and wrong
ports.

    python -m pytest -m gpu tests/test_gpu_runs.py
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from nanollama.generation.llama import Llama, Sampling
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("default"),  # the compiler's advice (TF32 is off, ...) is no error of ours
]
REPOSITORY = Path(__file__).parent.parent
PORTS = REPOSITORY / "tests" / "ports" / "gpu_ports.py"


def test_a_run_resumes_and_its_files_open_on_both_devices(tmp_path: Path) -> None:
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96}
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories(60)))
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    places = {"data": "stories.txt", "init": "shape.json", "cache": "cache", "out": "run"}
    numbers = {"vocab_size": 300, "seq_len": 128, "batch_size": 2, "max_steps": 20, "save_every": 10, "lr": 0.01}
    given = {name: tmp_path / place for name, place in places.items()} | numbers | {"device": "cuda"}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    for more in ([], ["--resume"]):
        command = [sys.executable, "-m", "finetune.text", *flags, *more]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 20 and losses[-1] < losses[0]
    sampling = Sampling(max_new_tokens=40)
    llamas = [Llama.load(tmp_path / "run" / "final", device=device) for device in ("cuda", "cpu")]
    texts = ["".join(event.text for event in llama.generate(["Once"], sampling)) for llama in llamas]
    assert texts[0] == texts[1] != ""


REFERENCES = [
    name
    for name, packages in {"meta": ("llama_models", "fairscale"), "hf": ("transformers",)}.items()
    if all(importlib.util.find_spec(package) for package in packages)
]
CHECKS = "logits,taps,kl,cache,greedy,training"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """parity.check on the GPU of the three ports, side by side."""
    if not REFERENCES:
        pytest.skip("neither reference is installed: llama_models with fairscale, or transformers")
    folder = tmp_path_factory.mktemp("gpu")
    shape = replace(SHAPES["tiny"], vocab_size=1024, n_layers=2)
    synthesise(shape, folder / "ckpt", format="hf")
    running = {}
    for port in ("right", "wrong", "tf32"):
        dtypes, checks = ("fp32,bf16", CHECKS) if port == "right" else ("fp32", "logits,taps")
        flags = ["--ckpt", folder / "ckpt", "--candidate", f"{PORTS}:{port}", "--twin", "off", "--checks", checks]
        flags += ["--references", ",".join(REFERENCES), "--dtype", dtypes, "--json", folder / f"{port}.json"]
        command = [sys.executable, "-m", "parity.check", "--device", "cuda", *map(str, flags)]
        running[port] = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    said = {port: process.communicate(timeout=240)[0] for port, process in running.items()}
    return {port: read_report(folder / f"{port}.json", said[port]) for port in running}


def read_report(path: Path, said: str) -> dict:
    assert path.exists(), said
    return json.loads(path.read_text()) | {"said": said}


def test_the_check_passes_on_the_gpu(reports: dict[str, dict]) -> None:
    assert reports["right"]["verdict"] == "pass", reports["right"]["said"]
    judged = {(r["check"], r["dtype"]) for r in reports["right"]["results"] if r["status"] == "pass"}
    assert {("logits", "fp32"), ("logits", "bf16"), ("cache", "fp32"), ("training", "fp32")} <= judged


@pytest.mark.parametrize("port", ["wrong", "tf32"])
def test_the_check_fails_a_wrong_port_on_the_gpu(reports: dict[str, dict], port: str) -> None:
    assert reports[port]["verdict"] == "fail", reports[port]["said"]
    assert any(r["check"] == "logits" and r["status"] == "fail" for r in reports[port]["results"])
