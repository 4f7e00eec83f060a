"""JUnit, HTML and SVG reports, and the pytest plugin; the HTML as a browser shows it."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mutant_evidence import base, judge
from parity.contract import Status
from parity.mutants.edits import MUTANTS
from parity.mutants.edits.edit import Load, edited
from parity.mutants.edits.forward import NOTHING
from parity.report import html, summary, svg
from parity.report.junit import junit
from parity.report.model import CheckpointEntry, Report
from parity.run.execute import RunLog

pytest_plugins = ["pytester"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BAD = next(m.load for m in MUTANTS if m.number == "15")


def report_of(load: Load) -> Report:
    ev, results = judge("gqa", load)
    entry = CheckpointEntry("tiny <&>", "meta", {}, 0, verified=[])
    return summary.summarise(ev, results, "my_port.py:load", RunLog(), 1.5, entry)


@pytest.fixture(scope="module")
def failing() -> Report:
    return report_of(BAD)


@pytest.fixture(scope="module")
def passing() -> Report:
    return report_of(edited(NOTHING))


def test_junit_counts_are_those_of_the_results(failing: Report) -> None:
    root = ET.fromstring(junit(failing))
    assert root.tag == "testsuites"
    cases = root.findall(".//testcase")
    assert len(cases) == len(failing.results) == int(root.attrib["tests"])
    assert len(root.findall(".//failure")) == int(root.attrib["failures"]) > 0
    assert len(root.findall(".//skipped")) == int(root.attrib["skipped"])
    assert root.find(".//failure").attrib["message"]  # type: ignore[union-attr]
    assert all(c.attrib["classname"].startswith("parity.") and c.attrib["name"] for c in cases)


def test_junit_holds_no_character_that_xml_forbids(passing: Report) -> None:
    bad = replace(passing.results[0], status=Status.FAIL, where="a\x00\x1b[1m<b>")
    assert "[1m<b>" in str(ET.fromstring(junit(replace(passing, results=[bad]))).findtext(".//failure"))


def test_html_needs_no_network_and_escapes_its_input(failing: Report) -> None:
    page = html.render(failing)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "tiny &lt;&amp;&gt;" in page and "tiny <&>" not in page
    assert page.count("<svg") == 1
    assert failing.first_divergence is not None and failing.first_divergence.probable_cause in page.replace(
        "&#39;", "'"
    )


@pytest.mark.parametrize("verdict", ["fail", "pass"])
def test_the_picture_is_one_svg_that_names_cause_and_curve(verdict: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(f"{verdict}ing")
    drawn = svg.render(report)
    root = ET.fromstring(drawn)
    texts = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.tag.endswith("svg") and verdict.upper() in texts
    points = len(list(root.iter("{http://www.w3.org/2000/svg}circle")))
    assert points == sum(len(c.ratios) for c in (report.rho or {}).values() if c.dtype == "fp32")
    assert any("first departs" in text for text in texts) == (verdict == "fail")
    assert "http" not in drawn.replace("http://www.w3.org", "")


def chromium(*arguments: str) -> str:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("verdict", ["fail", "pass"])
def test_html_opens_in_a_browser(verdict: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(f"{verdict}ing")
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(html.render(report), encoding="utf-8")
    common = (f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1600", page.as_uri())
    dom = chromium("--dump-dom", *common)
    assert f'data-verdict="{verdict}"' in dom
    shown = f"{len(report.results)} of {len(report.results)} shown"
    assert shown in dom  # written by the page's own script
    chromium(f"--screenshot={shot}", *common)
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shot.stat().st_size > 20_000


PORT = """
from parity.mutants.edits.edit import edited
from parity.mutants.edits.forward import NOTHING

load = edited(NOTHING)
"""


@pytest.mark.slow
def test_plugin_turns_checks_into_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(my_port=PORT)
    flags = f"--ckpt {base('gqa').case.checkpoint} --references meta --dtype fp32 --max_new_tokens 2"
    done = pytester.runpytest_subprocess(
        "-p", "parity.pytest_plugin", "--parity-candidate", "my_port.py:load", "--parity-flags", flags
    )
    done.assert_outcomes(passed=12, skipped=3)  # tokens, chat and bitwise are not asked of it
