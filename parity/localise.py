"""Where an implementation first departs, and the probable cause, computed from the traces alone."""

from typing import Any

from parity.contract import tap_names
from parity.evidence import Evidence, Pair, position_ratios
from parity.tolerances import BOUNDS, LONG_SEQUENCE_TOKENS


def bound_of(tap: str) -> float:
    return BOUNDS["G3.logits" if tap == "logits" else "G3.taps"].value


def first_divergence(ev: Evidence) -> dict[str, Any] | None:
    """The first tap, in order of computation, whose error ratio is beyond its bound; fp32 is asked first."""
    for pair in sorted(ev.pairs(), key=lambda p: (p.dtype != "fp32", p.dtype)):
        candidate, reference = ev.candidate(pair), ev.reference(pair)
        for tap in tap_names(ev.oracle.n_layers):
            if tap in candidate.broken:
                return _describe(ev, pair, tap, None, None, None)
            if tap not in candidate.taps or tap not in reference.taps:
                continue
            rho, sequence = ev.rho(pair, tap)
            if not rho <= bound_of(tap):
                at, position = first_position(ev, pair, tap, sequence)
                return _describe(ev, pair, tap, at, position, rho)
    return None


def first_position(ev: Evidence, pair: Pair, tap: str, sequence: int | None) -> tuple[int, int]:
    """(sequence, position) where the error first exceeds the bound; the largest error's place when none does alone."""
    candidate, reference = ev.candidate(pair).taps[tap], ev.reference(pair).taps[tap]
    chosen = range(len(candidate.error)) if sequence is None else [sequence]
    for i in sorted(chosen, key=lambda i: candidate.error[i].numel() < LONG_SEQUENCE_TOKENS):
        beyond = ~(position_ratios(candidate, reference, pair.dtype, i) <= bound_of(tap))
        if beyond.any():
            return i, actual_position(ev, tap, i, int(beyond.nonzero()[0]))
    place = candidate.place
    assert place is not None
    return place.sequence, actual_position(ev, tap, place.sequence, place.index[0])


def actual_position(ev: Evidence, tap: str, sequence: int, row: int) -> int:
    """Taps of large checkpoints are kept at chosen positions only; logits at all."""
    return row if tap == "logits" or ev.case.positions is None else ev.case.positions[sequence][row]


def _describe(
    ev: Evidence, pair: Pair, tap: str, sequence: int | None, position: int | None, rho: float | None
) -> dict[str, Any]:
    layer = int(tap.split(".")[1]) if tap.startswith("layers.") else None
    place = ev.candidate(pair).taps[tap].place if tap in ev.candidate(pair).taps else None
    return {
        "tap": tap,
        "layer": layer,
        "position": position,
        "probable_cause": probable_cause(ev, pair, tap),
        "sequence": sequence,
        "rho": rho,
        "value": place.value if place else None,
        "expected": place.expected if place else None,
        "reference": pair.reference,
        "dtype": pair.dtype,
        "path": pair.path,
    }


CAUSES = {
    "embed": "embedding table or token ids",
    "attn_norm": "norm: eps, its weight, or where it is applied",
    "q": "q projection: its weight, or its rows in another RoPE layout (q/k rows not un-permuted)",
    "k": "k projection: its weight, or its rows in another RoPE layout",
    "v": "v projection",
    "q_rope": "RoPE: base, scaling, positions or precision of the table",
    "k_rope": "RoPE on k: base, scaling, positions",
    "attn_mix": "attention: mask, scale, softmax precision or the map of kv heads to query heads",
    "attn_out": "attention output projection",
    "ffn_norm": "residual after attention, or the feed-forward norm",
    "gate": "gate projection (gate and up swapped?)",
    "up": "up projection (gate and up swapped?)",
    "ffn_mix": "activation or product of gate and up",
    "ffn_out": "down projection",
    "out": "residual after the feed-forward",
    "final_norm": "final norm skipped, or a layer skipped before it",
    "logits": "output head: its weight or tying",
}


def probable_cause(ev: Evidence, pair: Pair, tap: str) -> str:
    """A cause in words from the first tap that departs."""
    if tap == "logits" and "final_norm" not in ev.candidate(pair).taps:
        return "the candidate has no taps(): only its logits can be judged"
    return CAUSES[tap.split(".")[-1]]


def rho_curve(ev: Evidence, pair: Pair) -> dict[str, float]:
    """The error ratio at every tap that both sides have, in order of computation."""
    return {tap: ev.rho(pair, tap)[0] for tap in ev.shared(pair)}
