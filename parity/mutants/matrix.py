"""The kill matrix as text and as Markdown: mutant x gate, what was found where, and what others let through."""

from collections.abc import Callable
from typing import Any

from nanollama.printable import printable_all
from parity.mutants.baselines import NAMES
from parity.mutants.distributed import CHECKS
from parity.report.terminal import table

GATES = ("G0", "G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8")


def text(report: dict[str, Any]) -> str:
    """For the terminal."""
    report = printable_all(report)
    rows = [("#", "mutant", *GATES, "killed by", "found at", "")]
    rows += [(m["number"], m["what"][:48], *_gates(m), m["killed_by"] or "-", m["found"] or "-", _remark(m))
             for m in report["mutants"]]  # fmt: skip
    lines = [*table(rows), "", *_on_twins(report)]
    lines += ["f, b, h: the gate failed in fp32, bf16, fp16. usual criteria, let through:"]
    lines += [f"  {name:20} {_let_through(report, name)}" for name in NAMES] + [""]
    if report["benign"]:
        lines += table([("benign variant", *("worst, % of bound",), ""), *map(_variant, report["benign"])]) + [""]
    lines += _over_ranks(report)
    lines += [f"{f['number']:4} {f['what']}: {'noticed' if f['noticed'] else 'NOT NOTICED'}" for f in report["harness"]]
    lines += [f"self-test: {line}" for line in report["self_test"]]
    return "\n".join([*lines, summary_line(report)])


TWIN = ("#", "mutant", "trained weights alone", "by logits alone", "with the twin", "by logits alone")


def twin_cells(m: dict[str, Any]) -> list[str]:
    """In which dtypes a mutant of a checkpoint of yours is killed: by it alone, and by it or its seeded twin."""
    own, twin = m["alone"], m["twin"]
    gates = [{d for d, failed in row["gates"].items() if failed} for row in (own, twin)]
    logits = [{d for d, killed in row["by_logits"].items() if killed} for row in (own, twin)]
    columns = (gates[0], logits[0], gates[0] | gates[1], logits[0] | logits[1])
    return [m["number"], m["what"], *(", ".join(d for d in own["gates"] if d in c) or "survives" for c in columns)]


def _on_twins(report: dict[str, Any]) -> list[str]:
    rows = [twin_cells(m) for m in report["mutants"] if "twin" in m]
    return [*table([TWIN, *rows]), ""] if rows else []


RANKS = ("#", "mutant, over two ranks", "mesh", "killed by", "also fails", "")


def _rank_cells(m: dict[str, Any]) -> list[str]:
    expected = m["expected_check"]
    remark = "" if m["killed_by"] == expected else f"expected {expected}" if m["killed_by"] else "SURVIVES"
    return [m["number"], m["what"], m["mesh"], m["killed_by"] or "-", ", ".join(m["failed"][1:]) or "-", remark]


def _over_ranks(report: dict[str, Any]) -> list[str]:
    spread = report["distributed"]
    variants = [f"  {v['what']}: {v['alarm'] or 'no alarm'}, {v['worst_percent_of_bound']:.0f}% of a bound"
                for v in spread["benign"]]  # fmt: skip
    rows = [_rank_cells(m) for m in spread["mutants"]]
    return [*table([RANKS, *rows]), *variants, _ranks_line(spread), ""] if rows else []


def _ranks_line(spread: dict[str, Any]) -> str:
    killed = sum(m["killed_by"] is not None for m in spread["mutants"])
    right = sum(m["killed_by"] == m["expected_check"] for m in spread["mutants"])
    alarms = sum(v["alarm"] is not None for v in spread["benign"])
    return (
        f"over ranks: {killed} of {len(spread['mutants'])} mutants killed, {right} by the check named for them; "
        f"{alarms} false alarms in {len(spread['benign'])} benign variants"
    )


def summary_line(report: dict[str, Any]) -> str:
    n, good = len(report["mutants"]), len(report["benign"])
    return (
        f"{report['killed']} of {n} mutants killed, {report['right_check']} by the check named for them, "
        f"{report['localised']} found at the tap named for them; {report['false_alarms']} false alarms in "
        f"{good} benign variants; {report['faults_noticed']} of {len(report['harness'])} faults planted in "
        f"the harness and its input noticed; {report['seconds']:.0f} s"
    )


def _gates(m: dict[str, Any]) -> list[str]:
    """Per gate the letters of the dtypes in which it failed."""
    letter = {"fp32": "f", "bf16": "b", "fp16": "h"}
    return ["".join(letter[d] for d, failed in m["gates"].items() if gate in failed) for gate in GATES]


def _remark(m: dict[str, Any]) -> str:
    remarks = [f"SURVIVES in {', '.join(m['survived_in'])}"] if not m["killed"] else []
    if m["killed_by"] != m["expected_check"]:
        remarks.append(f"expected {m['expected_check']}")
    if m["found"] != m["expected_tap"]:
        remarks.append(f"expected at {m['expected_tap']}")
    return "; ".join(remarks)


def _variant(v: dict[str, Any]) -> tuple[str, str, str]:
    worst = ", ".join(f"{d} {percent:.0f}" for d, percent in v["worst_percent_of_bound"].items())
    return v["what"], worst, "; ".join(v["alarms"])


def _judged(entries: list[dict[str, Any]], name: str, dtype: str) -> list[bool]:
    return [e["usual"][dtype][name] for e in entries if dtype in e["usual"]]


def _let_through(report: dict[str, Any], name: str) -> str:
    """How many mutants a criterion passes and how many benign variants it fails, by dtype."""
    parts = []
    for dtype in ("fp32", "bf16", "fp16"):
        mutants, benign = (_judged(report[key], name, dtype) for key in ("mutants", "benign"))
        alarms = f", {sum(not ok for ok in benign)} of {len(benign)} benign failed" if benign else ""
        if mutants:
            parts.append(f"{dtype}: {sum(mutants)} of {len(mutants)} mutants passed{alarms}")
    return "; ".join(parts)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The whole page docs/kill-matrix.md."""
    env = report["environment"]
    parts = [
        "# Kill matrix",
        "",
        "Made by `python -m parity.mutants --markdown docs/kill-matrix.md`; do not edit. Each mutant is one small "
        "deliberate edit of nanollama, run as a candidate; each benign variant computes the same thing in another way.",
        "",
        f"**{summary_line(report)}** (torch {env['torch']}, transformers {env.get('transformers', '-')}, "
        f"{env['cpu_capability']}, one thread a process).",
        "",
        "## Mutants",
        "",
        "f, b, h: the gate failed in fp32, bf16, fp16. *Killed by* is the first check that fails, in the order of "
        "diagnosis; *found at* the first tap that departs.",
        "",
        *_grid(("#", "mutant", *GATES, "killed by", "found at", "remark"), report["mutants"], _mutant_cells),
        "",
        *_twins(report),
        *_ranks_page(report["distributed"]),
        "## Probable causes",
        "",
        "What the report says of each, computed from the traces alone.",
        "",
        *_grid(("#", "probable cause"), _with_cause(report), lambda m: [m["number"], m["cause"]]),
        "",
        "## The checker itself, and the lint of prompts",
        "",
        *_grid(("#", "fault", "noticed"), report["harness"],
               lambda f: [f["number"], f["what"], "yes" if f["noticed"] else "**no**"]),
        "",
        "## Benign variants",
        "",
        "The largest value of any gate, in percent of its bound.",
        "",
        *_grid(("variant", "fp32", "bf16", "fp16", "alarms"), report["benign"], _variant_cells),
        "",
        "## The usual criteria on the same candidates",
        "",
        "How many mutants each lets through, of those that run a forward pass and are visible at that dtype, and "
        "how many benign variants it fails.",
        "",
        *_usual(report),
        "",
    ]  # fmt: skip
    return "\n".join(parts)


def _twins(report: dict[str, Any]) -> list[str]:
    entries = [m for m in report["mutants"] if "twin" in m]
    text = "The dtypes in which each is killed, by a checkpoint of yours and with its seeded twin."
    return ["## With the twin", "", text, "", *_grid(TWIN, entries, twin_cells), ""] if entries else []


def _ranks_page(spread: dict[str, Any]) -> list[str]:
    """The mutants of training over several processes."""
    if not spread["mutants"]:
        return []
    checks = "; ".join(f"{name}: {what}" for name, what in CHECKS.items())
    return [
        "## Over ranks",
        "",
        "finetune's own loop on two gloo ranks, as copies (`--dp`), shards (`--fsdp`) or parts of layers (`--tp`), "
        f"against the same loop in one process. In the order of diagnosis, {checks}. Losses agree to five digits, "
        "gradients by G8's bound, whose floor is another order of sums in one process.",
        "",
        f"**{_ranks_line(spread)}**",
        "",
        *_grid(RANKS, spread["mutants"], _rank_cells),
        "",
        *_grid(("benign variant over two ranks", "worst, % of a bound", "alarm"), spread["benign"],
               lambda v: [v["what"], f"{v['worst_percent_of_bound']:.0f}", v["alarm"] or "none"]),
        "",
    ]  # fmt: skip


def _with_cause(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for m in report["mutants"] if m["cause"]]


def _grid(head: tuple[str, ...], entries: list[Any], cells: Callable[[Any], list[str]]) -> list[str]:
    rows = [list(head), ["---"] * len(head), *(cells(e) for e in entries)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _mutant_cells(m: dict[str, Any]) -> list[str]:
    invisible = [d for d in ("fp32", "bf16", "fp16") if d not in m["visible_in"] and d in m["gates"]]
    remark = _remark(m) or (f"rounding hides it in {', '.join(invisible)}" if invisible else "")
    return [m["number"], m["what"], *_gates(m), m["killed_by"] or "-", m["found"] or "-", remark]


def _variant_cells(v: dict[str, Any]) -> list[str]:
    worst = v["worst_percent_of_bound"]
    return [v["what"], *(f"{worst[d]:.0f}" if d in worst else "-" for d in ("fp32", "bf16", "fp16")),
            "; ".join(v["alarms"]) or "none"]  # fmt: skip


def _usual(report: dict[str, Any]) -> list[str]:
    def cells(name: str) -> list[str]:
        row = [name]
        for dtype in ("fp32", "bf16", "fp16"):
            visible = [m for m in report["mutants"] if dtype in m["visible_in"]]
            mutants, benign = _judged(visible, name, dtype), _judged(report["benign"], name, dtype)
            row += [f"{sum(mutants)} of {len(mutants)}", f"{sum(not ok for ok in benign)} of {len(benign)}"]
        return row

    def ours() -> list[str]:
        row = ["**parity**"]
        for dtype in ("fp32", "bf16", "fp16"):
            judged = [m for m in report["mutants"] if dtype in m["visible_in"] and dtype in m["usual"]]
            through = sum(not m["gates"][dtype] for m in judged)
            row += [f"{through} of {len(judged)}", f"{report['false_alarms']} of {len(report['benign'])}"]
        return row

    head = (
        "criterion",
        *(f"{d}: {what}" for d in ("fp32", "bf16", "fp16") for what in ("mutants passed", "benign failed")),
    )
    return [*_grid(head, list(NAMES), cells), "| " + " | ".join(ours()) + " |"]
