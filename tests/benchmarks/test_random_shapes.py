"""A few random shapes through both references and every gate; benchmarks/random_shapes.py draws 500."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("draws", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_random_shapes_raise_no_alarm(draws: int) -> None:
    """In a process of its own: Meta's code sets process-wide state."""
    command = [sys.executable, "-m", "benchmarks.random_shapes", "--draws", str(draws), "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{draws} draws, 0 alarms" in done.stdout
