"""Where an implementation first departs, and the probable cause, computed from the traces alone.

Twice: free-running, the first tap whose error ratio is beyond its bound; then teacher-forced, the operations that are
wrong on the reference's own inputs. Where the plain forward pass is right, cache, batches and packed rows are asked.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from parity.checks.ops import first_wrong, measure_ops
from parity.explain.causes import View, guess, probable_cause, signature
from parity.explain.explained import Explained
from parity.measure.evidence import Evidence, Pair, position_ratios
from parity.measure.metrics import TapError
from parity.measure.tolerances import BOUNDS, LONG_SEQUENCE_TOKENS
from parity.report.model import Divergence
from parity.trace import Trace
from reference.protocol import tap_names

KINDS = ("cached", "chunked", "batch", "packed", "compiled")
COARSE = 0.01  # relative error of logits: less is what a cache in 16 bits makes; mistakes of slots made 0.02 to 0.4
SMALL = 0.1  # less may be a cache in 8 bits


def bound_of(tap: str) -> float:
    return BOUNDS["G3.logits" if tap == "logits" else "G3.taps"].value


def first_divergence(ev: Evidence) -> Divergence | None:
    """The first tap, in order of computation, that departs; fp32 is asked first. None where no tap does."""
    pairs = sorted(ev.pairs(), key=lambda p: (p.dtype != "fp32", p.dtype))
    for stage in (_free_running, _teacher_forced, _other_ways, _not_repeatable):
        for pair in pairs:
            found = stage(ev, pair)
            if found is not None:
                return found
    return None


# --- Free-running ----------------------------------------------------------------------------------------------------


def _free_running(ev: Evidence, pair: Pair) -> Divergence | None:
    candidate, reference = ev.candidate(pair), ev.noise_floor(pair)
    for tap in tap_names(ev.oracle.n_layers):
        if tap in candidate.broken:
            why = f"{candidate.broken[tap]}; {cause(ev, pair, tap, None)[0]}"
            return describe(ev, pair, tap, why)
        if tap not in candidate.taps or tap not in reference.taps:
            continue
        rho, sequence = ev.rho(pair, tap)
        if not rho <= bound_of(tap):
            at, position = first_position(ev, pair, tap, sequence)
            why, named = cause(ev, pair, tap, at)
            return describe(ev, pair, tap, why, at, position, rho, named)
    return None


def first_position(ev: Evidence, pair: Pair, tap: str, sequence: int | None) -> tuple[int, int]:
    """(sequence, position) where the error first exceeds the bound; the largest error's place when none does alone."""
    candidate, reference = ev.candidate(pair).taps[tap], ev.noise_floor(pair).taps[tap]
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


def describe(
    ev: Evidence,
    pair: Pair,
    tap: str,
    why: str,
    sequence: int | None = None,
    position: int | None = None,
    rho: float | None = None,
    named: bool = True,
) -> Divergence:
    """`named`: whether the table of mistakes (parity/explain/ask.py) has nothing to add."""
    place = ev.candidate(pair).taps[tap].place if tap in ev.candidate(pair).taps else None
    return Divergence(
        tap,
        pair.reference,
        pair.dtype,
        why,
        pair.path,
        sequence,
        position,
        rho,
        value=place.value if place else None,
        expected=place.expected if place else None,
        operations=wrong_operations(ev, pair),
        named=named,
        explained=explained_at(ev, pair, tap),
    )


# What a departure at a tap is about, where no signature fits.
ABOUT = {
    "embed": "the embedding table or the token ids",
    "attn_norm": "the norm before attention: eps, its weight, or where it is applied",
    "q": "the q projection: its weight, or its rows in another RoPE layout",
    "k": "the k projection: its weight, or its rows in another RoPE layout",
    "v": "the v projection",
    "q_rope": "RoPE: base, scaling, positions or precision of the table",
    "k_rope": "RoPE on k: base, scaling, positions or precision of the table",
    "attn_mix": "attention: mask, scale, softmax precision or the map of kv heads to query heads",
    "attn_out": "the attention's output projection",
    "ffn_norm": "the residual after attention, or the feed-forward norm",
    "gate": "the gate projection",
    "up": "the up projection",
    "ffn_mix": "the activation, or the product of gate and up",
    "ffn_out": "the down projection",
    "out": "the residual after the feed-forward",
    "final_norm": "the final norm, or a layer skipped before it",
    "logits": "the output head: its weight or tying",
}


NO_TAPS = "the candidate has no taps(): only its logits can be judged"


def explained_at(ev: Evidence, pair: Pair, tap: str) -> Explained | None:
    """What the table of mistakes said, if it was asked about this tap."""
    found = ev.explained
    fits = found is not None and (found.tap, found.dtype, found.path) == (tap, pair.dtype, pair.path)
    return found if fits else None


def cause(ev: Evidence, pair: Pair, tap: str, sequence: int | None) -> tuple[str, bool]:
    """In words: the signature that fits, else what the table of mistakes says, else what the tap is about; and what
    its pattern says. And whether it is a signature."""
    measured = ev.candidate(pair)
    explained = explained_at(ev, pair, tap)
    if tap == "logits" and "final_norm" not in measured.taps:
        return "; ".join([*([str(explained)] if explained else []), NO_TAPS]), False
    trace, about = ev.candidates[pair.path], ABOUT[tap.split(".")[-1]]
    named, guessed = None, None
    if sequence is not None:
        positions = ev.case.positions[sequence] if ev.case.positions and tap != "logits" else None
        view = View(trace, ev.oracle, trace, pair.dtype, sequence, positions)
        named = signature(view, tap)
        guessed = None if named or (explained and explained.told) else guess(view, tap)
    words = named or guessed or (str(explained) if explained and explained.told else about)
    if explained and not explained.told:
        words += f"; {explained}"
    return "; ".join([words, *_patterns(ev, pair, tap, sequence)]), named is not None


def _patterns(ev: Evidence, pair: Pair, tap: str, sequence: int | None) -> Iterator[str]:
    """Which positions are wrong, which layers have no taps, and which operations are wrong by themselves."""
    measured = ev.candidate(pair)
    if sequence is not None and tap in measured.taps:
        ratios = position_ratios(measured.taps[tap], ev.noise_floor(pair).taps[tap], pair.dtype, sequence)
        wrong = ~(ratios <= bound_of(tap))
        if len(wrong) > 2 and not wrong[0] and wrong[1:].float().mean() > 0.5:
            yield "position 0 is right, later ones are not"
        elif len(wrong) > 2 and wrong[-1] and wrong[:-1].sum() == 0:
            yield "only the last position is wrong"
    layers = {t.split(".")[1] for t in measured.missing if t.startswith("layers.")}
    if layers and len(layers) < ev.oracle.n_layers:
        yield f"layer {', '.join(sorted(layers, key=int))} has no taps: is it skipped?"
    alone = wrong_operations(ev, pair)
    if alone is not None and not alone:
        yield "every operation is right on the reference's own inputs: look at how they are put together"


def wrong_operations(ev: Evidence, pair: Pair) -> list[str] | None:
    """The operations beyond G2 on the reference's own inputs; None where that was not measured."""
    found = measure_ops(ev, pair)
    if found is None:
        return None
    return [tap for tap, rho in found.ratios.items() if not rho <= BOUNDS["G2"].value]


# --- Teacher-forced --------------------------------------------------------------------------------------------------


def _teacher_forced(ev: Evidence, pair: Pair) -> Divergence | None:
    """An operation that is wrong by itself, though its error drowns in that of the whole pass."""
    found = measure_ops(ev, pair)
    tap = first_wrong(found) if found else None
    if found is None or tap is None:
        return None
    oracle, given = ev.ops[pair.reference], ev.forced[pair.reference]
    mine = Trace(ev.candidates[pair.path].folder / "ops" / pair.reference)
    longest = max(range(len(given.sequences)), key=lambda i: len(given.sequences[i]))
    named = probable_cause(View(mine, oracle, given, pair.dtype, longest, None), tap)
    why = f"{named or ABOUT[tap.split('.')[-1]]}; seen on the reference's own inputs, hidden in the whole pass"
    return describe(ev, pair, tap, why, longest, None, found.ratios[tap])


# --- Cache, batches, packed rows -------------------------------------------------------------------------------------


def _other_ways(ev: Evidence, pair: Pair) -> Divergence | None:
    """The forward pass is right: the first other way to the same logits that is not."""
    wrong = {
        kind: worst for kind in KINDS if (worst := _worst_extra(ev, pair, kind)) and not worst[0] <= bound_of("logits")
    }
    if not wrong:
        return None
    # Where chunks alone are wrong, they are what departs; a cache that is wrong shows in both.
    kind = next(iter(wrong))
    rho, sequence, error = wrong[kind]
    positions = ev.candidates[pair.path].meta["extra"][pair.dtype][kind][str(sequence)]
    row = _first_row(ev, pair, error, sequence, positions)
    place = error.place
    why, tap = _way_cause(set(wrong), kind, error, row), f"logits@{kind}"
    explained = explained_at(ev, pair, tap)
    why = f"{explained}; {why}" if explained and explained.told else why
    found = describe(ev, pair, tap, why, sequence, positions[row], rho, named=kind != "cached")
    return replace(found, value=place.value if place else None, expected=place.expected if place else None)


def _worst_extra(ev: Evidence, pair: Pair, kind: str) -> tuple[float, int, TapError] | None:
    found = ev.worst_extra(pair, kind)
    return None if found is None else (*found, ev.error_at(pair.path, pair.dtype, kind, found[1]))


def _first_row(ev: Evidence, pair: Pair, error: TapError, sequence: int, positions: list[int]) -> int:
    """The first row whose error is beyond the noise of all rows."""
    floor = ev.noise_at(pair, {sequence: positions})
    rows = (error.error[0] / error.width).sqrt() / floor if floor > 0 else error.error[0]
    beyond = (~(rows <= bound_of("logits"))).nonzero()
    return int(beyond[0]) if len(beyond) else int(torch.nan_to_num(rows, nan=torch.inf).argmax())


def _way_cause(wrong: set[str], kind: str, error: TapError, row: int) -> str:
    if kind == "batch":
        return "a row's result depends on the other rows of its batch"
    if kind == "packed":
        return "packed documents see each other, or their positions do not restart: document mask"
    if kind == "compiled":
        return "the compiled model computes something else than the eager one"
    if kind == "chunked":
        return "tokens are right one by one and wrong in chunks: the mask where there are fewer queries than keys"
    relative = error.rms() / max(error.rms_expected(), 1e-300)
    if relative < COARSE:
        return "prefill + decode is slightly off: the cache is kept in a lower precision than the model computes in"
    if relative < SMALL:
        return f"prefill + decode is off by {relative:.1%}: the cache is in 8 bits, or its slots or positions are off"
    if row > 0 and "chunked" not in wrong:
        return "decoding starts right and goes wrong later: live tokens leave the cache, or slots are reused"
    return "decoding departs from the full pass: its position, the cache's slots or the cache's content"


def _not_repeatable(ev: Evidence, pair: Pair) -> Divergence | None:
    relations = ev.candidates[pair.path].meta.get("self", {}).get(pair.dtype, {})
    for name, difference in relations.items():
        if difference != 0:
            why = f"two runs that must be equal bit for bit are not ({name}): state or chance between calls"
            return describe(ev, pair, "logits", why)
    return None
