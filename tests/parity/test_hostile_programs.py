"""Programs as candidates that hang, flood, lie and die: the right word in the time they have, nothing of them left."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from hostile_cases import TABLES, VOCAB, judge, rounded
from parity.candidates.command import Command
from parity.candidates.limits import Limits, limited, split_limits
from parity.candidates.program import Ended, Exceeded, Program
from parity.check import main
from parity.contract import UsageError
from ports import plain_port

HOSTILE = Path(plain_port.__file__).parent / "hostile_program.py"
LIMITS = Limits(60, 60, answer_bytes=1 << 20)
SHORT = Limits(3, 4)  # for those that use it up
SOON_S = 60  # of a whole run here

FAIL = {
    "never begins": "gave no answer to `can` within 3 s: a larger --first_byte_s waits",
    "never answers": "gave no answer to `logits` within 3 s",
    "a byte at a time": "gave no whole answer to `logits` within 4 s: a larger --answer_s waits",
    "without end": "answers with more than 1 MiB: a larger --answer_mb lets it",
    "waits for a child": "gave no answer to `logits` within 3 s",
    "leaves a child": "ended with exit code 3 at `logits`",
    "kills itself": "was ended by SIGSEGV at `logits`",
    "closes its output": "closed its output at `logits`",
    "says it twice": "said more than one line before `",
    "orders": "answered `logits` with",
    "a shape of words": "answered `logits` with",
    "a deep shape": "answered `logits` with",
    "an immense shape": "expected (1, 99999999999, 99999999999) of float32",
    "a file less": "wrote no logits.f32",
    "a link to a file": "logits.f32 is a link",
    "a link to a device": "logits.f32 is a link",
    "a pipe": "logits.f32 is no regular file",
    "a folder": "logits.f32 is no regular file",
    "a terabyte": "logits.f32 holds 1099511627776 bytes",
    "one too few": "of float32",
    "one too many": "of float32",
    "NaN": "",
    "infinite": "",
}
PASS = ("nothing", "loud beside")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made: empty at the end, however the program ended."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    def write(logits: torch.Tensor) -> Path:
        file = tmp_path / "table.json"
        file.write_text(json.dumps(logits.tolist()))
        return file

    return write


def loader(table: Path, kind: str, limits: Limits = LIMITS) -> Callable[..., Command]:
    """load(...) of the hostile program."""
    opened: Any = SimpleNamespace(config=tiny.config(VOCAB), weights=None)
    words = [sys.executable, "-S", str(HOSTILE), str(table), kind]
    return lambda checkpoint, dtype, device: Command(words, opened, limits)


def processes_of(table: Path) -> list[int]:
    """Those that were started with the table on their line, and children of theirs that sleep."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and (os.fsencode(table) in line or line[:2] == [b"sleep", b"3600"]):
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize("kind", FAIL)
def test_a_hostile_program_fails_within_its_limits(
    kind: str, tmp_path: Path, temporary: Path, table: Callable[..., Path]
) -> None:
    file, started = table(rounded(TABLES["logits"], 2)), time.monotonic()
    limits = SHORT if "within" in FAIL[kind] else LIMITS
    results, verdict = judge(loader(file, kind, limits), tmp_path)
    assert verdict == "fail" and time.monotonic() - started < SOON_S
    said = [str(r.reason) for r in results if r.status.value in ("error", "fail")]
    assert any(FAIL[kind] in reason for reason in said), said
    assert processes_of(file) == []


@pytest.mark.parametrize("kind", PASS)
def test_a_right_program_passes_whatever_it_says_beside(
    kind: str, tmp_path: Path, temporary: Path, table: Callable[..., Path]
) -> None:
    results, verdict = judge(loader(table(rounded(TABLES["logits"], 2)), kind), tmp_path)
    assert verdict == "pass", [r for r in results if r.status.value in ("error", "fail")]


def test_negative_zero_is_zero(tmp_path: Path, temporary: Path, table: Callable[..., Path]) -> None:
    """A sum of negative parts that vanish has that sign: no error, and none is seen."""
    logits = rounded(TABLES["logits"], 2)
    negative = torch.where(logits.abs() < logits.abs().amin() * 1.5, -0.0, logits)
    assert bool((negative == 0).any() and torch.signbit(negative[negative == 0]).all())
    opened: Any = loader(table(negative), "nothing")("-", torch.float32, "cpu")
    assert torch.signbit(opened(torch.arange(VOCAB)[None])[0][negative == 0]).all()
    del opened


def test_a_request_longer_than_a_pipe_is_read_or_late(table: Callable[..., Path], temporary: Path) -> None:
    file = table(rounded(TABLES["logits"], 2))
    right = loader(file, "nothing")("-", torch.float32, "cpu")
    ids = torch.randint(VOCAB, (1, 60_000))
    assert torch.equal(right(ids), rounded(TABLES["logits"], 2)[ids])
    deaf = loader(file, "reads no more", SHORT)("-", torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="gave no answer to"):
        deaf(ids)
    del right, deaf


def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path, table: Callable[..., Path], temporary: Path) -> None:
    command = loader(table(rounded(TABLES["logits"], 2)), "nothing")("-", torch.float32, "cpu")
    others = tmp_path / "others"
    others.mkdir()
    (others / "theirs.f32").write_bytes(b"\0" * 64)
    (command.folder / "arrays").symlink_to(others)
    assert command._emptied().is_dir() and not command._emptied().is_symlink()
    assert (others / "theirs.f32").exists()
    del command


def test_a_program_that_ended_says_so_each_time(tmp_path: Path) -> None:
    program = Program(["sh", "-c", "echo gone >&2"], LIMITS)
    for _ in range(2):
        with pytest.raises((Ended, Exceeded)):
            program.ask("can")
    assert program.last_words() == "gone"
    program.end()


# --- The whole command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "meta", n_layers=1)


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize(
    ("kind", "verdict", "said"),
    [
        ("kills its parent", "fail", "was killed"),
        ("never answers", "fail", "gave no answer to `logits` within 3 s"),
        ("leaves a child", "fail", "ended with exit code 3"),
    ],
)
def test_the_command_says_the_right_word_and_leaves_nothing(
    kind: str, verdict: str, said: str, checkpoint: Path, tmp_path: Path, temporary: Path, table: Callable[..., Path]
) -> None:
    file, out = table(torch.zeros(512, 4)), tmp_path / "report.json"
    line = f"cmd:{sys.executable} -S {HOSTILE} {file} '{kind}'"
    limits = ("--first_byte_s", "3", "--answer_s", "4")
    common = ("--references", "meta", "--dtype", "fp32", "--checks", "logits", "--json", str(out), "--twin", "off")
    assert main(["--ckpt", str(checkpoint), "--candidate", line, *limits, *common]) == 1
    report = json.loads(out.read_text())
    assert report["verdict"] == verdict and said in report["why"] + str(report["results"])
    assert processes_of(file) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--answer_s", "0"), "--answer_s 0: expected more than 0"),
        (("--first_byte_s", "nan"), "--first_byte_s nan: expected more than 0"),
        (("--answer_mb", "-1"), "--answer_mb -1: expected more than 0"),
        (("--first_byte_s", "9", "--answer_s", "8"), "--first_byte_s 9: expected at most --answer_s, which is 8"),
        (("--answer_s", "8", "--candidate", "nanollama"), "--answer_s is a program's or a server's"),
    ],
)
def test_limits_that_are_none_are_refused(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--candidate", "cmd:true", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_limits_travel_in_the_name() -> None:
    assert limited("cmd:./port", None, None, None) == "cmd:./port"
    assert split_limits(limited("cmd:./port {ckpt}", 2, None, 1)) == (Limits(2, 3600, 1 << 20), "cmd:./port {ckpt}")
    assert split_limits(limited("http://h/v1#model=x", None, 5, None)) == (Limits(5, 5), "http://h/v1#model=x")
    with pytest.raises(UsageError, match="expected limits:"):
        split_limits("limits:1:2 cmd:x")
