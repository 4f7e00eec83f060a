"""The verdict, and everything that a report says about a run, as one JSON-ready dict (schema nanollama.parity/1)."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parity.candidates.conditions import Conditions
from parity.candidates.crash import results_of
from parity.checks import CHECKS
from parity.checks.identity import disagreements
from parity.checks.training import gradient_noise
from parity.contract import Result, Status
from parity.explain.localise import first_divergence, rho_curve
from parity.machine import installed
from parity.measure.evidence import Evidence, Pair
from parity.measure.metrics import LogitRows, noise, percentile, ratio
from parity.measure.rope_table import grades
from parity.run.runner import Runner
from parity.run.training import DTYPE

SCHEMA = "nanollama.parity/1"
PACKAGES = ("torch", "transformers", "llama_models", "fairscale", "safetensors", "tokenizers", "tiktoken")
EXIT_CODES = {"pass": 0, "quantized": 0, "fail": 1, "limited": 3}


def judge_all(ev: Evidence, checks: Sequence[str]) -> list[Result]:
    """The results of the named checks. A check that cannot finish is an error, never a skip."""
    results = [r for path, trace in ev.candidates.items() for r in results_of(path, trace.meta)
               if r.check in (*checks, "logits")]  # fmt: skip
    for name in checks:
        try:
            results += list(CHECKS[name](ev))
        except Exception as error:
            reason = f"the check failed: {type(error).__name__}: {error}"
            results.append(Result(name, "-", Status.ERROR, reason=reason))
    return results


# What a coarse RoPE table can fail; token ids, weights and training it cannot.
BEHIND_ROPE = ("taps", "logits", "kl", "argmax", "greedy", "cache", "metamorphic")


def judge_fairly(ev: Evidence, checks: Sequence[str]) -> tuple[Evidence, list[Result]]:
    """Judge; where a gate behind RoPE fails, judge again with a coarse table's error as rounding, if it is known."""
    results = judge_all(ev, checks)
    if not fails_behind_rope(results) or ev.coarse is None or ev.lenient:
        return ev, results
    lenient = ev.be_lenient()
    return lenient, judge_all(lenient, checks)


def fails_behind_rope(results: Sequence[Result]) -> bool:
    return any(r.status is Status.FAIL and r.check in BEHIND_ROPE for r in results)


def crash_results(crashes: Sequence[str]) -> list[Result]:
    """A candidate that cannot be run to the end is an error of its forward pass."""
    return [Result("logits", "G3", Status.ERROR, reason=crash) for crash in crashes]


def verdict(results: Sequence[Result], dtypes: Sequence[str], compared: int) -> tuple[str, str]:
    """("pass" | "fail" | "limited", why)."""
    bad = [r for r in results if r.status in (Status.FAIL, Status.ERROR)]
    if bad:
        names = ", ".join(dict.fromkeys(r.check for r in bad))
        return "fail", f"{len(bad)} of {len(results)} results failed: {names}"
    if compared == 0:
        return "limited", "no tensor was compared"
    if not any(r.status is Status.PASS for r in results):
        return "limited", f"nothing was judged: {next((r.reason for r in results), 'no check was made')}"
    missed = [r for r in results if r.status is Status.SKIP and r.required]
    if missed:
        return "limited", f"{missed[0].check} could not run: {missed[0].reason}"
    if "fp32" not in dtypes:
        return "limited", "fp32 was not among the dtypes; lower precision cannot see every error"
    return "pass", f"{sum(r.status is Status.PASS for r in results)} results passed"


def compared_tensors(ev: Evidence) -> int:
    """How many tensors of the candidate, or tokens where it has no logits, were held against the oracle."""
    answers = [trace.meta.get("answers", {}).get(dtype, []) for dtype, _, trace in ev.per_dtype()]
    return sum(len(found) for given in answers for found in given) + sum(
        len(error.error)
        for dtype, _, trace in ev.per_dtype()
        for error in ev.measured(trace, dtype).taps.values()
    )  # fmt: skip


def judged_dtypes(ev: Evidence) -> list[str]:
    """The dtypes at which every path of the candidate was run."""
    return [d for d in ev.case.dtypes if all(d in trace.meta["dtypes"] for trace in ev.candidates.values())]


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


def environment(case_threads: int, device: str) -> dict[str, Any]:
    cpu = torch.backends.cpu.get_cpu_capability()
    machine = {"system": platform.system(), "machine": platform.machine(), "cpu_capability": cpu}
    return {
        "python": platform.python_version(),
        **installed(PACKAGES),
        **machine,
        "threads": case_threads,
        "device": device,
    }


def summarise(ev: Evidence, results: list[Result], runner: Runner, seconds: float, checkpoint: dict) -> dict[str, Any]:
    """Everything a report shows. `checkpoint`: path, format."""
    first = next(iter(ev.references.values()))
    decided = decided_fraction(ev)
    word, why = verdict(results, judged_dtypes(ev), compared_tensors(ev))
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


def under_conditions(ev: Evidence, word: str, why: str) -> tuple[str, str]:
    """A pass under declared conditions says so, and is none in floating point where integers are among them."""
    said = {c for trace in ev.candidates.values() if (c := Conditions.of(trace.meta))}
    if word != "pass" or not said:
        return word, why
    names = ", ".join(sorted(map(str, said)))
    what = "weights to " if all(c == Conditions(c.integers) for c in said) else "as declared: "
    why += f"; the error is that of rounding {what}{names}, not that of floating point"
    return ("quantized" if any(c.quantized for c in said) else "pass"), why


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


def own_peak_bytes() -> int:
    """Peak resident memory of this process; an upper bound of its anonymous part."""
    from parity.run.process import anonymous_bytes

    return anonymous_bytes(os.getpid())


def checkpoint_entry(path: Path, kind: str) -> dict[str, Any]:
    return {"path": str(path), "format": kind}
