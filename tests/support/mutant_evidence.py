"""References and oracle of the small family, run once for all tests of this process, and candidates judged by them."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from parity.contract import Result
from parity.measure.evidence import Evidence
from parity.mutants import family
from parity.mutants.evaluate import evaluate, measure_references

DTYPES = ("fp32",)


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="parity-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def base(member: str) -> Evidence:
    """One reference is enough here: `python -m parity.mutants` asks both."""
    references = ("hf",) if member == "hf" else ("meta",)
    ev = family.build(member, folder(), dtypes=DTYPES, references=references)
    torch.set_num_threads(1)
    measure_references(ev)
    return ev


def judge(member: str, load: Any) -> tuple[Evidence, list[Result]]:
    return evaluate(base(member), load, folder() / "candidate")
