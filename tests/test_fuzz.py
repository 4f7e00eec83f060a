"""A few changed files a reader, each opened or refused in one line; `make fuzz` tries as many as there is time for."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fuzz
import mutators
from fuzz_target import Target
from fuzz_targets import targets

REPOSITORY = Path(__file__).resolve().parent.parent
READERS = ("tiktoken", "tokenizer.model", "tokenizer.json", "tokenizer.bin", "chat", "json of a checkpoint", "parquet")
INPUTS = 500  # of each, one to five milliseconds apiece


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_fuzzed(found: dict[str, Target]) -> None:
    assert {*found} | {"parquet"} == {*READERS}  # which needs a library


@pytest.mark.parametrize("reader", READERS)
def test_changed_files_are_opened_or_refused_in_one_line(reader: str, found: dict[str, Target]) -> None:
    if reader not in found:
        pytest.skip("needs pyarrow: pip install 'llama-parity[data]'")
    target = found[reader]
    original = target.file.read_bytes()
    assert target.attempt(original) is None
    outcomes = [fuzz.try_one(target, fuzz.changed(reader, target, original, 0, i)) for i in range(INPUTS)]
    target.file.write_bytes(original)
    assert [what for kind, what in outcomes if kind == "finding"] == []


@pytest.mark.slow
@pytest.mark.fuzz
def test_a_thousand_changed_files_a_reader(tmp_path: Path) -> None:
    """In processes whose memory is limited; what hangs or ends one is a finding."""
    line = [sys.executable, fuzz.__file__, "--inputs", "1000", "--seconds", "1000", "--seed", "1"]
    paths = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "support"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def raise_key_error() -> None:
    raise KeyError("a")


def raise_lines() -> None:
    raise CheckpointError("one\ntwo")


class CheckpointError(ValueError):
    """By its name an error for the user."""


def refuse() -> None:
    raise CheckpointError("x.json: is none")


@pytest.mark.parametrize(
    ("opened", "outcome"),
    [
        (raise_key_error, ("finding", "KeyError: 'a'")),
        (raise_lines, ("finding", "AssertionError: not one short line: 'one\\ntwo'")),
        (refuse, ("refused", "x.json: is none")),
        (lambda: None, ("opened", "")),
    ],
)
def test_a_finding_is_told_from_a_refusal(
    opened: Callable[[], object], outcome: tuple[str, str], tmp_path: Path
) -> None:
    target = Target(tmp_path / "file", mutators.mutate_json, opened)
    assert fuzz.try_one(target, b"{}") == outcome


def test_the_same_seed_gives_the_same_file(found: dict[str, Target]) -> None:
    for name, target in found.items():
        original = target.file.read_bytes()
        files = [target.change(original, random.Random(f"{name} {i}")) for i in (1, 1, 2)]
        assert files[0] == files[1] and any(
            target.change(original, random.Random(f"{name} {i}")) != original for i in range(5)
        )
