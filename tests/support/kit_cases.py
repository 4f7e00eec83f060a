"""Kits made once for all tests of this process, with the traces that they were made from; and ports judged by them."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollama.cli import read
from parity.kit import make as command
from parity.kit.gather import SHAPE, Source, fill, gather
from parity.synth.checkpoint import synthesise

Arrays = dict[str, Tensor]
Made = tuple[Source, Path]


def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="kit-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def make(root: Path, *argv: str) -> Made:
    for part in ("work", "kit"):
        (root / part).mkdir()
    args = read(command.Flags, ["--out", str(root / "kit"), *argv])
    source = gather(command.request_of(args), root / "work")
    fill(source, root / "kit")
    return source, root / "kit"


@functools.cache
def made() -> Made:
    """The default kit."""
    return make(folder())


@functools.cache
def rounded() -> Made:
    """Of a Hugging Face folder whose weights bf16 rounds, on few tokens."""
    root = folder()
    synthesise(SHAPE, root / "checkpoint", format="hf", dtype="fp32")
    (root / "prompts.jsonl").write_text("[1, 2, 3, 4, 5]\n[7, 8, 9]\n")
    return make(root, "--ckpt", str(root / "checkpoint"), "--prompts", str(root / "prompts.jsonl"))


@functools.cache
def family() -> Path:
    """The six kits of --set. Slow: each takes three processes some ten seconds."""
    out = folder() / "kits"
    assert command.main(["--set", str(out)]) == 0
    return out


def check(kit: Path, arrays: Arrays, port: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a port that wrote these arrays."""
    port.mkdir(exist_ok=True)
    for name, tensor in arrays.items():
        (port / f"{name}.f32").write_bytes(tensor.float().contiguous().numpy().tobytes())
    code = command.main(["--check", str(kit), "--port", str(port), "--json", str(port / "report.json"), *argv])
    return code, json.loads((port / "report.json").read_text())
