"""The checker checked: it is sound on made-up evidence, and faults planted in it are noticed."""

import pytest

from parity.mutants.selftest import FAULTS, Fault, noticed, problems
from parity.run.prompts import from_file


def test_harness_is_sound_on_made_up_evidence() -> None:
    assert problems() == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.number)
def test_planted_fault_is_noticed(fault: Fault) -> None:
    assert noticed(fault)


def test_prompt_that_ends_in_a_space_is_remarked(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "prompts.txt"  # type: ignore[operator]
    path.write_text("Simply put, \nClearly\n")
    assert len(from_file(path).notices) == 1
