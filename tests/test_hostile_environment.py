"""Variables of the environment that lead nowhere: caches that are files, sizes that are words, old ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.parallelize import open_world
from finetune.prepare.stories import stories
from nanollama import cli
from nanollama.__main__ import COMMANDS
from nanollama.checkpoint import CheckpointError, open_checkpoint
from parity.contract import UsageError
from parity.run.cache import trace_cache
from parity.synth.embedded import embedded_checkpoint


def places(folder: Path) -> dict[str, Path]:
    """Where no folder can be made."""
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to("link")
    return {"a file": folder / "file", "below a file": folder / "file" / "x", "a link to itself": folder / "link",
            "a name too long": folder / ("x" * 300), "of the kernel's": Path("/proc/x")}  # fmt: skip


PLACES = ("a file", "below a file", "a link to itself", "a name too long", "of the kernel's")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variable", ["NANOLLAMA_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be_is_one_line(
    place: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOLLAMA_CACHE", raising=False)
    monkeypatch.setenv(variable, str(places(tmp_path)[place]))
    with pytest.raises(UsageError, match=r"cannot be written there .*set NANOLLAMA_CACHE") as said:
        embedded_checkpoint()
    assert "\n" not in str(said.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", PLACES)
def test_a_cache_of_a_run_that_cannot_be_is_one_line(place: str, tmp_path: Path) -> None:
    data, environment = tmp_path / "stories.txt", dict(os.environ)
    data.write_text("<|endoftext|>".join(stories(20)))
    environment["NANOLLAMA_CACHE"] = str(places(tmp_path)[place])
    line = ["--data", str(data), "--init", "260K", "--max_steps", "1", "--threads", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "finetune.text", *line], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    said = done.stderr.splitlines()
    assert done.returncode == 2 and [text.startswith("error: ") for text in said] == [True], done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("said", ["x", "-1", "1.5", "9" * 5000, "0x10", "\u0661"])
def test_bytes_of_traces_that_are_no_number_are_one_line(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_TRACE_BYTES", said)
    with pytest.raises(UsageError, match="expected a number of bytes") as refusal:
        trace_cache(tmp_path)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9999"),
        ({"WORLD_SIZE": "2"}, "RANK is not in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1 in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "a"}, "LOCAL_RANK=a in"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT=x in"),
    ],
)
def test_what_a_shell_has_left_of_torchrun_is_one_line(
    variables: dict[str, str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as said:
        open_world("cpu")
    assert part in str(said.value) and len(str(said.value)) < 300 and "\n" not in str(said.value)


def test_a_hub_cache_that_is_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("mine")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "file" / "hub"))
    with pytest.raises(CheckpointError, match=r"meta-llama/Llama-3\.2-1B: is no local path") as said:
        open_checkpoint("meta-llama/Llama-3.2-1B")
    assert "\n" not in str(said.value) and (tmp_path / "file").read_text() == "mine"
    assert cli.execute(COMMANDS, ["inspect", "meta-llama/Llama-3.2-1B"]) == 2
