"""nanollama over processes as the candidate of a check."""

import json
from pathlib import Path

import pytest

from parity.candidates.nano import distributed
from parity.check import Flags, main, request_of
from parity.contract import UsageError
from tests import tiny


def test_flags_name_the_candidate() -> None:
    assert request_of(Flags(tp=2)).candidate == "parity.candidates.nano.distributed:tp2"
    assert request_of(Flags(fsdp=2, tp=2)).candidate == "parity.candidates.nano.distributed:fsdp2tp2"
    assert request_of(Flags()).candidate == "nanollama"


@pytest.mark.parametrize("flags", [Flags(tp=0), Flags(tp=2, candidate="mine.py:load"), Flags(fsdp=-2)])
def test_other_candidates_and_numbers_are_refused(flags: Flags) -> None:
    with pytest.raises(UsageError, match="numbers of processes of nanollama itself"):
        request_of(flags)


def test_only_names_of_sizes_are_candidates() -> None:
    with pytest.raises(AttributeError, match="expected tp2, fsdp2"):
        distributed.__getattr__("dp2")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--tp", "2"], ["--fsdp", "2"]])
def test_the_model_over_processes_passes_with_training(tmp_path: Path, flags: list[str]) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "checkpoint")
    report = tmp_path / "report.json"
    line = ["--ckpt", str(checkpoint), "--dtype", "fp32", "--cache", "off", "--json", str(report), *flags]
    assert main(line) == 0
    results = json.loads(report.read_text())["results"]
    trained = {r["metric"] for r in results if r["check"] == "training" and r["status"] == "pass"}
    assert {"loss", "gradient", "document mask", "accumulation", "optimizer step", "ten losses"} <= trained
