"""The result table and the verdict, as plain text: one row a judgement, the worst over references and paths shown."""

import math
from collections.abc import Iterator, Sequence

from nanollama.printable import printable_all
from parity.contract import Result, Status
from parity.report.model import Divergence, NoiseFloor, Report, Rounded

WIDTH = 160
MARKS = {Status.PASS: "ok", Status.FAIL: "FAIL", Status.ERROR: "ERROR", Status.SKIP: "-"}
SEVERITY = {Status.ERROR: 3, Status.FAIL: 2, Status.PASS: 1, Status.SKIP: 0}


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def render(report: Report) -> str:
    """The whole text of one run."""
    report = printable_all(report)
    c, tokens, versions = report.checkpoint, report.tokens, report.environment
    decided = ", ".join(f"{share:.0%} in {dtype}" for dtype, share in tokens.decided_fraction_by_dtype.items())
    lines = [
        f"checkpoint   {c.path} ({c.format}, {c.parameters:,} parameters, {c.config['n_layers']} layers)",
        f"candidate    {report.candidate}, against "
        + ", ".join({"meta": "Meta's llama_models", "hf": "transformers"}[r] for r in report.references)
        + f" (torch {versions['torch']}, transformers {versions.get('transformers', '-')})",
        f"tokens       {tokens.positions} positions in {tokens.prompts} prompts, longest {tokens.longest}; "
        f"decided: {decided}",
        "",
        *table([("check", "gate", "what", "dtype", "worst", "bound", "", "of", ""), *rows_of(report)]),
        "",
    ]
    if report.training:
        lines += [*table(list(_losses(report.training))), ""]
    lines += _on_twin(report.on_twin) + noise_lines(report.noise_floor)
    lines += [text for found in report.quantized for text in _quantized(found)]
    lines += [f"not covered  {text}" for text in list_uncovered(report.results)]
    lines += [f"erratum      {text}" for text in report.errata]
    lines += [f"note         {text}" for text in report.notices]
    lines += [f"problem      {text}" for text in _problems(report)]
    first, second = report.first_divergence, report.on_twin.first_divergence if report.on_twin else None
    lines += _divergence(first) + (_divergence(second) if second != first else [])
    lines += [
        f"verdict      {report.verdict.upper()}: {report.why}",
        f"             {report.seconds:.1f} s, of which {report.seconds_in_forward:.1f} s in forward passes; "
        f"peak {report.peak_anonymous_bytes / 2**20:,.0f} MiB a process",
    ]
    return "\n".join(lines)


def _on_twin(twin: Report | None) -> list[str]:
    """What was asked a second time, on which weights."""
    if twin is None:
        return []
    c = twin.checkpoint
    size = f"{c.parameters:,} parameters, {c.config['n_layers']} layers, {twin.tokens.positions} positions"
    return [f"twin         seeded weights in the checkpoint's place ({c.format}, {size}): {twin.verdict.upper()}"]


def noise_lines(floors: list[NoiseFloor]) -> list[str]:
    """Each reference judged against the other."""
    return [
        f"noise floor  {n.of} against {n.against}, {n.dtype}: logits {number(n.logits)}, "
        f"worst tap {number(n.taps)} ({n.tap})" + _gradients(n)
        for n in floors
    ]


def rows_of(report: Report) -> Iterator[tuple[str, ...]]:
    """Judgements of one kind and dtype in one row: the worst of them, and how many there are."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in report.results:
        if r.status is not Status.SKIP:
            key = (r.check, r.gate, r.metric or "", r.dtype or "", _twin(r.checkpoint))
            groups.setdefault(key, []).append(r)
    for (*names, twin), results in groups.items():
        worst = max(results, key=lambda r: (SEVERITY[r.status], _size(r.value)))
        values = (number(worst.value), number(worst.bound), MARKS[worst.status], str(len(results)))
        yield (*names, *values, twin)


def _twin(checkpoint: str) -> str:
    return "twin" if checkpoint == "twin" else ""


def _losses(losses: dict[str, list[float]]) -> Iterator[tuple[str, ...]]:
    """The losses of the training steps side by side."""
    yield "loss of step", *losses
    for step, row in enumerate(zip(*losses.values(), strict=False), 1):
        yield str(step), *(f"{loss:.6f}" for loss in row)


def _quantized(found: Rounded) -> Iterator[str]:
    """How far integer weights are from the model, beside what rounding the oracle's own makes of it."""
    if found.candidate is None or found.rounding is None:
        return
    for of, f in (("candidate", found.candidate), ("rounding alone", found.rounding)):
        at = "" if f.flip_margin is None else f", where the margin was {number(f.flip_margin)} at most"
        kl = f"KL {number(f.kl_mean)} nats in the mean, {number(f.kl_p99)} at p99, {number(f.kl_max)} at most"
        yield f"{found.scheme:12} {found.dtype} {of}: {kl}; {f.flips} of {f.positions} tokens flip{at}"


def _gradients(floor: NoiseFloor) -> str:
    if floor.gradients is None:
        return ""
    value, name = floor.gradients
    return f", worst gradient {number(value)} ({name})"


def _size(value: float | None) -> float:
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _party(r: Result) -> str:
    against = f"against {r.reference}" if r.reference else None
    return ", ".join(part for part in (_twin(r.checkpoint), r.dtype, r.path, against) if part)


def list_uncovered(results: Sequence[Result]) -> list[str]:
    """What was not judged and why, each reason once."""
    found: dict[str, None] = {}
    for r in results:
        if r.status is Status.SKIP:
            text = (r.reason or "").removeprefix("not covered: ")
            head = r.check if r.value is None else f"{r.check} ({_party(r)})"  # compared, and not judged
            found.setdefault(f"{head}: {text}", None)
    return list(found)


def _problems(report: Report) -> list[str]:
    lines = []
    for r in report.results:
        if r.status in (Status.FAIL, Status.ERROR):
            head = f"{r.check} ({_party(r)})"
            if r.value is not None:
                head += f": {r.metric or ''} {number(r.value)} beyond {number(r.bound)}"
            lines.append("; ".join(text for text in (head, r.where, r.reason) if text)[:WIDTH])
    return lines[:12] + ([f"and {len(lines) - 12} more, see --json"] if len(lines) > 12 else [])


def _divergence(first: Divergence | None) -> list[str]:
    if first is None:
        return []
    place = f"sequence {first.sequence}, position {first.position}" if first.position is not None else ""
    values = f"worst {first.value:.6g} for {first.expected:.6g}" if first.value is not None else ""
    where = "first departs, in the twin, at" if first.checkpoint == "twin" else "first departs at"
    head = f"{where} {first.tap} ({first.dtype}, against {first.reference})"
    return [
        f"divergence   {'; '.join(t for t in (head, place, values) if t)}",
        f"             {first.probable_cause}",
    ]
