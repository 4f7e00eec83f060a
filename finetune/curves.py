"""The curves of runs as inline SVG, drawn by matplotlib: no script, no file beside it, the same bytes for the same run.

svg = draw({"mine": read_metrics(Path("out/RUN/metrics.jsonl"))}, (LOSS,))
"""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.errors import UserError

Lines = Sequence[Mapping[str, Any]]  # of a metrics.jsonl


class Panel(NamedTuple):
    key: str  # in metrics.jsonl
    label: str
    scale: float = 1.0
    beside: str = ""  # a key that is drawn with dots in the same panel
    logarithmic: bool = False


LOSS = Panel("loss", "loss, nats per token", beside="val_loss")
OF_PAIRS = (
    Panel("loss", "loss of a pair", beside="val_loss"),
    Panel("margin", "margin", beside="val_margin"),
    Panel("accuracy", "share of pairs with a margin above 0", beside="val_accuracy"),
    Panel("", "KL to where it began, nats per token", beside="val_kl"),
)
OF_A_TEACHER = (
    Panel("loss", "loss with the teacher's share; dots: nats per token", beside="val_loss"),
    Panel("kl", "KL to the teacher, nats per token"),
)
USUAL = (
    Panel("lr", "learning rate"),
    Panel("grad_norm", "gradient norm, before clipping", logarithmic=True),
    Panel("tokens_per_s", "labels per second"),
    Panel("peak_bytes", "peak of memory, MB", scale=1e-6),
)


def panels_of(lines: Lines) -> tuple[Panel, ...]:
    """Those that suit what was learned: pairs of answers, a teacher, or the next token."""
    keys = {key for line in lines for key in line}
    return (*(OF_PAIRS if "margin" in keys else OF_A_TEACHER if "kl" in keys else (LOSS,)), *USUAL)


def missing_plots() -> str:
    """What to install before a picture can be drawn; "" where all is there."""
    if importlib.util.find_spec("matplotlib"):
        return ""
    return "curves need the package matplotlib: pip install 'llama-parity[finetune]'"


def picture(runs: Mapping[str, Lines]) -> str:
    """What suits these runs as one <svg>, or a paragraph that says why there is none."""
    lines = [line for of in runs.values() for line in of]
    if not lines or missing_plots():
        return f"<p>{missing_plots() or 'no step was done'}</p>"
    return draw(runs, panels_of(lines))


def draw(runs: Mapping[str, Lines], panels: Sequence[Panel], width: float = 11.0) -> str:
    """One <svg> with a panel for each figure; several runs share them, their names in a legend.

    Raises UserError that names the extra, where matplotlib is missing.
    """
    if missing := missing_plots():
        raise UserError(missing)
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
    if steps:
        axes.plot(steps, values, linewidth=1, color=colour, label=name)
    if steps and panel.logarithmic and all(value > 0 for value in values):
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
