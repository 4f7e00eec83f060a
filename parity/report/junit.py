"""The results as a JUnit XML file, one test case a judgement, for CI servers and test-suites.

A failure carries value, bound and place; a check that could not run is skipped with its reason, an error is an error.
"""

from xml.etree import ElementTree as ET

from nanollama.printable import printable_all
from parity.contract import Result, Status
from parity.report.model import Report
from parity.report.terminal import number


def junit(report: Report) -> str:
    """The whole document."""
    report = printable_all(report)
    results = report.results
    count = {status: str(sum(r.status is status for r in results)) for status in Status}
    totals = {"tests": str(len(results)), "failures": count[Status.FAIL]}
    totals |= {"errors": count[Status.ERROR], "skipped": count[Status.SKIP], "time": str(report.seconds)}
    root = ET.Element("testsuites", {"name": "parity", **totals})
    suite = ET.SubElement(root, "testsuite", {"name": f"parity of {report.candidate}", **totals})
    properties = ET.SubElement(suite, "properties")
    facts = {"verdict": report.verdict, "checkpoint": report.checkpoint.path, **report.environment}
    for name, value in facts.items():
        ET.SubElement(properties, "property", {"name": name, "value": str(value)})
    for result in results:
        _case(suite, result)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, r: Result) -> None:
    against = f"against {r.reference}" if r.reference else None
    twin = "twin" if r.checkpoint == "twin" else None
    name = ", ".join(part for part in (r.gate, r.metric, twin, r.dtype, r.path, against) if part)
    case = ET.SubElement(suite, "testcase", {"classname": f"parity.{r.check}", "name": name, "time": "0"})
    if r.status in (Status.FAIL, Status.ERROR):
        kind = "failure" if r.status is Status.FAIL else "error"
        beyond = f"{number(r.value)} beyond {number(r.bound)}" if r.value is not None else r.status.value
        message = " ".join(part for part in (r.metric, beyond, r.unit) if part)
        element = ET.SubElement(case, kind, {"message": message, "type": r.gate})
        element.text = "\n".join(part for part in (r.where, r.reason) if part)
    elif r.status is Status.SKIP:
        ET.SubElement(case, "skipped", {"message": r.reason or "not run"})
