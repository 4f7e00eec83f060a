"""From evidence to a verdict: the chosen checks are run, and their results decide."""

from collections.abc import Sequence

from parity.candidates.conditions import Conditions
from parity.candidates.crash import results_of
from parity.checks import CHECKS
from parity.contract import Result, Status
from parity.measure.evidence import Evidence

EXIT_CODES = {"pass": 0, "quantized": 0, "fail": 1, "limited": 3}


def run_checks(ev: Evidence, checks: Sequence[str]) -> list[Result]:
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


def run_checks_fairly(ev: Evidence, checks: Sequence[str]) -> tuple[Evidence, list[Result]]:
    """Judge; where a gate behind RoPE fails, judge again with a coarse table's error as rounding, if it is known."""
    results = run_checks(ev, checks)
    if not fails_behind_rope(results) or ev.coarse is None or ev.lenient:
        return ev, results
    lenient = ev.be_lenient()
    return lenient, run_checks(lenient, checks)


def fails_behind_rope(results: Sequence[Result]) -> bool:
    return any(r.status is Status.FAIL and r.check in BEHIND_ROPE for r in results)


def crash_results(crashes: Sequence[str]) -> list[Result]:
    """A candidate that cannot be run to the end is an error of its forward pass."""
    return [Result("logits", "G3", Status.ERROR, reason=crash) for crash in crashes]


def decide(results: Sequence[Result], dtypes: Sequence[str], compared: int) -> tuple[str, str]:
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


def common_dtypes(ev: Evidence) -> list[str]:
    """The dtypes at which every path of the candidate was run."""
    return [d for d in ev.case.dtypes if all(d in trace.meta["dtypes"] for trace in ev.candidates.values())]


def under_conditions(ev: Evidence, word: str, why: str) -> tuple[str, str]:
    """A pass under declared conditions says so, and is none in floating point where integers are among them."""
    said = {c for trace in ev.candidates.values() if (c := Conditions.of(trace.meta))}
    if word != "pass" or not said:
        return word, why
    names = ", ".join(sorted(map(str, said)))
    what = "weights to " if all(c == Conditions(c.integers) for c in said) else "as declared: "
    why += f"; the error is that of rounding {what}{names}, not that of floating point"
    return ("quantized" if any(c.quantized for c in said) else "pass"), why
