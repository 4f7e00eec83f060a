"""docs/port.md: each command of it runs as printed, and each line of output that it shows is printed."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kit_cases
from parity.kit.make import main

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs" / "port.md").read_text(encoding="utf-8")
PROGRAMS = ("python", "node", "grep", "mkdir", "rm")
EXPECTED = {"--port part": 3, "--port wrong": 1, "wrong pairing": 1}  # exit codes other than 0


def lines() -> list[str]:
    blocks = TEXT.split("```\n")[1::2]
    return [line for block in blocks for line in block.strip().splitlines()]


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what is printed; our own command in this process, since its imports take seconds."""
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "parity.kit"]:
        return main(words[3:]), capsys.readouterr().out
    done = subprocess.run(line.replace("python ", f"{shlex.quote(sys.executable)} ", 1), shell=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_every_command_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kits").mkdir()
    (tmp_path / "kits" / "llama3.1").symlink_to(kit_cases.made()[1])  # of the same shape; --set takes minutes
    (tmp_path / "tests").symlink_to(REPOSITORY / "tests")
    printed, ran = "", 0
    for line in lines():
        if line.split()[0] not in PROGRAMS:
            assert line in printed.splitlines(), line
        elif "--set" not in line:
            code, printed = run(line, capsys)
            assert code == next((code for end, code in EXPECTED.items() if line.endswith(end)), 0), printed
            ran += 1
    assert ran == 12 and "PASS" in printed


def test_its_links_lead_somewhere() -> None:
    targets = [part.split(")")[0].split("#")[0] for part in TEXT.split("](")[1:]]
    assert targets and all((REPOSITORY / "docs" / target).is_file() for target in targets)
