"""The report as one HTML file that needs no network: verdict, results with filters, rho through the layers.

python -m parity.check --html report.html
"""

import html
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from nanollama.printable import printable_all
from parity.contract import Result
from parity.measure.tolerances import BOUNDS
from parity.report.model import Report
from parity.report.terminal import number
from reference.protocol import tap_names

WIDTH, HEIGHT = 1150, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 64  # of the plot, in pixels
COLOURS = ("#2563eb", "#0d9488", "#9333ea", "#b45309", "#475569", "#db2777", "#4d7c0f", "#0e7490")
SHOWN_FIRST = ("error", "fail", "pass", "skip")
FLOOR, CEILING = 0.05, 1e9  # of the axis: rho beyond is drawn at the edge


def render(report: Report) -> str:
    """The whole page."""
    folder, report = Path(__file__).parent, printable_all(report)
    env = Environment(loader=FileSystemLoader(folder), autoescape=select_autoescape(default=True), trim_blocks=True)
    env.filters |= {"number": number, "percent": percent}
    results, plotted = report.results, dict.fromkeys(curve.dtype for curve in (report.rho or {}).values())
    return env.get_template("report.html").render(
        r=report,
        results=sorted(results, key=lambda x: SHOWN_FIRST.index(x.status.value)),
        counts={s: sum(x.status.value == s for x in results) for s in ("pass", "fail", "error", "skip")},
        plots=[(dtype, Markup(plot(curves_of(report, dtype), report))) for dtype in plotted],
        checks=list(dict.fromkeys(x.check for x in results)),
        dtypes=list(dict.fromkeys(x.dtype for x in results if x.dtype)),
    )


def percent(result: Result) -> float | None:
    """The value in % of its bound, where that says something."""
    value, bound = result.value, result.bound
    if value is None or not bound or result.gate == "style":
        return None
    return math.inf if math.isnan(value) else 100 * value / bound


def curves_of(report: Report, dtype: str) -> dict[str, dict[str, float]]:
    """Label -> tap -> rho, of one dtype."""
    return {label: c.ratios for label, c in (report.rho or {}).items() if c.dtype == dtype and c.ratios}


# --- The plot, drawn by hand: a line a pair, taps in order of computation, rho on a logarithmic axis -----------------


def plot(curves: dict[str, dict[str, float]], report: Report) -> str:
    """An SVG element and its legend; a note where there is nothing to draw."""
    drawn = draw(curves, report)
    return drawn + _legend(list(curves)) if drawn else "<p class='quiet'>No taps were compared.</p>"


def draw(curves: dict[str, dict[str, float]], report: Report) -> str:
    """The SVG element alone; empty where there is nothing to draw."""
    order = [t for t in tap_names(report.checkpoint.config["n_layers"]) if any(t in c for c in curves.values())]
    if not order:
        return ""
    x_of = {tap: LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(order) for i, tap in enumerate(order)}
    top = max(10.0, max((_size(v) for c in curves.values() for v in c.values()), default=1.0)) * 1.3
    y_of = lambda rho: _y(rho, min(top, CEILING))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="error ratio at each tap">']
    parts += _axes(order, x_of, y_of, min(top, CEILING))
    for n, (label, curve) in enumerate(curves.items()):
        parts += _line(label, curve, COLOURS[n % len(COLOURS)], x_of, y_of)
    return "".join([*parts, "</svg>"])


def _size(rho: float) -> float:
    return CEILING if math.isnan(rho) or rho > CEILING else max(rho, FLOOR)


def _y(rho: float, top: float) -> float:
    share = (math.log10(min(_size(rho), top)) - math.log10(FLOOR)) / (math.log10(top) - math.log10(FLOOR))
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(order: list[str], x_of: dict[str, float], y_of: Any, top: float) -> list[str]:
    parts = _groups(order, x_of)  # first, so that the lines lie over the bands
    for power in range(math.ceil(math.log10(FLOOR)), math.floor(math.log10(top)) + 1):
        y = y_of(10.0**power)
        text = f"{10.0**power:g}" if abs(power) < 4 else f"1e{power}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    bound = y_of(BOUNDS["G3.taps"].value)
    parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bound:.1f}" y2="{bound:.1f}"/>')
    parts.append(f'<text class="boundtext" x="{WIDTH - RIGHT}" y="{bound - 5:.1f}" text-anchor="end">bound</text>')
    return parts


def _groups(order: list[str], x_of: dict[str, float]) -> list[str]:
    """A band and a name for each layer; few taps are named one by one."""
    parts: list[str] = []
    groups: dict[str, list[float]] = {}
    for tap in order:
        groups.setdefault(tap.rpartition(".")[0] or tap, []).append(x_of[tap])
    half = (WIDTH - LEFT - RIGHT) / len(order) / 2
    every = max(1, len(groups) // 16)
    for n, (name, xs) in enumerate(groups.items()):
        x, width = xs[0] - half, xs[-1] - xs[0] + 2 * half
        if n % 2:
            parts.append(
                f'<rect class="band" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            )
        if n % every == 0 and name.startswith("layers."):
            label = name.replace("layers.", "layer ")
            parts.append(
                f'<text class="tick" x="{x + width / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{label}</text>'
            )
    if len(order) <= 64:
        for tap in order:
            x, y = x_of[tap], HEIGHT - BOTTOM + 8
            name = html.escape(tap.rpartition(".")[2])
            parts.append(
                f'<text class="tap" transform="translate({x + 3:.1f} {y}) rotate(-60)" text-anchor="end">{name}</text>'
            )
    return parts


def _line(label: str, curve: dict[str, float], colour: str, x_of: dict[str, float], y_of: Any) -> list[str]:
    points = [(x_of[tap], y_of(rho), tap, rho) for tap, rho in curve.items() if tap in x_of]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>']
    for x, y, tap, rho in points:
        beyond = not rho <= BOUNDS["G3.logits" if tap == "logits" else "G3.taps"].value
        fill, radius = ("#dc2626", 4) if beyond else (colour, 2.4)
        title = html.escape(f"{label}: {tap} {number(rho)}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"><title>{title}</title></circle>')
    return parts


def _legend(labels: list[str]) -> str:
    items = [
        f'<span><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{html.escape(label)}</span>'
        for n, label in enumerate(labels)
    ]
    return f"<p class='legend'>{''.join(items)}</p>"
