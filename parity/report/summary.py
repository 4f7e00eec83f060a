"""Everything that a report says about a run, as one JSON-ready dict (schema nanollama.parity/1)."""

from typing import Any

import torch

from parity.candidates.conditions import Conditions
from parity.checks.identity import disagreements
from parity.checks.training import gradient_noise
from parity.checks.verdict import compared_tensors, decide, fails_behind_rope, judged_dtypes, under_conditions
from parity.contract import Result
from parity.explain.localise import first_divergence, rho_curve
from parity.machine import environment
from parity.measure.evidence import Evidence, Pair
from parity.measure.metrics import LogitRows, noise, percentile, ratio
from parity.measure.rope_table import grades
from parity.run.runner import Runner
from parity.run.training import DTYPE

SCHEMA = "nanollama.parity/1"


def noise_floor(ev: Evidence) -> list[dict[str, Any]]:
    """Each reference judged against the other as if it were a candidate: what the bounds have to leave room for."""
    rows = []
    for dtype in ev.case.dtypes:
        for a in ev.references:
            for b in ev.references:
                if a != b:
                    mine, theirs = (ev.measured(ev.references[n], dtype).taps for n in (a, b))
                    shared = [t for t in mine if t in theirs]
                    rhos = {t: ratio(mine[t].rms(), noise(theirs[t], dtype)) for t in shared}
                    worst = max((t for t in shared if t != "logits"), key=rhos.__getitem__, default=None)
                    rows.append(
                        {"of": a, "against": b, "dtype": dtype, "logits": rhos.get("logits"), "tap": worst}
                        | {"taps": rhos[worst] if worst else None, "rms_logits": mine["logits"].rms()}
                        | ({"gradients": gradient_noise(ev, a, b)} if dtype == DTYPE else {})
                    )
    return rows


def decided_fraction(ev: Evidence) -> dict[str, float]:
    """Share of positions where the oracle's choice stands clear of rounding, by dtype, the worst over references."""
    shares: dict[str, float] = {}
    for pair in ev.pairs():
        masks = [ev.decided(pair, i) for i in range(len(ev.oracle.sequences))]
        share = sum(int(m.sum()) for m in masks) / max(1, sum(m.numel() for m in masks))
        shares[pair.dtype] = min(share, shares.get(pair.dtype, 1.0))
    return shares


def summarise(ev: Evidence, results: list[Result], runner: Runner, seconds: float, checkpoint: dict) -> dict[str, Any]:
    """Everything a report shows. `checkpoint`: path, format."""
    first = next(iter(ev.references.values()))
    decided = decided_fraction(ev)
    word, why = decide(results, judged_dtypes(ev), compared_tensors(ev))
    word, why = under_conditions(ev, word, why)
    errata = [e for trace in ev.references.values() for e in trace.meta.get("errata", [])] + disagreements(ev)
    lengths, tables = [len(s) for s in ev.oracle.sequences], grades(ev, ev.lenient and not fails_behind_rope(results))
    return {
        "schema": SCHEMA,
        "verdict": word,
        "why": why,
        "candidate": runner.candidate,
        "references": list(ev.references),
        "checkpoint": checkpoint | {"config": first.meta["config"], "parameters": count_parameters(first.meta)},
        "environment": environment(ev.case.threads, ev.case.device),
        "results": [r.as_json() for r in results],
        "first_divergence": first_divergence(ev) if word == "fail" else None,
        "errata": errata,
        "notices": [*runner.notices, *from_cache(runner), *(t["text"] for t in tables)],
        "cached": runner.cached,
        "rope_tables": tables,
        "noise_floor": noise_floor(ev),
        "rho": {_key(pair): rho_curve(ev, pair) for pair in ev.pairs()},
        "training": training_losses(ev),
        "quantized": [quantized(ev, pair) for pair in ev.pairs() if conditions_of(ev, pair)],
        "streamed": {dtype: trace.meta["streamed"].get(dtype) for dtype, _, trace in ev.per_dtype()},
        "tokens": {
            "prompts": len(lengths),
            "positions": sum(lengths),
            "longest": max(lengths),
            "new_tokens": sum(lengths) - sum(ev.case.prompt_lengths or lengths),
            "decided_fraction": min(decided.values(), default=0.0),
            "decided_fraction_by_dtype": decided,
        },
        "seconds": round(seconds, 3),
        "seconds_in_forward": round(runner.seconds_in_forward, 3),
        "peak_anonymous_bytes": runner.peak_bytes,
    }


def from_cache(runner: Runner) -> list[str]:
    if not runner.cached:
        return []
    return [f"from the cache, not run again: {', '.join(runner.cached)} (--cache off runs them)"]


def conditions_of(ev: Evidence, pair: Pair) -> Conditions:
    return Conditions.of(ev.candidates[pair.path].meta)


def quantized(ev: Evidence, pair: Pair) -> dict[str, Any]:
    """How far declared rounding is from the model itself: KL in nats, and the margins at which tokens flip.

    `rounding` has the same of the oracle that rounds so. Margins are in units of the oracle's logits: how
    far its best token was ahead of the next at the positions where the candidate prefers another.
    """
    scheme = str(conditions_of(ev, pair))
    found = {"scheme": scheme, "dtype": pair.dtype, "path": pair.path, **far(ev, ev.candidate(pair).rows, pair.dtype)}
    rounded = ev.measured(ev.rounded[scheme], pair.dtype)
    return found | {"rounding": far(ev, rounded.rows, pair.dtype)}


def far(ev: Evidence, mine: list[LogitRows], dtype: str) -> dict[str, Any]:
    if not mine:
        return {}
    kl = torch.cat([rows.kl for rows in mine])
    oracle = ev.oracle_rows(dtype)
    margins = torch.cat([o.margin[m.argmax != o.argmax] for m, o in zip(mine, oracle, strict=True)])
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": percentile(kl, 0.99),
        "kl_max": float(kl.max()),
        "positions": kl.numel(),
        "flips": margins.numel(),
        "flip_margin": float(margins.max()) if margins.numel() else None,
    }


def training_losses(ev: Evidence) -> dict[str, list[float]]:
    """The losses of the training steps by implementation, the oracle's first; empty where nothing was trained."""
    parties = {
        "oracle": ev.oracle,
        **ev.references,
        **{f"candidate {p or ''}".strip(): t for p, t in ev.candidates.items()},
    }
    known = {name: (trace.meta.get("training") or {}).get("losses") for name, trace in parties.items()}
    return {name: losses for name, losses in known.items() if losses}


def _key(pair: Pair) -> str:
    return " ".join(part for part in (pair.path, pair.dtype, "vs", pair.reference) if part)


def count_parameters(meta: dict[str, Any]) -> int:
    """From the config alone, so that a streamed checkpoint needs no pass over its tensors."""
    c = meta["config"]
    kv = c["n_kv_heads"] * c["head_dim"]
    q = c["n_heads"] * c["head_dim"]
    layer = c["dim"] * (2 * q + 2 * kv + 3 * c["hidden_dim"] + 2)
    return c["n_layers"] * layer + c["dim"] + c["vocab_size"] * c["dim"] * (1 if c["tied"] else 2)
