"""The report as one picture: verdict, cause, the judgements that matter and rho through the layers, as an SVG file.

python -m parity.check --candidate my_port.py:load --svg report.svg
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from nanollama.printable import cut, printable_all
from parity.report import html
from parity.report.annotations import headline
from parity.report.model import Report
from parity.report.terminal import rows_of

WIDTH = 1200  # of the picture, in pixels
LINE_CHARACTERS = 132  # of a line of the cause, at its size
CAUSE_LINES = 4
ROWS = 9  # of the table: those that fail first


def render(report: Report) -> str:
    """The whole file; it needs no font, script or network."""
    report = printable_all(report)
    folder = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=folder, autoescape=select_autoescape(default=True), trim_blocks=True)
    rows, dtype = list(rows_of(report)), plotted_dtype(report)
    # What fails, of the dtype that is drawn, first; sorted keeps the order of the checks.
    shown = sorted(rows, key=lambda row: (row[6] == "ok", row[3] != dtype))[:ROWS]
    curves = html.curves_of(report, dtype) if dtype else {}
    return env.get_template("picture.jinja").render(
        r=report,
        width=WIDTH,
        title=cut(f"{report.candidate} against {' and '.join(report.references)}", 90),
        why=cut(report.why, 150),
        cause=textwrap.wrap(headline(report), LINE_CHARACTERS)[:CAUSE_LINES] if report.verdict == "fail" else [],
        rows=[[cut(cell, 40) for cell in row] for row in shown],
        more=describe_rest(rows, shown),
        dtype=dtype,
        plot=Markup(html.draw(curves, report)) if curves else None,
        plot_size=(html.WIDTH, html.HEIGHT),
        legend=list(legend(curves)),
    )


def plotted_dtype(report: Report) -> str | None:
    """That of the divergence, if it has curves; else the first that has."""
    known = [curve.dtype for curve in (report.rho or {}).values() if curve.ratios]
    first = report.first_divergence.dtype if report.first_divergence else None
    return first if first in known else next(iter(known), None)


def describe_rest(rows: list[tuple[str, ...]], shown: list[tuple[str, ...]]) -> str:
    """What the table leaves out, in words; empty where it is whole."""
    passed = sum(row[6] == "ok" for row in rows) - sum(row[6] == "ok" for row in shown)
    other = len(rows) - len(shown) - passed
    parts = [f"{passed} more rows passed" if passed else "", f"{other} more failed" if other else ""]
    return ", ".join(part for part in parts if part)


def legend(curves: dict[str, dict[str, float]]) -> Iterator[tuple[int, str, str]]:
    """(x, colour, label) of each line."""
    x = 76
    for n, label in enumerate(curves):
        yield x, html.COLOURS[n % len(html.COLOURS)], label
        x += 40 + 8 * len(label)
