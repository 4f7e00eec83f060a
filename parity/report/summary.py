"""From evidence and results to the report: everything that is said about a run."""

from dataclasses import replace
from typing import Any

import torch

from parity.candidates.conditions import Conditions
from parity.checks.identity import disagreements
from parity.checks.training import gradient_noise
from parity.checks.verdict import common_dtypes, compared_tensors, decide, fails_behind_rope, under_conditions
from parity.contract import Result
from parity.explain.localise import first_divergence
from parity.machine import environment
from parity.measure.evidence import Evidence, Pair
from parity.measure.metrics import LogitRows, noise_rms, percentile, ratio
from parity.measure.rope_table import grades
from parity.report.model import CheckpointEntry, Curve, Distance, NoiseFloor, Report, Rounded, Tokens
from parity.run.execute import RunLog
from parity.run.training import DTYPE


def noise_floor(ev: Evidence) -> list[NoiseFloor]:
    """Each reference judged against the other as if it were a candidate: what the bounds have to leave room for."""
    pairs = [(of, against) for of in ev.references for against in ev.references if of != against]
    return [floor_between(ev, dtype, *pair) for dtype in ev.case.dtypes for pair in pairs]


def floor_between(ev: Evidence, dtype: str, of: str, against: str) -> NoiseFloor:
    mine, theirs = (ev.measured(ev.references[name], dtype).taps for name in (of, against))
    shared = [tap for tap in mine if tap in theirs]
    rhos = {tap: ratio(mine[tap].rms(), noise_rms(theirs[tap], dtype)) for tap in shared}
    worst = max((tap for tap in shared if tap != "logits"), key=rhos.__getitem__, default=None)
    return NoiseFloor(
        of,
        against,
        dtype,
        logits=rhos.get("logits"),
        tap=worst,
        taps=rhos[worst] if worst else None,
        rms_logits=mine["logits"].rms(),
        gradients=gradient_noise(ev, of, against) if dtype == DTYPE else None,
    )


def decided_fraction(ev: Evidence) -> dict[str, float]:
    """Share of positions where the oracle's choice stands clear of rounding, by dtype, the worst over references."""
    shares: dict[str, float] = {}
    for pair in ev.pairs():
        masks = [ev.decided(pair, i) for i in range(len(ev.oracle.sequences))]
        share = sum(int(m.sum()) for m in masks) / max(1, sum(m.numel() for m in masks))
        shares[pair.dtype] = min(share, shares.get(pair.dtype, 1.0))
    return shares


def summarise(
    ev: Evidence, results: list[Result], candidate: str, log: RunLog, seconds: float, entry: CheckpointEntry
) -> Report:
    """Everything a report shows. `entry`: the checkpoint, whose config is then as the first reference read it."""
    config = next(iter(ev.references.values())).meta["config"]
    word, why = decide(results, common_dtypes(ev), compared_tensors(ev))
    word, why = under_conditions(ev, word, why)
    errata = [e for trace in ev.references.values() for e in trace.meta.get("errata", [])] + disagreements(ev)
    lengths, tables = [len(s) for s in ev.oracle.sequences], grades(ev, ev.lenient and not fails_behind_rope(results))
    new = sum(lengths) - sum(ev.case.prompt_lengths or lengths)
    return Report(
        verdict=word,
        why=why,
        candidate=candidate,
        references=list(ev.references),
        checkpoint=replace(entry, config=config, parameters=count_parameters(config)),
        environment=environment(ev.case.threads, ev.case.device),
        results=results,
        tokens=Tokens(len(lengths), sum(lengths), max(lengths), decided_fraction(ev), new),
        first_divergence=first_divergence(ev) if word == "fail" else None,
        errata=errata,
        notices=[*log.notices, *from_cache(log.cached), *map(str, tables)],
        noise_floor=noise_floor(ev),
        training=training_losses(ev),
        quantized=[rounded(ev, pair) for pair in ev.pairs() if conditions_of(ev, pair)],
        cached=log.cached,
        rope_tables=tables,
        rho={found.label: found for found in (curve(ev, pair) for pair in ev.pairs())},
        streamed={dtype: trace.meta["streamed"].get(dtype) for dtype, _, trace in ev.per_dtype()},
        seconds=round(seconds, 3),
        seconds_in_forward=round(log.seconds_in_forward, 3),
        peak_anonymous_bytes=log.peak_bytes,
    )


def curve(ev: Evidence, pair: Pair) -> Curve:
    return Curve(**pair.labels, ratios={tap: ev.rho(pair, tap)[0] for tap in ev.shared(pair)})


def from_cache(cached: list[str]) -> list[str]:
    return [f"from the cache, not run again: {', '.join(cached)} (--cache off runs them)"] if cached else []


def conditions_of(ev: Evidence, pair: Pair) -> Conditions:
    return Conditions.of(ev.candidates[pair.path].meta)


def rounded(ev: Evidence, pair: Pair) -> Rounded:
    """How far declared rounding is from the model itself, and how far the oracle is that rounds so."""
    scheme = str(conditions_of(ev, pair))
    alone = ev.measured(ev.rounded[scheme], pair.dtype)
    candidate, rounding = (distance(ev, rows, pair.dtype) for rows in (ev.candidate(pair).rows, alone.rows))
    return Rounded(scheme, pair.dtype, pair.path, candidate, rounding)


def distance(ev: Evidence, mine: list[LogitRows], dtype: str) -> Distance | None:
    """From the oracle's own logits; None without any. Margins are in units of these logits."""
    if not mine:
        return None
    kl = torch.cat([rows.kl for rows in mine])
    oracle = ev.oracle_rows(dtype)
    margins = torch.cat([o.margin[m.argmax != o.argmax] for m, o in zip(mine, oracle, strict=True)])
    flip_margin = float(margins.max()) if margins.numel() else None
    return Distance(float(kl.mean()), percentile(kl, 0.99), float(kl.max()), kl.numel(), margins.numel(), flip_margin)


def training_losses(ev: Evidence) -> dict[str, list[float]]:
    """The losses of the training steps by implementation, the oracle's first; empty where nothing was trained."""
    parties = {
        "oracle": ev.oracle,
        **ev.references,
        **{f"candidate {p or ''}".strip(): t for p, t in ev.candidates.items()},
    }
    known = {name: (trace.meta.get("training") or {}).get("losses") for name, trace in parties.items()}
    return {name: losses for name, losses in known.items() if losses}


def count_parameters(c: dict[str, Any]) -> int:
    """From the config echo alone, so that a streamed checkpoint needs no pass over its tensors."""
    kv = c["n_kv_heads"] * c["head_dim"]
    q = c["n_heads"] * c["head_dim"]
    layer = c["dim"] * (2 * q + 2 * kv + 3 * c["hidden_dim"] + 2)
    return c["n_layers"] * layer + c["dim"] + c["vocab_size"] * c["dim"] * (1 if c["tied"] else 2)
