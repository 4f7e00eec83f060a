"""The gates inside a port's own test-suite, as pytest tests.

    pytest -p parity.pytest_plugin --parity-candidate my_port.py:load --parity-flags "--ckpt Meta-Llama-3.1-8B"

adds one test for each check: `parity::logits`, `parity::cache`, ... A test of your own may ask for the fixture instead:

    def test_port_matches_meta(parity_case):
        report = parity_case("my_port.py:load", "--ckpt", "tiny")
        assert report["verdict"] == "pass", report["why"]
"""

import functools
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from nanollama.cli import read
from nanollama.printable import printable_all

if TYPE_CHECKING:
    from parity.contract import Result
    from parity.report.model import Report


@functools.cache
def report_of(candidate: str, *flags: str) -> "Report":
    """The report of `python -m parity.check --candidate ... flags`. Raises UsageError."""
    from parity import check

    return check.check(check.request_of(read(check.Flags, ["--candidate", candidate, *flags])))


@pytest.fixture(scope="session")
def parity_case() -> Callable[..., dict[str, Any]]:
    """parity_case(candidate, *flags of parity.check) -> the report, schema nanollama.parity/1; each is made once."""
    return lambda candidate, *flags: report_of(candidate, *flags).as_json()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "parity with the reference implementations")
    group.addoption("--parity-candidate", metavar="NAME", help="check this candidate: module:attr or file.py:attr")
    group.addoption("--parity-flags", metavar="FLAGS", default="", help="more flags of parity.check, in one string")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    candidate = config.getoption("--parity-candidate")
    if candidate:
        from parity.checks import CHECKS

        flags = tuple(shlex.split(config.getoption("--parity-flags")))
        new = [ParityItem.from_parent(session, name=f"parity::{check}") for check in CHECKS]
        for item in new:
            item.candidate, item.flags = candidate, flags
        items += new


class ParityItem(pytest.Item):
    """One check of one candidate; the report is made by the first of them to run."""

    candidate: str
    flags: tuple[str, ...]

    def runtest(self) -> None:
        from parity.contract import Status

        report = printable_all(report_of(self.candidate, *self.flags))
        check = self.name.removeprefix("parity::")
        results = [r for r in report.results if r.check == check]
        bad = [r for r in results if r.status in (Status.FAIL, Status.ERROR)]
        if bad:
            raise ParityFailure("\n".join(map(describe, bad)) + divergence(report))
        if all(r.status is Status.SKIP for r in results):
            pytest.skip(next((str(r.reason) for r in results), "not among the chosen checks"))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        return str(excinfo.value) if isinstance(excinfo.value, ParityFailure) else str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[str, int, str]:
        return "parity", 0, self.name


class ParityFailure(AssertionError):
    """A check that failed: its results, one a line, and where the candidate first departs."""


def describe(r: "Result") -> str:
    from parity.report.terminal import number  # which imports torch: not where no check is asked for

    twin = "twin" if r.checkpoint == "twin" else None
    party = ", ".join(part for part in (twin, r.dtype, r.path, r.reference) if part)
    beyond = f"{number(r.value)} beyond {number(r.bound)}" if r.value is not None else r.status.value
    return " ".join(part for part in (f"{r.check} ({party}):", r.metric, beyond, r.where, r.reason) if part)


def divergence(report: "Report") -> str:
    first = report.first_divergence
    if not first:
        return ""
    where = "first departs, in the twin, at" if first.checkpoint == "twin" else "first departs at"
    return f"\n{where} {first.tap}: {first.probable_cause}"
