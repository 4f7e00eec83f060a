"""No version that the project admits, and none that is installed, has a known hole of tests/data/advisories.json."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
ADVISORIES = json.loads((REPOSITORY / "tests" / "data" / "advisories.json").read_text(encoding="utf-8"))["advisories"]


def requirements(project: dict[str, Any]) -> Iterator[Requirement]:
    """Of the build, the package and its extras, without those that name the package's own extras."""
    lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
    for line in [text for part in (*lists, *project["project"]["optional-dependencies"].values()) for text in part]:
        requirement = Requirement(line)
        if requirement.name != project["project"]["name"]:
            yield requirement


def floor(requirement: Requirement) -> Version | None:
    """The lowest version that it admits; None: any."""
    found = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    return max(found, default=None)


def holes(requirement: Requirement) -> list[str]:
    """The advisories that its floor lies below."""
    name, lowest = canonicalize_name(requirement.name), floor(requirement)
    known = [entry for entry in ADVISORIES if entry["package"] == name]
    return [entry["id"] for entry in known if lowest is None or lowest < Version(entry["mended"])]


def declared() -> list[Requirement]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return list(requirements(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))))


def test_every_dependency_has_a_floor_above_its_known_holes() -> None:
    found = declared()
    assert len(found) > 20
    assert [str(r) for r in found if floor(r) is None] == []
    assert {str(r): holes(r) for r in found if holes(r)} == {}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch>=2.9,<2.14", ["CVE-2026-24747"]),
        ("transformers>=5", ["CVE-2026-4372", "CVE-2026-5241"]),
        ("Sentence_Piece>=0.1", []),  # of another name
        ("sentencepiece>=0.2", ["CVE-2026-1260"]),
        ("tqdm", ["CVE-2024-34062"]),
        ("jinja2>=3.1.6", []),
    ],
)
def test_a_floor_that_admits_a_hole_is_found(line: str, found: list[str]) -> None:
    assert holes(Requirement(line)) == found


@pytest.mark.parametrize("entry", ADVISORIES, ids=lambda entry: entry["id"])
def test_what_is_installed_has_no_known_hole(entry: dict[str, str]) -> None:
    try:
        installed = Version(version(entry["package"]))
    except PackageNotFoundError:
        pytest.skip(f"{entry['package']} is not installed here")
    assert installed >= Version(entry["mended"]), f"{entry['package']} {installed} has {entry['id']}: {entry['what']}"


def test_advisories_are_told_apart_and_say_what_they_are() -> None:
    assert len({entry["id"] for entry in ADVISORIES}) == len(ADVISORIES) >= 20
    assert all(set(entry) == {"package", "id", "mended", "what"} for entry in ADVISORIES)
    assert all(canonicalize_name(entry["package"]) == entry["package"] for entry in ADVISORIES)
