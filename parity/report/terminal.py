"""The result table and the verdict, as plain text: one row a judgement, the worst over references and paths shown."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

WIDTH = 160
MARKS = {"pass": "ok", "fail": "FAIL", "error": "ERROR", "skip": "-"}
SEVERITY = {"error": 3, "fail": 2, "pass": 1, "skip": 0}


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def render(report: dict[str, Any]) -> str:
    """The whole text of one run."""
    c, tokens = report["checkpoint"], report["tokens"]
    decided = ", ".join(f"{share:.0%} in {dtype}" for dtype, share in tokens["decided_fraction_by_dtype"].items())
    versions = report["environment"]
    lines = [
        f"checkpoint   {c['path']} ({c['format']}, {c['parameters']:,} parameters, {c['config']['n_layers']} layers)",
        f"candidate    {report['candidate']}, against "
        + ", ".join({"meta": "Meta's llama_models", "hf": "transformers"}[r] for r in report["references"])
        + f" (torch {versions['torch']}, transformers {versions.get('transformers', '-')})",
        f"tokens       {tokens['positions']} positions in {tokens['prompts']} prompts, longest {tokens['longest']}; "
        f"decided: {decided}",
        "",
        *table([("check", "gate", "what", "dtype", "worst", "bound", "", "of", ""), *_rows(report)]),
        "",
    ]
    if report["training"]:
        lines += [*table(list(_losses(report["training"]))), ""]
    lines += _on_twin(report.get("twin", {})) + noise_lines(report["noise_floor"])
    lines += [text for found in report["quantized"] for text in _quantized(found)]
    lines += [f"not covered  {text}" for text in _uncovered(report)]
    lines += [f"erratum      {text}" for text in report["errata"]]
    lines += [f"note         {text}" for text in report["notices"]]
    lines += [f"problem      {text}" for text in _problems(report)]
    first, second = report["first_divergence"], report.get("twin", {}).get("first_divergence")
    lines += _divergence(first) + (_divergence(second) if second != first else [])
    lines += [
        f"verdict      {report['verdict'].upper()}: {report['why']}",
        f"             {report['seconds']:.1f} s, of which {report['seconds_in_forward']:.1f} s in forward passes; "
        f"peak {report['peak_anonymous_bytes'] / 2**20:,.0f} MiB a process",
    ]
    return "\n".join(lines)


def _on_twin(twin: dict[str, Any]) -> list[str]:
    """What was asked a second time, on which weights; a kit's report has no twin."""
    if twin.get("status") != "run":
        return []
    c, tokens = twin["checkpoint"], twin["tokens"]
    size = f"{c['parameters']:,} parameters, {c['config']['n_layers']} layers, {tokens['positions']} positions"
    return [f"twin         seeded weights in the checkpoint's place ({c['format']}, {size}): {twin['verdict'].upper()}"]


def noise_lines(floors: list[dict[str, Any]]) -> list[str]:
    """Each reference judged against the other."""
    return [
        f"noise floor  {n['of']} against {n['against']}, {n['dtype']}: logits {number(n['logits'])}, "
        f"worst tap {number(n['taps'])} ({n['tap']})" + _gradients(n)
        for n in floors
    ]


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Judgements of one kind and dtype in one row: the worst of them, and how many there are."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in report["results"]:
        if r["status"] != "skip":
            key = (r["check"], r["gate"], r["metric"] or "", r["dtype"] or "", _twin(r["checkpoint"]))
            groups.setdefault(key, []).append(r)
    for (*names, twin), results in groups.items():
        worst = max(results, key=lambda r: (SEVERITY[r["status"]], _size(r["value"])))
        values = (number(worst["value"]), number(worst["bound"]), MARKS[worst["status"]], str(len(results)))
        yield (*names, *values, twin)


def _twin(checkpoint: str) -> str:
    return "twin" if checkpoint == "twin" else ""


def _losses(losses: dict[str, list[float]]) -> Iterator[tuple[str, ...]]:
    """The losses of the training steps side by side."""
    yield "loss of step", *losses
    for step, row in enumerate(zip(*losses.values(), strict=False), 1):
        yield str(step), *(f"{loss:.6f}" for loss in row)


def _quantized(found: dict[str, Any]) -> Iterator[str]:
    """How far integer weights are from the model, beside what rounding the oracle's own makes of it."""
    if "kl_mean" not in found:
        return
    for of, f in (("candidate", found), ("rounding alone", found["rounding"])):
        at = "" if f["flip_margin"] is None else f", where the margin was {number(f['flip_margin'])} at most"
        kl = f"KL {number(f['kl_mean'])} nats in the mean, {number(f['kl_p99'])} at p99, {number(f['kl_max'])} at most"
        flips = f"{f['flips']} of {f['positions']} tokens flip{at}"
        yield f"{found['scheme']:12} {found['dtype']} {of}: {kl}; {flips}"


def _gradients(floor: dict[str, Any]) -> str:
    if not floor.get("gradients"):
        return ""
    value, name = floor["gradients"]
    return f", worst gradient {number(value)} ({name})"


def _size(value: float | None) -> float:
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _party(r: dict[str, Any]) -> str:
    against = f"against {r['reference']}" if r["reference"] else None
    return ", ".join(part for part in (_twin(r["checkpoint"]), r["dtype"], r["path"], against) if part)


def _uncovered(report: dict[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for r in report["results"]:
        if r["status"] == "skip":
            text = (r["reason"] or "").removeprefix("not covered: ")
            head = r["check"] if r["value"] is None else f"{r['check']} ({_party(r)})"  # compared, and not judged
            found.setdefault(f"{head}: {text}", None)
    return list(found)


def _problems(report: dict[str, Any]) -> list[str]:
    lines = []
    for r in report["results"]:
        if r["status"] in ("fail", "error"):
            head = f"{r['check']} ({_party(r)}): {r['metric'] or ''} {number(r['value'])} beyond {number(r['bound'])}"
            head = head if r["value"] is not None else f"{r['check']} ({_party(r)})"
            lines.append("; ".join(text for text in (head, r["where"], r["reason"]) if text)[:WIDTH])
    return lines[:12] + ([f"and {len(lines) - 12} more, see --json"] if len(lines) > 12 else [])


def _divergence(first: dict[str, Any] | None) -> list[str]:
    if first is None:
        return []
    place = f"sequence {first['sequence']}, position {first['position']}" if first["position"] is not None else ""
    values = f"worst {first['value']:.6g} for {first['expected']:.6g}" if first["value"] is not None else ""
    where = "first departs, in the twin, at" if first.get("checkpoint") == "twin" else "first departs at"
    head = f"{where} {first['tap']} ({first['dtype']}, against {first['reference']})"
    return [
        f"divergence   {'; '.join(t for t in (head, place, values) if t)}",
        f"             {first['probable_cause']}",
    ]
