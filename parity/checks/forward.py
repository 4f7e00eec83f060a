"""Gates on the teacher-forced forward pass: G3 and G4 on taps and logits, G5 on KL, G6 on tokens, BIT."""

import math
from collections.abc import Iterator

import torch

from parity.candidates.crash import unrun
from parity.candidates.interface import lacking
from parity.contract import Result, Status, judge
from parity.measure.evidence import Evidence, Pair, worst_ratio
from parity.measure.metrics import TapError, own_noise, percentile
from parity.measure.tolerances import BOUNDS, KL_FLOOR_NATS, KL_POSITIONS


def broken_or_missing(ev: Evidence, pair: Pair, check: str, gate: str, taps: list[str]) -> Iterator[Result]:
    """Failures for taps of the wrong shape; an error where the candidate gave nothing to compare."""
    candidate = ev.candidate(pair)
    for tap in taps:
        if tap in candidate.broken:
            yield Result(check, gate, Status.FAIL, where=tap, reason=candidate.broken[tap], **pair.labels)


def taps(ev: Evidence) -> Iterator[Result]:
    """G3 at every tap but the logits: the worst ratio, and the pairwise G4 at its worst."""
    for pair in ev.pairs():
        yield from broken_or_missing(ev, pair, "taps", "G3", [t for t in ev.candidate(pair).broken if t != "logits"])
        shared = [t for t in ev.shared(pair) if t != "logits"]
        if not shared:
            reason = f"not covered: {lacking(ev.candidates[pair.path].meta, 'taps')}"
            yield Result("taps", "G3", Status.SKIP, reason=reason, required=False, **pair.labels)
            continue
        ratios = {tap: ev.rho(pair, tap)[0] for tap in shared}
        yield _worst(ev, pair, "taps", "G3", ratios, BOUNDS["G3.taps"].value)
        pairwise = {tap: _pairwise(ev, pair, tap) for tap in shared}
        yield _worst(ev, pair, "taps", "G4", pairwise, BOUNDS["G4"].value)


def logits(ev: Evidence) -> Iterator[Result]:
    """G3 and G4 on the logits. A dtype that the candidate was not run at leaves the verdict limited."""
    for path, trace in ev.candidates.items():
        for dtype in ev.case.dtypes:
            if dtype not in trace.meta["dtypes"]:
                yield from unrun(trace.meta, path, dtype)
    for pair in ev.pairs():
        yield from broken_or_missing(ev, pair, "logits", "G3", ["logits"])
        if "logits" in ev.candidate(pair).taps:
            ratios = {"logits": ev.rho(pair, "logits")[0]}
            yield _worst(ev, pair, "logits", "G3", ratios, BOUNDS["G3.logits"].value)
            pairwise = {"logits": _pairwise(ev, pair, "logits")}
            yield _worst(ev, pair, "logits", "G4", pairwise, BOUNDS["G4"].value)
        elif (listed := ev.listed(pair)) is not None:
            yield judge(
                worst_ratio(listed.error, listed.noise, pair.dtype)[0],
                BOUNDS["G3.logits"].value,
                check="logits",
                gate="G3",
                metric="rho, log-probabilities",
                unit="x noise",
                where=listed.where,
                reason=f"{listed.numbers} of the likeliest tokens at {listed.positions} positions",
                **pair.labels,
            )
        elif not ev.candidate(pair).broken:
            meta = ev.candidates[pair.path].meta
            reason = f"not covered: {meta.get('uncovered', {}).get('log_probs') or lacking(meta, 'log_probs')}"
            yield Result("logits", "G3", Status.SKIP, required=False, reason=reason, **pair.labels)


def _pairwise(ev: Evidence, pair: Pair, tap: str) -> float:
    return worst_ratio(ev.pairwise(pair, tap), ev.reference(pair).taps[tap], pair.dtype)[0]


def _worst(ev: Evidence, pair: Pair, check: str, gate: str, ratios: dict[str, float], bound: float) -> Result:
    tap = max(ratios, key=lambda t: float("inf") if ratios[t] != ratios[t] else ratios[t])
    where = f"{tap}, {ev.candidate(pair).taps[tap].place}"
    return judge(ratios[tap], bound, check=check, gate=gate, metric="rho", unit="x noise", where=where, **pair.labels)


def bitwise(ev: Evidence) -> Iterator[Result]:
    """BIT: nanollama's exact path gives Meta's logits, bit for bit, on CPU. Asked of no other path or candidate."""
    if "exact" not in ev.candidates or "meta" not in ev.references or ev.case.device != "cpu":
        reason = "asked of nanollama's exact path against meta on CPU alone"
        yield Result("bitwise", "BIT", Status.SKIP, reason=reason, required=False)
        return
    for pair in ev.pairs():
        if pair.path == "exact" and pair.reference == "meta" and "logits" in ev.candidate(pair).taps:
            difference = ev.pairwise(pair, "logits")
            yield judge(
                difference.largest,
                0.0,
                check="bitwise",
                gate="BIT",
                metric="max |difference|",
                unit="logits",
                where=str(difference.place),
                **pair.labels,
            )


def kl(ev: Evidence) -> Iterator[Result]:
    """G5: mean, 99th percentile and maximum over positions of KL(oracle || candidate), against the reference's.

    Of a candidate that lists log-probabilities, over the tokens that it lists, both distributions renormalised to them.
    """
    for pair in ev.pairs():
        mine, theirs = ev.candidate(pair).rows, ev.reference(pair).rows
        if mine:
            c, r = torch.cat([rows.kl for rows in mine]), torch.cat([rows.kl for rows in theirs])
            error, noise = ev.candidate(pair).taps["logits"], ev.reference(pair).taps["logits"]
        elif (listed := ev.listed(pair)) is not None:
            c, r, error, noise = listed.kl, listed.kl_noise, listed.error, listed.noise
        else:
            continue
        if c.numel() < KL_POSITIONS:
            reason = f"not covered: {c.numel()} positions are too few for statistics of KL, {KL_POSITIONS} are needed"
            yield Result("kl", "G5", Status.SKIP, required=False, reason=reason, **pair.labels)
            continue
        fits = worst_ratio(error, noise, pair.dtype)[0] <= BOUNDS["G3.logits"].value
        yield from _kl_statistics(pair, c, r, noise if fits else None)


def _kl_statistics(pair: Pair, c: torch.Tensor, r: torch.Tensor, noise: TapError | None) -> Iterator[Result]:
    """c, r (N,): KL in nats. `noise`: of the reference's logits, where the candidate's keep to it."""
    for name, statistic in (
        ("mean", torch.Tensor.mean),
        ("p99", lambda x: percentile(x, 0.99)),
        ("max", torch.max),
    ):
        value = float(statistic(c)) / (float(statistic(r)) + KL_FLOOR_NATS)
        bound, explained = BOUNDS[f"G5.{name}"].value, None
        if name == "max" and bound < value < math.inf and noise is not None:
            value, explained = kl_explained(noise, pair.dtype, c), "of what the logits' noise at that position explains"
        where = f"{float(statistic(c)):.3g} nats for {float(statistic(r)):.3g}"
        yield judge(
            value,
            bound,
            check="kl",
            gate="G5",
            metric=f"KL {name}",
            unit="x noise",
            where=where,
            reason=explained,
            **pair.labels,
        )


def kl_explained(noise: TapError, dtype: str, kl: torch.Tensor) -> float:
    """The largest KL (N,) nats by what logits within their gate come to at its position.

    The reference's own maximum is one draw, and may be a lucky one. KL is half the variance of the logits' errors under
    the oracle's p: at most half the square of the largest error that the gate allows, were all of it at likely tokens.
    """
    squares = torch.cat(noise.error) / noise.width
    squares = squares.clamp_min(own_noise(noise, dtype) ** 2)
    if noise.drift:
        squares = squares + torch.cat(noise.drift) / noise.width
    explained = BOUNDS["G3.logits"].value ** 2 * squares / 2
    return float((kl / (explained + KL_FLOOR_NATS)).max())


def chosen_tokens(ev: Evidence, pair: Pair) -> list[torch.Tensor]:
    """The candidate's token after each position (T,) of each sequence, -1 where it was not asked."""
    answers = ev.candidates[pair.path].meta.get("answers", {}).get(pair.dtype)
    if not answers:
        return [rows.argmax for rows in ev.candidate(pair).rows]
    chosen = [torch.full((len(ids),), -1) for ids in ev.oracle.sequences]
    for row, found in zip(chosen, answers, strict=True):
        for position, token in found.items():
            row[int(position)] = token
    return chosen


def argmax(ev: Evidence) -> Iterator[Result]:
    """G6: at decided positions the candidate's best token is the oracle's; undecided ones are ties, counted."""
    for pair in ev.pairs():
        mine = chosen_tokens(ev, pair)
        if not mine:
            reason = "not covered: there are neither logits nor tokens to compare"
            yield Result("argmax", "G6", Status.SKIP, reason=reason, **pair.labels)
            continue
        decided = [ev.decided(pair, i) & (m >= 0) for i, m in enumerate(mine)]
        best = [rows.argmax for rows in ev.oracle_rows(pair.dtype)]
        wrong = [(m != b) & d for m, b, d in zip(mine, best, decided, strict=True)]
        count, total = sum(int(w.sum()) for w in wrong), sum(int(d.sum()) for d in decided)
        positions = sum(int((m >= 0).sum()) for m in mine)
        first = next((f"sequence {i}, position {int(w.nonzero()[0])}" for i, w in enumerate(wrong) if w.any()), None)
        labels = {"metric": "tokens that differ", "unit": "decided positions", "where": first, **pair.labels}
        reason = f"{total} of {positions} positions decided"
        if total == 0:
            yield Result("argmax", "G6", Status.SKIP, reason=f"{reason}: nothing to judge", **labels)
        else:
            yield judge(count, BOUNDS["G6"].value, check="argmax", gate="G6", reason=reason, **labels)
