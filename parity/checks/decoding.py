"""Gates on decoding and on relations between a candidate's own runs: greedy tokens, the cache, G7."""

from collections.abc import Iterator

from parity.contract import Result, Status, judge
from parity.measure.evidence import Evidence, Pair
from parity.measure.tolerances import BOUNDS


def greedy(ev: Evidence) -> Iterator[Result]:
    """G6, free-running: the candidate's own greedy text leaves the reference's only where the oracle sees a tie."""
    for pair in ev.pairs():
        generated = ev.candidates[pair.path].meta.get("generated", {}).get(pair.dtype)
        if not any(generated or []):
            none = "no greedy text was generated here; argmax judges the same positions teacher-forced"
            reason = f"not covered: {ev.candidates[pair.path].meta.get('uncovered', {}).get('greedy', none)}"
            yield Result("greedy", "G6", Status.SKIP, required=False, reason=reason, **pair.labels)
            continue
        judged = [_first_departure(ev, pair, i, ids) for i, ids in enumerate(generated) if ids]
        wrong = [place for place, decided in judged if place and decided]
        ties = sum(1 for place, decided in judged if place and not decided)
        yield judge(
            len(wrong), BOUNDS["G6"].value, check="greedy", gate="G6", metric="sequences that differ",
            unit="sequences", where=wrong[0] if wrong else None,
            reason=f"{len(judged)} sequences, {ties} left the reference's text at a tie", **pair.labels,
        )  # fmt: skip


def _first_departure(ev: Evidence, pair: Pair, sequence: int, ids: list[int]) -> tuple[str | None, bool]:
    """Where the candidate's continuation first differs from the sequence, and whether that position is decided."""
    assert ev.case.prompt_lengths is not None
    start = ev.case.prompt_lengths[sequence]
    wanted = ev.oracle.sequences[sequence][start : start + len(ids)]
    for step, (mine, theirs) in enumerate(zip(ids, wanted, strict=True)):
        if mine != theirs:
            position = start + step - 1  # the position whose logits chose this token
            best = int(ev.oracle_rows(pair.dtype)[sequence].argmax[position])
            decided = bool(ev.decided(pair, sequence)[position]) and mine != best
            return f"sequence {sequence}, token {step}: {mine} for {theirs}", decided
    return None, False


def cache(ev: Evidence) -> Iterator[Result]:
    """G7: prefill + decode, and chunked prefill, give the full forward's logits within G3, position by position."""
    for pair in ev.pairs():
        for kind, how in (("cached", "prefill + decode"), ("chunked", "chunked prefill")):
            yield from _extra_logits(ev, pair, "cache", kind, how)


def metamorphic(ev: Evidence) -> Iterator[Result]:
    """G7: bitwise: a rerun, another document changed; within G3: a row in a batch, packed documents, compiled."""
    for dtype, path, trace in ev.per_dtype():
        for name, largest in trace.meta.get("self", {}).get(dtype, {}).items():
            yield judge(
                largest, 0.0, check="metamorphic", gate="G7", dtype=dtype, path=path, metric=f"{name}: max |diff|",
                unit="logits", reason=name,
            )  # fmt: skip
    for pair in ev.pairs():
        for kind, how in (("batch", "row in a batch"), ("packed", "packed documents"), ("compiled", "compiled")):
            yield from _extra_logits(ev, pair, "metamorphic", kind, how)


def _extra_logits(ev: Evidence, pair: Pair, check: str, kind: str, how: str) -> Iterator[Result]:
    trace = ev.candidates[pair.path]
    places = trace.meta.get("extra", {}).get(pair.dtype, {}).get(kind, {})
    if not places:
        reason = f"not covered: {trace.meta.get('uncovered', {}).get(kind, f'{how} was not run')}"
        yield Result(check, "G7", Status.SKIP, required=False, metric=how, reason=reason, **pair.labels)
        return
    found = ev.worst_extra(pair, kind)
    assert found is not None
    worst, sequence = found
    error = ev.error_at(pair.path, pair.dtype, kind, sequence)
    where = f"{how}, {_at(error.place, sequence, places[str(sequence)])}"
    yield judge(
        worst, BOUNDS["G3.logits"].value, check=check, gate="G7", metric=f"rho, {how}", unit="x noise", where=where,
        **pair.labels,
    )  # fmt: skip


def _at(place: object, sequence: int, positions: list[int]) -> str:
    row = getattr(place, "index", (0,))[0]
    return f"sequence {sequence}, position {positions[row]}"
