"""The curves of runs as inline SVG, drawn by matplotlib: no script, no file beside it, the same bytes for the same run.

svg = draw({"mine": read_metrics(Path("out/RUN/metrics.jsonl"))}, PANELS)
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Lines = Sequence[Mapping[str, Any]]  # of a metrics.jsonl


class Panel(NamedTuple):
    key: str  # in metrics.jsonl
    label: str
    scale: float = 1.0
    beside: str = ""  # a key that is drawn with dots in the same panel
    logarithmic: bool = False


LOSS = Panel("loss", "loss, nats per token", beside="val_loss")
PANELS = (
    LOSS,
    Panel("lr", "learning rate"),
    Panel("grad_norm", "gradient norm, before clipping", logarithmic=True),
    Panel("tokens_per_s", "labels per second"),
    Panel("peak_bytes", "peak of memory, MB", scale=1e-6),
)


def draw(runs: Mapping[str, Lines], panels: Sequence[Panel], width: float = 11.0) -> str:
    """One <svg> with a panel for each figure; several runs share them, their names in a legend."""
    import matplotlib  # slow to import, and needed at a run's end only
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanollama", "text.parse_math": False}):
        figure = Figure(figsize=(width, 3.2 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        for i, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, i)
            for number, (name, lines) in enumerate(runs.items()):
                _draw_run(axes, panel, lines, f"C{number}", name if len(runs) > 1 else "training")
            axes.set_xlabel("step")
            axes.set_ylabel(panel.label)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0] and (panel.beside or len(runs) > 1):
                axes.legend(fontsize="small")
        made = io.StringIO()
        figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    text = made.getvalue()
    return text[text.index("<svg") :]


def _draw_run(axes: Any, panel: Panel, lines: Lines, colour: str, name: str) -> None:
    steps, values = _points(lines, panel.key, panel.scale)
    if not steps:
        return
    axes.plot(steps, values, linewidth=1, color=colour, label=name)
    if panel.logarithmic and all(value > 0 for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")  # its own writes TeX, which is not read here
        axes.yaxis.set_minor_formatter(lambda value, place: "")
    checked, scores = _points(lines, panel.beside, panel.scale)
    if checked:
        axes.plot(checked, scores, "o--", markersize=4, linewidth=1, color=colour, label=f"{name}, validation")


def _points(lines: Lines, key: str, scale: float) -> tuple[list[int], list[float]]:
    """The finite values of one figure, and their steps."""
    given = [(line["step"], line[key]) for line in lines if key and line.get(key) is not None]
    found = [(step, value * scale) for step, value in given if math.isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]
