"""SECURITY.md: each class of its table has a test that is there, with the case that is named."""

import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROW = re.compile(
    r"^\| (?P<what>.+) \| (?P<example>.+) \| `(?P<file>tests/[\w/]+\.py)::(?P<test>\w+)`(?: \((?P<case>.+)\))? \|$"
)


@cache
def sources_of(file: str) -> dict[str, str]:
    """Name of each test of a file -> its source with its decorators, "" for none."""
    path = REPOSITORY / file
    if not path.is_file():
        return {}
    source = path.read_text(encoding="utf-8")
    return {node.name: source for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


@cache
def cases() -> str:
    """Sources of what several tests take their cases from."""
    return "".join(
        path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "tests/support").glob("hostile*.py"))
    )


def table(page: str) -> list[str]:
    """The rows below `What is tested`."""
    return [line for line in page.partition("## What is tested")[2].splitlines() if line.startswith("|")][2:]


def troubles(rows: list[str]) -> list[str]:
    """What is wrong with each row that does not lead to a test."""
    found = []
    for row in rows:
        match = ROW.match(row)
        if match is None:
            found.append(f"no row of class, example and test: {row}")
            continue
        source = sources_of(match["file"]).get(match["test"])
        if source is None or not match["test"].startswith("test_"):
            found.append(f"there is no test {match['file']}::{match['test']}")
        elif match["case"] and match["case"] not in source + cases():
            found.append(f"{match['file']} has no case {match['case']}")
    return found


def test_every_class_has_a_test_that_is_there() -> None:
    rows = table((REPOSITORY / "SECURITY.md").read_text(encoding="utf-8"))
    assert troubles(rows) == []
    classes = [row.split(" | ")[0] for row in rows]
    assert len(set(classes)) == len(classes) >= 60


def test_a_test_that_is_gone_is_noticed() -> None:
    gone = "| a | b | `tests/test_security_page.py::test_that_never_was` |"
    other = "| a | b | `tests/no_such_file.py::test_every_class_has_a_test_that_is_there` |"
    helper = "| a | b | `tests/test_security_page.py::table` |"
    case = "| a | b | `tests/test_imports.py::test_a_planted_breach_is_found` (no case of it) |"
    right = "| a | b | `tests/test_imports.py::test_a_planted_breach_is_found` (import numpy) |"
    assert [bool(troubles([row])) for row in (gone, other, helper, case, "| a | b |", right)] == [True] * 5 + [False]
