"""Mistakes of training over two ranks are killed by the check named for them; what is right in other ways is not."""

from collections.abc import Iterator

import pytest

from parity.mutants import distributed, evaluate
from parity.mutants.distributed import CHECKS, MUTANTS, VARIANTS, RankMutant, RankVariant, Truth
from parity.mutants.edits.ranks.edits import EDITS
from parity.mutants.edits.ranks.work import Job, Measured, Ranks

QUICK = ("D2", "D7", "D10", "D13", "D14")  # one for each check but that of the labels; the others are slow
COPIES, SHARDS, *OTHERS = VARIANTS


def slow_but(quick: bool, entry: object, name: str) -> object:
    return pytest.param(entry, id=name, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return distributed.make_truth()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(2, "forkserver")
    yield made
    made.close()


@pytest.mark.parametrize("mutant", [slow_but(m.number in QUICK, m, m.number) for m in MUTANTS])
def test_mutant_over_ranks_is_killed_by_the_check_named_for_it(mutant: RankMutant, truth: Truth, ranks: Ranks) -> None:
    percent = distributed.judge(truth, mutant.job, ranks.run(mutant.job))
    assert distributed.killer(percent) == mutant.killed_by, percent


@pytest.mark.parametrize("variant", [slow_but(v in (COPIES, SHARDS), v, v.what) for v in VARIANTS])
def test_benign_variant_over_ranks_passes(variant: RankVariant, truth: Truth, ranks: Ranks) -> None:
    percent = distributed.judge(truth, variant.job, ranks.run(variant.job))
    assert distributed.killer(percent) is None, percent


def test_every_edit_is_used_and_every_number_is_one_mutants() -> None:
    used = [entry.job.edit for entry in (*MUTANTS, *VARIANTS) if entry.job.edit]
    assert set(used) == EDITS.keys()
    assert [m.number for m in MUTANTS] == [f"D{i + 1}" for i in range(len(MUTANTS))]
    assert {m.killed_by for m in MUTANTS} == CHECKS.keys()


def test_a_training_that_is_missing_something_is_killed(truth: Truth) -> None:
    assert distributed.killer(distributed.judge(truth, Job(), truth.right)) is None
    assert distributed.killer(distributed.judge(truth, Job(), Measured())) == "labels"
    right = truth.right
    short = Measured(right.losses, right.labels, right.norms, right.gradients, right.resumed[:-1])
    assert distributed.killer(distributed.judge(truth, Job(), short)) == "resumed"
    nan = Measured([float("nan")] * 4, right.labels, right.norms, right.gradients, right.resumed)
    assert distributed.killer(distributed.judge(truth, Job(), nan)) == "loss"


def test_a_rank_that_breaks_is_an_error_and_no_kill(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no-such-edit'"):
        ranks.run(Job(dp=2, edit="no-such-edit"))


def test_only_knows_the_numbers_over_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.choose("D3,10") == (
        [i for i, m in enumerate(evaluate.MUTANTS) if m.number == "10"],
        [],
        [MUTANTS[2]],
    )
    assert evaluate.main(["--only", "D99"]) == 2
    assert "known are 1, " in capsys.readouterr().err
