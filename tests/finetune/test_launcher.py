"""The line that continues a run is the one that was typed, its launcher included."""

import os
import sys
from pathlib import Path

import pytest

from finetune import launcher


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/venv/bin/python -m finetune.text --data a", "python -m finetune.text --data a --out out/a --resume"),
        ("python3 -m finetune.text --out here", "python -m finetune.text --out here --resume"),
        ("python -m finetune.text --out=here --resume", "python -m finetune.text --out=here --resume"),
        ("python script.py", "python -m finetune.text --out out/a --resume"),
    ],
)
def test_the_typed_line_continues_the_run(typed: pytest.MonkeyPatch, line: str, expected: str) -> None:
    typed.setattr(sys, "orig_argv", line.split())
    assert launcher.to_continue("text", Path("out/a")) == expected


def test_words_with_spaces_are_quoted(typed: pytest.MonkeyPatch) -> None:
    typed.setattr(sys, "orig_argv", ["python", "-m", "finetune.text", "--prompt", "Once upon", "--out", "o"])
    assert launcher.to_continue("text", "o") == "python -m finetune.text --prompt 'Once upon' --out o --resume"


def test_torchrun_is_in_the_line_as_it_was_typed(typed: pytest.MonkeyPatch) -> None:
    typed.setenv("TORCHELASTIC_RUN_ID", "none")
    parent = b"/venv/bin/python\0/venv/bin/torchrun\0--nproc_per_node\x002\0-m\0finetune.text\0--lr\x001e-3\0"
    typed.setattr(Path, "read_bytes", lambda path: parent if str(path) == f"/proc/{os.getppid()}/cmdline" else b"")
    expected = "torchrun --nproc_per_node 2 -m finetune.text --lr 1e-3 --out o --resume"
    assert launcher.to_continue("text", "o") == expected


def test_torchrun_is_in_the_line_where_the_kernel_does_not_tell(typed: pytest.MonkeyPatch) -> None:
    typed.setenv("TORCHELASTIC_RUN_ID", "none")
    typed.setenv("LOCAL_WORLD_SIZE", "4")
    typed.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    typed.setattr(sys, "orig_argv", ["python", "-u", "-m", "finetune.text", "--lr", "1e-3"])
    expected = "torchrun --nproc_per_node 4 -m finetune.text --lr 1e-3 --out o --resume"
    assert launcher.to_continue("text", "o") == expected


def test_a_first_start_has_no_folder_to_continue(typed: pytest.MonkeyPatch) -> None:
    assert launcher.folder_of_the_first_start() is None
    typed.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # of a launcher without a store
    assert launcher.folder_of_the_first_start() is None
