"""benchmarks.frozen notices a changed float, a missing check, another cause; between two machines, words and counts."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import frozen
from benchmarks.frozen_record import (
    ROUNDED,
    compare,
    differences,
    kept_of_report,
    laid_out,
    read_record,
    without_fleeting,
)

RESULT = {
    "check": "logits",
    "gate": "G3",
    "status": "pass",
    "reference": "meta",
    "dtype": "fp32",
    "path": "exact",
    "metric": "rho",
    "value": 0.8939476492573437,
    "bound": 2.0,
    "where": "logits, sequence 3, position 285",
    "reason": None,
    "checkpoint": "given",
}
REPORT = {
    "verdict": "pass",
    "results": [RESULT, {**RESULT, "check": "argmax", "metric": "tokens that differ", "value": 0}],
    "first_divergence": {"tap": "layers.0.q_rope", "probable_cause": "the RoPE base looks like 10,000"},
    "rho": {"exact fp32": {"embed": 0.5}},
    "seconds": 3.25,
    "environment": {"torch": "2.13.0"},
}
LOGITS = "logits G3 meta fp32 exact rho given"
HERE = {"torch": "2.13.0", "cpu": "one"}


def case() -> dict[str, Any]:
    """A record's cases: one report."""
    return {"check": kept_of_report(without_fleeting(deepcopy(REPORT), Path("/nowhere")))}


def lines(after: dict[str, Any], *, bitwise: bool = True) -> list[str]:
    return [str(difference) for difference in differences(case(), after, bitwise=bitwise)]


def test_a_record_equals_itself() -> None:
    assert lines(case()) == []


def test_the_last_bit_of_a_float_is_seen() -> None:
    after = case()
    after["check"]["results"][LOGITS]["value"] = 0.8939476492573438
    field = f"results.{LOGITS}.value"
    assert lines(after) == [f"check: {field}: before 0.8939476492573437, after 0.8939476492573438"]


def test_the_last_bit_of_a_float_is_rounding_on_another_machine() -> None:
    after = case()
    after["check"]["results"][LOGITS]["value"] = 0.8939476492573438
    after["check"]["results"][LOGITS][ROUNDED]["where"] = "logits, sequence 1, position 2"
    after["check"][ROUNDED]["rho"]["exact fp32"]["embed"] = 0.25
    assert lines(after, bitwise=False) == []


@pytest.mark.parametrize("bitwise", [True, False])
def test_a_missing_check_is_seen(bitwise: bool) -> None:
    after = case()
    del after["check"]["results"][LOGITS]
    (line,) = lines(after, bitwise=bitwise)
    assert line.startswith(f"check: results.{LOGITS}: before {{") and line.endswith("after (absent)")


@pytest.mark.parametrize("bitwise", [True, False])
def test_a_check_that_was_not_there_is_seen(bitwise: bool) -> None:
    after = case()
    after["check"]["results"]["rope"] = 1
    assert lines(after, bitwise=bitwise) == ["check: results.rope: before (absent), after 1"]


@pytest.mark.parametrize("bitwise", [True, False])
@pytest.mark.parametrize(
    ("way", "new"),
    [
        (("first_divergence", "probable_cause"), "gate and up are swapped"),
        (("first_divergence", "tap"), "layers.0.q"),
        (("first_divergence",), None),
        (("verdict",), "fail"),
        (("results", LOGITS, "status"), "skip"),
        (("results", LOGITS, "value"), None),
        (("results", LOGITS, "value"), 0),
        (("results", LOGITS.replace("logits", "argmax").replace("rho", "tokens that differ"), "value"), 1),
    ],
)
def test_words_and_counts_are_compared_on_every_machine(way: tuple[str, ...], new: object, bitwise: bool) -> None:
    after = case()
    place = after["check"]
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = new
    (line,) = lines(after, bitwise=bitwise)
    assert line.startswith(f"check: {'.'.join(way)}: ") and line.endswith(f"after {json.dumps(new)}")


def test_a_longer_list_is_seen_whatever_it_holds() -> None:
    before, after = {"run": {"losses": [0.5, 0.25]}}, {"run": {"losses": [0.5, 0.25, 0.125]}}
    (found,) = differences(before, after, bitwise=False)
    assert (found.case, found.field) == ("run", "losses")


def test_zero_and_minus_zero_are_not_the_same_bits_and_nan_is_itself() -> None:
    nan = float("nan")
    assert differences({"a": {"x": nan}}, {"a": {"x": float("nan")}}, bitwise=True) == []
    (found,) = differences({"a": {"x": 0.0}}, {"a": {"x": -0.0}}, bitwise=True)
    assert found.field == "x"


def test_rows_of_one_name_are_all_kept() -> None:
    kept = kept_of_report({"results": [RESULT, RESULT, RESULT]})["results"]
    assert list(kept) == [LOGITS, f"{LOGITS} (2)", f"{LOGITS} (3)"]


def test_seconds_and_folders_are_no_difference() -> None:
    report = {"seconds": 1.5, "notices": ["/tmp/frozen-abc/ckpt has no tokenizer"], "tokens": {"peak_bytes": 7}}
    assert without_fleeting(report, Path("/tmp/frozen-abc")) == {
        "notices": ["FOLDER/ckpt has no tokenizer"],
        "tokens": {},
    }


def test_how_many_mistakes_there_was_time_for_is_no_difference() -> None:
    found = {"named": "eps", "best": [{"mistake": "eps", "share": 0.99}, {"mistake": "theta", "share": 0.01}]}
    kept = [
        kept_of_report({"results": [], "first_divergence": {"explained": {**found, "asked": asked, "best": best}}})
        for asked, best in ((101, found["best"]), (167, found["best"][:1]))
    ]
    assert kept[0] == kept[1] and kept[0]["first_divergence"]["explained"]["best"][0]["mistake"] == "eps"


def reasoned(status: str, reason: str) -> dict[str, Any]:
    """A record's cases: a report whose one result has that reason."""
    return {"check": kept_of_report({"results": [{**RESULT, "status": status, "reason": reason}]})}


@pytest.mark.parametrize(("status", "lines"), [("pass", 0), ("fail", 0), ("skip", 1), ("error", 1)])
def test_the_reason_of_what_was_not_judged_is_compared_on_every_machine(status: str, lines: int) -> None:
    before, after = reasoned(status, "335 of 430"), reasoned(status, "332 of 430")
    assert len(differences(before, after, bitwise=False)) == lines
    assert len(differences(before, after, bitwise=True)) == 1


def test_floats_are_compared_on_the_machine_of_the_record_alone() -> None:
    before = {"machine": HERE, "cases": {"a": {"x": 0.5}}}
    found, how = compare(before, {"machine": HERE, "cases": {"a": {"x": 0.75}}})
    assert len(found) == 1 and how.startswith("bit for bit")
    found, how = compare(before, {"machine": {**HERE, "cpu": "two"}, "cases": {"a": {"x": 0.75}}})
    assert found == [] and "no floats" in how and "cpu one there and two here" in how


def run_main(monkeypatch: pytest.MonkeyPatch, case: Callable[[frozen.Work], Any], **flags: Any) -> int:
    """The command with one case, on a machine that is always the same."""
    monkeypatch.setattr(frozen, "SMALL", {"a": case})
    monkeypatch.setattr(frozen, "machine", lambda: HERE)
    return frozen.main(small=True, **flags)


def test_the_command_ends_with_1_where_something_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, lambda work: {"x": 0.5, "seconds": 1}, store=tmp_path) == 0
    assert run_main(monkeypatch, lambda work: {"x": 0.5, "seconds": 1}, against=tmp_path) == 0
    assert "1 cases, nothing differs (bit for bit" in capsys.readouterr().out
    assert run_main(monkeypatch, lambda work: {"x": 0.75, "seconds": 2}, against=tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[0] == "a: x: before 0.5, after 0.75"


def test_a_command_that_fails_is_a_difference_and_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(work: frozen.Work) -> None:
        work.command("json.tool", "no-such-file")

    assert run_main(monkeypatch, lambda work: 1, store=tmp_path) == 0
    assert run_main(monkeypatch, broken, against=tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith('a: the whole case: before 1, after "could not run: ')
    with pytest.raises(ValueError, match=r"nothing was stored: a could not run: .* json\.tool no-such-file"):
        run_main(monkeypatch, broken, store=tmp_path)


def test_a_record_is_laid_out_in_lines_that_json_reads_back() -> None:
    record = {"a": [{"x": 0.1, "y": [None, True]}] * 20, "b": {}, "c": "é" * 500}
    text = laid_out(record)
    assert json.loads(text) == record and len(text.splitlines()) == 26


def test_a_record_that_is_not_there_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small.json: no such record: make one, .* --small --store"):
        frozen.main(small=True, against=tmp_path)


def test_the_committed_record_names_a_machine_and_every_case() -> None:
    record = read_record(Path(frozen.__file__).parent / "frozen" / "small.json")
    assert list(record["cases"]) == list(frozen.SMALL)
    assert {"torch", "cpu_capability", "threads"} <= set(record["machine"])
