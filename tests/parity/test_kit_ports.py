"""Ports in other languages judged by kits: right ones pass, planted mistakes fail at the tap where they are made."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import kit_cases
from benchmarks.kit_ports import MISTAKES, PORTS, Missing, build, departs, judge, judge_all, markdown, planted, run_port
from parity.kit.arrays import Kit
from parity.kit.family import RECIPES

NOT_C = [port for port in PORTS if port != "c"]  # that one: test_kit_commands.py
# Some mistakes of one port, one of the others; all of the one in C, in test_kit_commands.py. The matrix: benchmarks.
SOME = ("eps", "bf16", "pairing", "heads", "document", "labels")
WRONG = [("javascript", mistake) for mistake in SOME] + [(port, "document") for port in NOT_C if port != "javascript"]


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit(kit_cases.made()[1])


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """How to start a port, compiled once."""
    return functools.cache(lambda name: built(name, tmp_path_factory.mktemp(name)))


def built(name: str, out: Path) -> list[str]:
    try:
        return build(name, out)
    except Missing as missing:
        pytest.skip(f"the port in {name}: {missing}")


@pytest.mark.parametrize("name", NOT_C)
def test_a_right_port_passes_by_itself_and_by_the_check(
    name: str, commands: Callable[[str], list[str]], kit: Kit, tmp_path: Path
) -> None:
    code, line = run_port(commands(name), kit.folder, tmp_path / "out")
    assert code == 0 and line.startswith("PASS: "), line
    assert departs(kit, tmp_path / "out") == ("pass", None)


@pytest.mark.parametrize(("name", "mistake"), WRONG)
def test_a_wrong_port_fails_where_it_is_wrong(
    name: str, mistake: str, commands: Callable[[str], list[str]], kit: Kit, tmp_path: Path
) -> None:
    code, line = run_port(commands(name), kit.folder, tmp_path / "out", mistake)
    tap = MISTAKES[mistake].tap
    assert code == 1 and line.endswith(f"first at {tap}")
    assert departs(kit, tmp_path / "out") == ("fail", tap)


FIRST = {"gradient": "grad.layers.1.feed_forward.w1.weight", "decay": "adamw.1.layers.0.attention_norm.weight"}


@pytest.mark.parametrize("mistake", FIRST)
def test_a_wrong_backward_pass_or_step_fails(mistake: str, kit: Kit, tmp_path: Path) -> None:
    code, line = run_port(built("numpy", tmp_path), kit.folder, tmp_path / "out", mistake)
    assert (code, line.split()[-1]) == (1, FIRST[mistake])
    assert departs(kit, tmp_path / "out")[0] == "fail"


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTS)
def test_every_port_passes_by_every_kit_and_fails_by_one_of_each_kind(name: str, tmp_path: Path) -> None:
    """Right by all six; with its mistakes by that with 8 queries a kv head. All of it: benchmarks.kit_ports."""
    command = built(name, tmp_path)
    for kit in (Kit(kit_cases.family() / recipe) for recipe in RECIPES):
        assert len(planted(name, kit)) >= 5
        assert judge(command, kit, tmp_path, "")["as_expected"]
    wide = Kit(kit_cases.family() / "70b")
    assert [tried for tried in judge_all(name, command, wide, tmp_path) if not tried["as_expected"]] == []


def test_the_table_of_the_docs_is_the_measured_one() -> None:
    root = Path(__file__).parents[2]
    tried = json.loads((root / "benchmarks" / "results" / "kit_ports.json").read_text())["tried"]
    assert list(tried) == list(PORTS) and all(set(kits) == set(RECIPES) for kits in tried.values())
    assert all(one["as_expected"] for kits in tried.values() for by in kits.values() for one in by)
    assert all(len(by) >= 6 for kits in tried.values() for by in kits.values())  # the right one and five mistakes
    page = (root / "docs" / "kit.md").read_text(encoding="utf-8")
    assert page.split("<!-- ports -->\n")[1].split("<!-- end -->")[0] == markdown(tried)
