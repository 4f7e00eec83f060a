"""Ranks that die, hang, refuse or are stopped: the others end, and one line says which rank it was.

The processes are small ones that only watch each other: no torch.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RANK = """
import json, os, sys, time
from pathlib import Path

from finetune import peers as watching
from finetune.peers import meet

watching.ANSWER_S = 1.5  # small processes that answer at once


class Folder:
    def __init__(self, path):
        self.path = Path(path)

    def set(self, key, value):
        (self.path / "new").write_text(value)
        os.replace(self.path / "new", self.path / key.replace("/", "."))

    def get(self, key):
        return (self.path / key.replace("/", ".")).read_bytes()

    def check(self, keys):
        return all((self.path / key.replace("/", ".")).exists() for key in keys)


def act():
    print("met", flush=True)
    sys.stdin.readline()
    done = {"code": 0}
    exec(does, globals(), done)
    return done["code"]


folder, rank, size, does = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
peers = meet(Folder(folder), rank, size, rank, "127.0.0.1", 7)
peers.advice = lambda: "; ADVICE"
try:
    code = peers.guard(act)
except ValueError as error:
    print("error:", error, file=sys.stderr)
    code = 2
sys.exit(code)
"""
WAITS = "time.sleep(60)"  # as in a collective that nothing ends
Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start(tmp_path: Path, cold_processes: None) -> Iterator[Start]:
    """`start(*does, size=)`: a rank for each Python text, which it runs when all have met and `go` was called."""
    ranks: list[subprocess.Popen[str]] = []

    def begin(*does: str, size: int = 0) -> list["subprocess.Popen[str]"]:
        for rank, text in enumerate(does):
            line = [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(size or len(does)), text]
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return ranks

    yield begin
    for process in ranks:
        process.kill()
        process.communicate()


def go(ranks: list["subprocess.Popen[str]"]) -> None:
    for process in ranks:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "met\n"
    for process in ranks:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()


def ends(ranks: list["subprocess.Popen[str]"]) -> tuple[list[int], list[str]]:
    """Their exit codes, and all that they said."""
    said = [line for process in ranks for line in process.communicate(timeout=30)[1].splitlines() if line]
    return [process.returncode for process in ranks], said


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_the_death_of_any_rank_ends_all_with_one_line_that_names_it(start: Start, dead: int) -> None:
    ranks = start(WAITS, WAITS, WAITS)
    go(ranks)
    began = time.monotonic()
    ranks[dead].kill()
    codes, said = ends(ranks)
    assert time.monotonic() - began < 25
    assert codes == [-signal.SIGKILL if rank == dead else 1 for rank in range(3)]
    [line] = said
    assert line.startswith(f"error: rank {dead} of 3 (process {ranks[dead].pid} on {socket.gethostname()}) died")
    assert line.endswith("; ADVICE")


def test_a_broken_collective_says_nothing_of_its_own_when_its_cause_is_a_dead_rank(start: Start) -> None:
    breaks = "time.sleep(0.1); raise RuntimeError('Connection closed by peer')"
    ranks = start(breaks, breaks, "os.kill(os.getpid(), 9)")
    go(ranks)
    codes, said = ends(ranks)
    assert codes == [1, 1, -signal.SIGKILL]
    assert [line.partition(" (")[0] for line in said] == ["error: rank 2 of 3"]


def test_what_every_rank_refuses_is_said_once(start: Start) -> None:
    ranks = start(*["raise ValueError('--lr -1')"] * 3)
    go(ranks)
    assert ends(ranks) == ([2, 2, 2], ["error: --lr -1"])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_ends_the_others_without_a_word(start: Start, rank: int) -> None:
    does = [WAITS, WAITS]
    does[rank] = "raise ValueError('no such file')"
    ranks = start(*does)
    go(ranks)
    assert ends(ranks) == ([2, 2], ["error: no such file"])


def test_a_bug_of_one_rank_shows_its_traceback_and_ends_the_others(start: Start) -> None:
    ranks = start(WAITS, "{}['absent']")
    go(ranks)
    codes, said = ends(ranks)
    assert codes == [1, 1]
    assert said[0].startswith("Traceback")
    assert said[-1] == "KeyError: 'absent'"


def test_ranks_that_stop_by_a_signal_keep_its_code(start: Start) -> None:
    ranks = start("code = 143", "time.sleep(0.2); code = 143", "code = 143")
    go(ranks)
    assert ends(ranks) == ([143, 143, 143], [])


def test_ranks_end_one_after_another_when_the_run_is_done(start: Start) -> None:
    ranks = start("pass", "time.sleep(0.3)", "time.sleep(0.1)")
    go(ranks)
    assert ends(ranks) == ([0, 0, 0], [])


def test_a_hang_is_reported_with_the_stacks_of_all_and_the_rank_that_does_not_come(start: Start) -> None:
    waits = "time.sleep(0.1); raise RuntimeError('Timed out waiting 7000ms for recv operation')"
    ranks = start(waits, "def far_away(): time.sleep(60)\nfar_away()", waits)
    go(ranks)
    codes, said = ends(ranks)
    assert codes == [1, 1, 1]
    assert said[-1] == "error: ranks 0, 2 waited 7 s (--collective_timeout_s) in a collective for rank 1; ADVICE"
    starts = [said.index(f"--- stack of rank {rank}") for rank in range(3)]
    assert starts == sorted(starts)
    assert "Timed out waiting" in "".join(said[starts[0] : starts[1]])
    assert "far_away" in "".join(said[starts[1] : starts[2]])


def test_a_rank_that_does_not_even_answer_is_named(start: Start) -> None:
    ranks = start(WAITS, "time.sleep(0.1); raise RuntimeError('Timed out waiting 7000ms for recv operation')")
    go(ranks)
    ranks[0].send_signal(signal.SIGSTOP)
    _, said = ends(ranks[1:])
    assert "in a collective for rank 0, which does not answer; ADVICE" in said[-1]
    assert sum("Timed out waiting" in line for line in said) == 1


def test_a_stop_before_all_have_come_names_those_that_have_not(start: Start, tmp_path: Path) -> None:
    ranks = start(WAITS, WAITS, size=3)
    assert ranks[1].stdout
    assert ranks[1].stdout.readline() == "met\n"
    ranks[0].terminate()
    codes, said = ends(ranks)
    assert codes[0] == 128 + signal.SIGTERM
    assert said[0] == "error: stopped while rank 2 of 3 had not come yet"


def test_a_stranger_at_the_door_is_no_rank(start: Start, tmp_path: Path) -> None:
    ranks = start("pass", size=2)
    while not (tmp_path / "nanollama.peers").exists():
        time.sleep(0.01)
    there = json.loads((tmp_path / "nanollama.peers").read_text())
    for said in ({"token": "guess", "rank": 1, "name": "me"}, ["rank", 1], {}):
        with socket.create_connection((there["host"], there["port"])) as door:
            door.sendall(json.dumps(said).encode() + b"\n")
    line = [sys.executable, "-c", RANK, str(tmp_path), "1", "2", "pass"]
    pipe = subprocess.PIPE
    ranks.append(subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=dict(os.environ)))
    go(ranks)
    assert ends(ranks) == ([0, 0], [])
