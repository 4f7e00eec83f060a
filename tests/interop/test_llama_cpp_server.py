"""llama-cpp-python's server as a candidate: it takes text alone, has a repeat penalty by default, and lists
log-probabilities.

    python -m pytest tests/interop -k llama_cpp_server      # needs pip install 'llama-cpp-python[server]'
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines import decisive_weights
from nanollama.checkpoint import convert, write_gguf
from nanollama.model import ModelConfig, RopeScaling
from parity.check import main

pytest.importorskip("llama_cpp.server.app", reason="pip install 'llama-cpp-python[server]'", exc_type=ImportError)

CONFIG = ModelConfig(
    dim=128, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, hidden_dim=256, norm_eps=2e-5,
    rope_scaling=RopeScaling(), max_seq_len=2048,
)  # fmt: skip
TYPES = ("fp32", "fp16", "q8_0", "q4_0")
# ggml's plain kernels, the same on every machine: those on AMX tiles crash in some virtual machines.
SERVE = """
import runpy, sys
import llama_cpp, llama_cpp.llama_cpp as raw
default = raw.llama_model_default_params
def plain():
    params = default()
    params.use_extra_bufts = False
    return params
raw.llama_model_default_params = llama_cpp.llama_model_default_params = plain
runpy.run_module("llama_cpp.server", run_name="__main__")
"""
F32_CACHE = ("--type_k", "0", "--type_v", "0")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, test_data: Callable[[str], Path]) -> Path:
    folder, weights = tmp_path_factory.mktemp("models"), decisive_weights(CONFIG)
    for name in TYPES:
        write_gguf(folder / f"{name}.gguf", CONFIG, weights, tokenizer=test_data("tok512.bin"), dtype=name)
    convert(folder / "fp32.gguf", folder / "hf", "hf")
    return folder


@contextmanager
def served(gguf: Path, *flags: str) -> Iterator[str]:
    """A running server; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--host", "127.0.0.1", "--port", str(port), "--model", str(gguf), "--n_threads", "1")
    more = ("--n_threads_batch", "1", *(flags if "--n_ctx" in flags else ("--n_ctx", "2048", *flags)))
    with (gguf.parent / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", SERVE, *words, *more], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/docs", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(240):
        assert process.poll() is None, "the server has ended: see server.log"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")


def check(files: Path, url: str, *flags: str) -> tuple[int, dict[str, Any]]:
    out = files / "report.json"
    out.unlink(missing_ok=True)
    common = ("--references", "meta", "--max_new_tokens", "8", "--checks", "logits,kl,argmax,greedy")
    code = main(["--ckpt", str(files / "hf"), "--candidate", url, *common, "--json", str(out), *flags])
    return code, json.loads(out.read_text()) if out.is_file() else {}


@pytest.mark.parametrize(("name", "dtype"), [("fp32", "fp32"), ("fp16", "fp16")])
def test_a_right_server_passes(name: str, dtype: str, files: Path) -> None:
    with served(files / f"{name}.gguf", *(F32_CACHE if name == "fp32" else ())) as url:
        code, report = check(files, url, "--dtype", dtype)
    assert code == (0 if dtype == "fp32" else 3), report["why"]  # fp16 alone is limited
    # Where two tokens are shown as the same text, as tok512's bytes are, greedy texts are not judged.
    passed = {r["check"] for r in report["results"] if r["status"] == "pass"}
    assert {"logits", "kl", "argmax"} <= passed <= {"logits", "kl", "argmax", "greedy"}
    assert any("prompts are sent as text" in note for note in report["notices"])
    assert not any("precision" in note or "probably computes" in note for note in report["notices"])


@pytest.mark.parametrize(("name", "said"), [("q8_0", "int8"), ("q4_0", "int4")])
def test_a_quantized_server_fails_and_its_precision_is_named(name: str, said: str, files: Path) -> None:
    with served(files / f"{name}.gguf") as url:
        code, report = check(files, url, "--dtype", "fp32")
    assert code == 1
    (note,) = (n for n in report["notices"] if "probably computes in" in n)
    assert f"computes in {said}" in note


def test_a_key_and_a_short_context(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_KEY", "right-key")
    with served(files / "fp32.gguf", *F32_CACHE, "--n_ctx", "512", "--api_key", "right-key") as url:
        assert check(files, url, "--dtype", "fp32")[0] == 2
        assert "wants a key" in capsys.readouterr().err
        code, report = check(files, url, "--dtype", "fp32", "--api_key", "A_KEY")
    assert code == 0, report["why"]
    assert "the server holds 512 positions" in report["notices"]
    assert "right-key" not in json.dumps(report) and os.environ["A_KEY"] == "right-key"
