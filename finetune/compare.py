"""Runs side by side: where their configs differ, what they came to, and their curves in one picture.

$ python -m finetune.compare out/a out/b
                 a        b
--lr             0.001    0.01
steps            300      300
val_bpb          1.4103   1.2992
compare.html
"""

import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.curves import draw, missing_plots, panels_of, picture
from finetune.data.files import write_atomically
from finetune.doctor.page import STYLE
from finetune.errors import UserError
from finetune.metrics import read_metrics
from finetune.report import TABLES, read_config, read_summary, table
from nanollama.cli import run

UNTOLD = ("out", "resume", "cache")  # of a config: where it lies, not what it does
Row = tuple[str, list[str]]  # a figure's name, and its value in each run


def compare(
    *,
    runs: list[str],  # folders of runs; as bare arguments, too: A B ...
    html: Path = Path("compare.html"),  # the page with tables and curves
    svg: Path | None = None,  # also write the picture of the losses alone to this file
) -> None:
    """Show two runs or more side by side, and write a page of it."""
    folders = [Path(name) for name in runs]
    if len(folders) < 2:
        raise UserError("compare takes two folders of runs or more: python -m finetune.compare A B")
    names = short_names(folders)
    rows = [*different(folders), *results(folders)]
    width = max(len(name) for name, _ in rows)
    widths = [max(len(cell) for cell in column) for column in zip(names, *(cells for _, cells in rows), strict=True)]
    for name, cells in [("", names), *rows]:
        line = "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
        print(f"{name.ljust(width)}  {line}".rstrip())
    metrics = {name: read_metrics(path / "metrics.jsonl") for name, path in zip(names, folders, strict=True)}
    write_atomically(html, page(names, rows, metrics).encode())
    if svg:
        panels = panels_of([line for lines in metrics.values() for line in lines])
        write_atomically(svg, draw(metrics, panels[:1], width=7).encode())
    print(f"{html}{f' (without curves: {missing_plots()})' if missing_plots() else ''}")


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole path where two would be called the same."""
    names = [folder.name or str(folder.resolve().name) for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def different(folders: Sequence[Path]) -> list[Row]:
    """The flags that are not the same in all runs."""
    saved = [read_config(folder) for folder in folders]
    names = list(dict.fromkeys(name for config in saved for name in config if name not in UNTOLD))
    values = {name: [str(config.get(name, "")) for config in saved] for name in names}
    return [(f"--{name}", cells) for name, cells in values.items() if len(set(cells)) > 1]


def results(folders: Sequence[Path]) -> list[Row]:
    """How far each run came, what it came to, and how fast it was."""
    lines = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    found = [_results(read_summary(folder), mine) for folder, mine in zip(folders, lines, strict=True)]
    return [(name, [values[name] for values in found]) for name in found[0]]


def _results(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    steps = [line for line in lines if line.get("loss") is not None]
    scores = [line for line in lines if line.get("val_loss") is not None]
    speeds = sorted(line["tokens_per_s"] for line in steps if line.get("tokens_per_s") is not None)
    peaks = [line["peak_bytes"] for line in steps if line.get("peak_bytes") is not None]
    kept = {"val_loss": summary.get("val_loss"), "val_bpb": summary.get("val_bpb")}
    return {
        "steps": str(steps[-1]["step"]) if steps else "0",
        "last loss": f"{steps[-1]['loss']:.4f}" if steps else "",
        "best val_loss": f"{min(line['val_loss'] for line in scores):.4f}" if scores else "",
        **{name: "" if value is None else f"{value:.4f}" for name, value in kept.items()},
        "labels per s": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
        "peak MB": f"{max(peaks) / 1e6:,.0f}" if peaks else "",
    }


def page(names: Sequence[str], rows: Sequence[Row], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Self-contained; all names are escaped."""
    title = html.escape(" and ".join(names))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}{TABLES}</style>'
    shown = table([(name, *cells) for name, cells in rows], ("", *names))
    body = f"<h1>{title}</h1>{shown}<h2>Curves</h2>{picture(metrics)}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def with_flags(args: Sequence[str]) -> list[str]:
    """Bare arguments, before the first flag, become --runs."""
    places = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    return [part for folder in args[:places] for part in ("--runs", folder)] + list(args[places:])


if __name__ == "__main__":
    run(compare, with_flags(sys.argv[1:]))
