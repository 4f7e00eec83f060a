"""A report for the places where a forge shows it: job summary (Markdown), annotation, SARIF 2.1.0, badge.

What is quoted comes from files, servers and programs of strangers: each format is escaped as its reader asks.
"""

import hashlib
import re
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from nanollama import __version__
from nanollama.printable import printable, printable_all
from parity.contract import Result, Status
from parity.report.model import Divergence, Report
from parity.report.place import Place
from parity.report.terminal import list_uncovered, number, rows_of

COLOURS = {"pass": "brightgreen", "quantized": "yellowgreen", "limited": "yellow", "fail": "red", "unusable": "red"}
MARKS = {"pass": "✅", "quantized": "✅", "limited": "⚠️", "fail": "❌", "unusable": "❌"}
LEVELS = {"fail": "error", "unusable": "error", "limited": "warning"}
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# Of Markdown, of HTML inside it, and of the mentions that a forge makes links of.
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~@&:-])")


def cause(first: Divergence) -> str:
    """What is wrong and where, in one sentence."""
    where = "first departs, in the seeded twin, at" if first.checkpoint == "twin" else "first departs at"
    place = f", sequence {first.sequence}, position {first.position}" if first.position is not None else ""
    return f"{where} {first.tap} ({first.dtype}, against {first.reference}{place}): {first.probable_cause}"


def headline(report: Report) -> str:
    """The one line to read of a report."""
    if report.first_divergence is not None:
        return cause(report.first_divergence)
    bad = problems(report)
    return describe(bad[0]) if bad else report.why


def problems(report: Report) -> list[Result]:
    """What failed, one a check."""
    found: dict[str, Result] = {}
    for r in report.results:
        if r.status in (Status.FAIL, Status.ERROR):
            found.setdefault(r.check, r)
    return list(found.values())


def describe(r: Result) -> str:
    against = f"against {r.reference}" if r.reference else None
    party = ", ".join(part for part in ("twin" if r.checkpoint == "twin" else None, r.dtype, r.path, against) if part)
    beyond = f": {r.metric or ''} {number(r.value)} beyond {number(r.bound)}" if r.value is not None else ""
    return "; ".join(part for part in (f"{r.check} ({party or r.gate}){beyond}", r.where, r.reason) if part)


# --- Workflow commands -----------------------------------------------------------------------------------------------


def command(name: str, message: str, **properties: object) -> str:
    """A line that a runner obeys, `::error file=my_port.py,line=3::text`; nothing in it can end it or begin another."""
    given = ",".join(f"{key}={escape_property(value)}" for key, value in properties.items() if value is not None)
    return f"::{name}{' ' + given if given else ''}::{escape_data(message)}"


def escape_data(text: object) -> str:
    return str(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: object) -> str:
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def annotation(verdict: str, message: str, place: Place | None, root: Path) -> str | None:
    """The command that marks the candidate's file; None for a pass."""
    if verdict not in LEVELS:
        return None
    uri = within(place.file, root) if place else None
    line = place.line if place and uri else None
    title = f"parity: {verdict}"
    return command(LEVELS[verdict], printable(message, 4000), file=uri, line=line, title=title)


def within(file: PurePath, root: Path) -> str | None:
    """A file by its path from the repository's root; None outside of it."""
    path = Path(file).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


# --- Job summary -----------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Verdict, cause, the table of judgements and what is not covered, as a forge's Markdown."""
    report = printable_all(report)
    c, t = report.checkpoint, report.tokens
    lines = [f"## {MARKS[report.verdict]} Llama parity: {report.verdict}", "", marked(report.why), ""]
    if report.verdict == "fail":
        lines += [f"**{marked(headline(report))}**", ""]
    lines += [
        f"Candidate {marked(report.candidate)} against {marked(' and '.join(report.references))}, "
        f"checkpoint {marked(c.path)} ({c.parameters:,} parameters), {t.positions} positions in {t.prompts} prompts; "
        f"{report.seconds:.0f} s.",
        "",
    ]
    table = list(rows_of(report))
    if table:
        lines += [
            "| check | gate | what | dtype | worst | bound | | of |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += ["| " + " | ".join(map(marked, _cells(row))) + " |" for row in table] + [""]
    uncovered = list_uncovered(report.results)
    if uncovered:
        lines += [f"<details><summary>Not covered: {len(uncovered)}</summary>", ""]
        lines += [f"- {marked(text)}" for text in uncovered] + ["", "</details>", ""]
    return "\n".join(lines) + "\n"


def _cells(row: tuple[str, ...]) -> tuple[str, ...]:
    check, gate, what, dtype, worst, bound, mark, count, twin = row
    mark = {"ok": "✅", "FAIL": "❌", "ERROR": "❌ error"}.get(mark, mark)
    return (f"{check}, twin" if twin else check, gate, what, dtype, worst, bound, mark, count)


def unusable_markdown(message: str) -> str:
    return f"## {MARKS['unusable']} Llama parity: nothing was judged\n\n{marked(printable(message, 4000))}\n"


def marked(text: str) -> str:
    """Text that Markdown shows as it is."""
    return (
        MARKUP.sub(r"\\\1", text)
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
        .replace("\\&", "&amp;")
        .replace("\\@", "&#64;")
    )


# --- Badge -----------------------------------------------------------------------------------------------------------


def badge(verdict: str, dtypes: list[str]) -> dict[str, Any]:
    """In the format of shields' endpoint."""
    message = verdict + (f" ({', '.join(dtypes)})" if dtypes and verdict not in ("fail", "unusable") else "")
    bad = verdict in ("fail", "unusable")
    return {"schemaVersion": 1, "label": "llama parity", "message": message, "color": COLOURS[verdict], "isError": bad}


# --- SARIF -----------------------------------------------------------------------------------------------------------


def sarif(report: Report, place: Place | None, root: Path) -> dict[str, Any]:
    """A SARIF log of one run: the cause, then one result a failing check, all at the candidate's file."""
    report = printable_all(report)
    found, first = [], report.first_divergence if report.verdict == "fail" else None
    if first is not None:
        found.append(("divergence", cause(first), first.tap))
    found += [(r.check, describe(r), r.metric or "") for r in problems(report)]
    results = [_result(rule, text, key, place, root) for rule, text, key in found]
    return _log(list(dict.fromkeys(rule for rule, _, _ in found)), results, {"executionSuccessful": True})


def unusable_sarif(message: str) -> dict[str, Any]:
    """Of a run that judged nothing."""
    told = {"level": "error", "message": {"text": printable(message, 4000)}}
    return _log([], [], {"executionSuccessful": False, "toolExecutionNotifications": [told]})


def _log(rules: list[str], results: list[dict[str, Any]], invocation: dict[str, Any]) -> dict[str, Any]:
    described = [{"id": rule, "shortDescription": {"text": _about(rule)}} for rule in rules]
    driver = {"name": "llama-parity", "semanticVersion": __version__, "rules": described}
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results, "columnKind": "utf16CodeUnits"}
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _about(rule: str) -> str:
    from parity.checks import CHECKS

    if rule == "divergence":
        return "Where the candidate first departs from the references, and the probable cause."
    return (CHECKS[rule].__doc__ or rule).splitlines()[0] if rule in CHECKS else rule


def _result(rule: str, text: str, key: str, place: Place | None, root: Path) -> dict[str, Any]:
    uri = within(place.file, root) if place else None
    found: dict[str, Any] = {"ruleId": rule, "level": "error", "message": {"text": text}}
    if place and uri:
        artifact = {"uri": quote(uri), "uriBaseId": "%SRCROOT%"}
        region = {"startLine": place.line}
        found["locations"] = [{"physicalLocation": {"artifactLocation": artifact, "region": region}}]
    # The same mistake of the same file is the same finding in the next run, wherever its line has gone.
    print_of = hashlib.sha256(f"{rule}\n{uri}\n{key}".encode()).hexdigest()
    return found | {"partialFingerprints": {"parity/1": print_of}}
