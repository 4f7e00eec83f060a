"""A sample of SECURITY.md's rows through the commands themselves: no network, 60 s of CPU, 4 GiB; one line, code 2.

A network of its own where the system gives one (unshare), else sockets that refuse to connect.
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import fuzz_kit
import hostile_files
from finetune.prepare.stories import stories
from fuzz_targets import vocabularies
from hostile import pipe, write
from parity.synth.checkpoint import write_manifest

pytestmark = pytest.mark.slow
ALONE = "import socket\ndef refuse(*_): raise OSError('no network in this test')\nsocket.socket.connect = refuse\n"
Make = Callable[[Path], list[str]]


@cache
def own_network() -> list[str]:
    """What begins a command line that sees no network; empty where the system allows none of its own."""
    words = ["unshare", "--map-root-user", "--net"]
    works = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if works else []


def limited(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python of these arguments, within the limits."""
    environment = dict(os.environ)
    if not own_network():
        (folder / "alone").mkdir()
        (folder / "alone" / "sitecustomize.py").write_text(ALONE)
        paths = (str(folder / "alone"), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    line = [*own_network(), sys.executable, *words]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=900, preexec_fn=limit, env=environment, cwd=folder
    )


def inspected(kind: str, *line: str) -> Make:
    def make(folder: Path) -> list[str]:
        case = hostile_files.FILES[kind]
        found = write(folder / "model", case.format)
        case.make(found)
        return [word.replace("CKPT", str(found)) for word in line]

    return make


def ours(kind: str) -> Make:
    return inspected(kind, "-m", "nanollama", "inspect", "CKPT")


def theirs(kind: str) -> Make:
    return inspected(kind, "-m", "reference.hf", "--ckpt", "CKPT", "--prompt", "x")


def training(folder: Path, *more: str) -> list[str]:
    data = folder / "stories.txt"
    data.write_text("<|endoftext|>".join(stories(20)))
    line = ["-m", "finetune.text", "--init", "260K", "--max_steps", "1", "--threads", "1", "--out", str(folder / "out")]
    return [*line, *([] if "--data" in more else ["--data", str(data)]), *more]


def tokenizer_that_doubles(folder: Path) -> list[str]:
    path = vocabularies(folder)["tokenizer.json"]
    found = json.loads(path.read_text())
    rule = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
    path.write_text(json.dumps(found | {"normalizer": {"type": "Sequence", "normalizers": [rule] * 60}}))
    return training(folder, "--tokenizer", str(path))


def data_that_is_a_pipe(folder: Path) -> list[str]:
    pipe(folder / "x.jsonl")
    return training(folder, "--data", str(folder / "x.jsonl"))


def run_nested_deep(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"a":' * 100_000)
    return ["-m", "finetune.text", "--resume", "--out", str(folder)]


def kit_of_a_path(folder: Path) -> list[str]:
    kit = fuzz_kit.write_kit(folder / "kit")
    (kit / "port").rename(folder / "port")
    found = json.loads((kit / "kit.json").read_text())
    found["arrays"][0]["file"] = "/etc/passwd"
    (kit / "kit.json").write_text(json.dumps(found))
    (kit / "SHA256SUMS").unlink()
    write_manifest(kit)
    return ["-m", "parity.kit", "--check", str(kit), "--port", str(folder / "port")]


def log_of_no_numbers(folder: Path) -> list[str]:
    for name, text in (("ids", "[1, 2, 3]"), ("a", "[null, true, -0.1]"), ("b", "[null, -0.1, -1]")):
        (folder / name).write_text(text + "\n")
    return [
        "-m",
        "parity.mismatch",
        "--tokens",
        str(folder / "ids"),
        "--a",
        str(folder / "a"),
        "--b",
        str(folder / "b"),
    ]


ROWS: dict[str, tuple[Make, str]] = {
    "an index of a name with a zero byte": (ours("an index of a name with a zero byte"), "no file's name"),
    "an index of a name with a zero byte, reference": (theirs("an index of a name with a zero byte"), "is none"),
    "a dtype of 70,000 letters": (ours("a dtype of 70,000 letters"), "not a safetensors file"),
    "a storage of 2^70 numbers, reference": (theirs("a storage of 2^70 numbers"), "64 bits"),
    "rules that double a text": (tokenizer_that_doubles, "tokenizer.json"),
    "data that are a pipe": (data_that_is_a_pipe, "is a pipe"),
    "a run's config 10^5 deep": (run_nested_deep, "nested more than"),
    "a kit whose array is a path": (kit_of_a_path, "kit.json"),
    "an engine's log of other things": (log_of_no_numbers, "no log-probability"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_ends_its_command_with_one_line(kind: str, tmp_path: Path) -> None:
    make, part = ROWS[kind]
    done = limited(make(tmp_path), tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(said) == 1 and done.stderr.splitlines()[-1] == said[0] and len(said[0]) < 900, done.stderr
    assert part in said[0]


@pytest.mark.parametrize(
    "code", ["import mmap; mmap.mmap(-1, 5 << 30)", "import socket; socket.create_connection(('127.0.0.1', PORT))"]
)
def test_the_limits_hold(code: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = ["-c", code.replace("PORT", str(server.getsockname()[1]))]
        assert subprocess.run([sys.executable, *words], capture_output=True).returncode == 0
        done = limited(words, tmp_path)
    assert done.returncode == 1 and "OSError" in done.stderr, done.stderr
