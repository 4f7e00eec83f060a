"""The drawings of docs/numerics.md, from the results that are committed: nothing is measured here.

    python -m benchmarks.plots      # writes docs/plots/*.svg

Text and axes have the colour of the text around them (`currentColor`) and the ground is left out, so that a page in
light or dark colours holds them as they are; where a drawing stands alone, it asks the system for its colour.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanollama.cli import run
from parity.measure.tolerances import BOUNDS

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = RESULTS.parents[1] / "docs"
TEXT = "#010203"  # stands for the colour of the page's text until the drawing is written
RIGHT, WRONG, OTHER = "#2a9d8f", "#e76f51", "#8a7fd3"  # each reads on white and on slate
ALONE = "<style>:root{color:#333}@media(prefers-color-scheme:dark){:root{color:#ddd}}</style>"
Axes = Any


def read_results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def draw_implementations(axes: Axes) -> None:
    """rho of the logits in fp32 of every public implementation that was judged, right ones and wrong ones."""
    rows = [row for row in read_results("peers")["rows"].values() if "fp32" in row["rho"]]
    rows.sort(key=lambda row: -row["rho"]["fp32"])
    for place, row in enumerate(rows):
        wrong = row["verdicts"]["fp32"] == "fail"
        axes.plot(row["rho"]["fp32"], place, "D" if wrong else "o", color=WRONG if wrong else RIGHT, markersize=5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:,g}")  # its own writes TeX, which is not read here
    axes.xaxis.set_minor_formatter(lambda value, place: "")
    axes.axvline(BOUNDS["G3.logits"].value, color=TEXT, linewidth=1, linestyle="--")
    axes.plot([], [], "o", color=RIGHT, label="pass, or as declared")
    axes.plot([], [], "D", color=WRONG, label="fail")
    axes.plot([], [], "--", color=TEXT, label=f"bound, {BOUNDS['G3.logits'].value:g}")
    axes.set_xlabel("rho of the logits in fp32: error by the references' own")


def draw_depth(axes: Axes) -> None:
    """rho of every tap of an 8B in the order of computation, both dtypes of the fast path."""
    rho = read_results("parity-8B")["rho"]
    for dtype, colour in (("fp32", RIGHT), ("bf16", OTHER)):
        of_taps = rho[f"fast {dtype} vs meta"]
        axes.plot(list(of_taps.values()), color=colour, linewidth=0.9, label=dtype)
    layers = [i for i, name in enumerate(of_taps) if name.endswith(".attn_norm")]
    axes.set_xticks(layers[::4], [str(i) for i in range(0, len(layers), 4)])
    axes.axhline(BOUNDS["G3.taps"].value, color=TEXT, linewidth=1, linestyle="--", label="bound of taps, 3")
    axes.set_ylim(0, 3.2)
    axes.set_xlabel("layer; 14 taps in each")
    axes.set_ylabel("rho")


def draw_margins(axes: Axes) -> None:
    """The largest value of each gate over 500 random shapes, in percent of its bound."""
    largest = read_results("random_shapes")["largest"]
    shares: dict[str, dict[str, float]] = {}
    for name, found in largest.items():
        if found["bound"] and " style " not in name:
            gate = re.sub(r" (fp32|bf16)$", "", name).replace(" max |difference|", " table")
            dtype = "bf16" if name.endswith("bf16") else "fp32"  # the RoPE table is fp32 in both
            shares.setdefault(gate, {})[dtype] = 100 * found["value"] / found["bound"]
    for place, found in enumerate(reversed(shares.values())):
        for dtype, shift, colour in (("fp32", 0.2, RIGHT), ("bf16", -0.2, OTHER)):
            axes.barh(place + shift, found.get(dtype, 0.0), 0.36, color=colour)
    axes.set_yticks(range(len(shares)), list(reversed(shares)))
    for dtype, colour in (("fp32", RIGHT), ("bf16", OTHER)):
        axes.barh([0], [0], color=colour, label=dtype)
    axes.axvline(100, color=TEXT, linewidth=1, linestyle="--", label="bound")
    axes.set_xlim(0, 105)
    axes.set_xlabel("largest of 500 random shapes, % of the bound")


def draw_criteria(axes: Axes) -> None:
    """Of the table of docs/kill-matrix.md: mistakes that a criterion lets through, right variants that it fails."""
    page = (DOCS / "kill-matrix.md").read_text(encoding="utf-8").partition("## The usual criteria")[2]
    rows = re.findall(r"^\| \*{0,2}([^|*]+?)\*{0,2} \| (\d+) of (\d+) \| (\d+) of (\d+) \|", page, re.MULTILINE)[::-1]
    for place, (_, passed, mutants, failed, benign) in enumerate(rows):
        axes.barh(place + 0.2, 100 * int(passed) / int(mutants), 0.36, color=WRONG)
        axes.barh(place - 0.2, 100 * int(failed) / int(benign), 0.36, color=OTHER)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.barh([0], [0], color=WRONG, label="wrong models that pass")
    axes.barh([0], [0], color=OTHER, label="right models that fail")
    axes.set_xlim(0, 105)
    axes.set_xlabel("% in fp32")


PLOTS: dict[str, tuple[Callable[[Axes], None], float]] = {  # the drawing, and how high it is, in inches
    "implementations": (draw_implementations, 6.0),
    "depth": (draw_depth, 2.8),
    "margins": (draw_margins, 4.4),
    "criteria": (draw_criteria, 2.8),
}


def render(name: str) -> str:
    """One drawing as SVG: the same bytes for the same results."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    draw, height = PLOTS[name]
    colours = {f"{key}.color": TEXT for key in ("text", "xtick", "ytick")}
    colours |= {"axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "legend.framealpha": "0"}
    plain = {"svg.fonttype": "none", "svg.hashsalt": "nanollama", "text.parse_math": False, "font.family": "sans-serif"}
    with matplotlib.rc_context({**plain, **colours}):
        figure = Figure(figsize=(7.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=TEXT, linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper left", ncols=4, fontsize="small", frameon=False)
        made = io.StringIO()
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return with_the_pages_colour(made.getvalue())


def with_the_pages_colour(svg: str) -> str:
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = svg.index(">") + 1
    return "\n".join(line.rstrip() for line in (svg[:opening] + ALONE + svg[opening:]).splitlines()) + "\n"


def main(
    out: Path = DOCS / "plots",  # folder of the drawings; default: docs/plots of this checkout
) -> None:
    """Draw every figure of docs/numerics.md."""
    out.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        (out / f"{name}.svg").write_text(render(name), encoding="utf-8")
        print(out / f"{name}.svg")


if __name__ == "__main__":
    run(main)
