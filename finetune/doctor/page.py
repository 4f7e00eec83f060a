"""What the doctor found as HTML: a section of the run's report, and a page of its own.

Path("doctor.html").write_text(page(findings, patient.facts, pieces), encoding="utf-8")
"""

import html
from collections.abc import Sequence

from finetune.doctor.patient import Finding
from finetune.doctor.picture import Piece, in_html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
.ills li { color: #a40000; } .none { color: #1b6e2d; }
pre.first { white-space: pre-wrap; background: #f6f6f6; padding: 1em; border-radius: 6px; }
.read { color: #888; } .learned { color: #0a5; font-weight: 600; } .special { background: #e8def8; border-radius: 3px; }
"""


def page(findings: Sequence[Finding], facts: Sequence[str], pieces: Sequence[Piece]) -> str:
    """Self-contained; all that comes from the data is escaped."""
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>doctor</title><style>{STYLE}</style>'
    return f"{head}\n<body>{section(findings, facts, pieces)}</body></html>\n"


def section(findings: Sequence[Finding], facts: Sequence[str], pieces: Sequence[Piece]) -> str:
    """For the report, too, which has the same style."""
    ills = "".join(f"<li><b>{html.escape(ill)}</b>: {html.escape(line)}</li>" for ill, line in findings)
    shown = f'<ul class="ills">{ills}</ul>' if ills else '<p class="none">nothing found</p>'
    known = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    legend = '<span class="learned">learned</span>, <span class="read">only read</span>, '
    legend += '<span class="read special">special token</span>'
    return (
        f'<section id="doctor"><h2>Before the first step</h2>{shown}<ul>{known}</ul>'
        f"<h3>The first document: {legend}</h3>"
        f'<pre class="first">{in_html(list(pieces))}</pre></section>'
    )
