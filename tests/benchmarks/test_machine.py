"""Others at work on a benchmark's machine are seen, refused and named; the benchmark's own processes are not others."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import decode, machine, train
from nanollama.cli import UsageError, execute

pytestmark = pytest.mark.skipif(not machine.STAT.exists(), reason="the system does not say what others do")


def spin() -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pass


@pytest.fixture
def busy() -> Iterator[int]:
    process = multiprocessing.get_context("fork").Process(target=spin)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def test_other_work_is_counted_and_own_work_is_not(busy: int) -> None:
    began = machine.spent_s([busy])
    with machine.Company([busy]) as own, machine.Company([]) as others:
        while machine.spent_s([busy]) - began < 0.3:  # on a machine that is full its turn comes late
            time.sleep(0.05)
    assert own.cores is not None
    assert others.cores is not None
    assert others.cores > own.cores
    assert machine.disturbed([0.0, own.cores + 1, None]) == [2]


def test_a_busy_machine_is_refused(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "others_share", lambda seconds: 0.5)
    with pytest.raises(UsageError, match=r"others keep 0\.50 of \d+ cores busy.*--anyway"):
        machine.refuse_busy(anyway=False)
    machine.refuse_busy(anyway=True)
    for module in (decode, train):
        monkeypatch.setattr(module, "compare", lambda *_: pytest.fail("it began"))
        assert execute(module.main, ["--rounds", "1"]) == 2


def test_a_quiet_machine_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quiet = tmp_path / "stat"
    quiet.write_text("cpu  100 0 100 5000 0 0 0 0 0 0\n")
    monkeypatch.setattr(machine, "STAT", quiet)
    machine.refuse_busy(anyway=False, seconds=0.01)


def test_rounds_with_others_are_named() -> None:
    assert machine.disturbance([1, 3]) == ["others were at work in round 1, 3: quote ratios alone"]
    assert machine.disturbance([]) == []
