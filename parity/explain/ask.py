"""The name of a mistake, where the signatures of causes.py have none: the oracle is asked with each of a table of them.

The first tap that departs (the logits, of a candidate without taps) of one sequence goes to
reference/mistakes/explain.py, which runs its float64 forward pass once for each mistake: the one that takes the error
away is named, with the share that it explains. Nothing is named that explains less than 90%.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file

from parity.candidates.conditions import Conditions
from parity.explain.explained import NAMED, Explained, of_size
from parity.explain.localise import first_divergence
from parity.measure.evidence import Evidence, Pair
from parity.run.jobs import NO_IDENTITY
from parity.run.runner import Runner

TOKENS = 128  # of the sequence are run, more where it departs later
BEHIND = 64  # tokens are run behind the first wrong position at least
ROWS = 64  # positions of logits that are compared, half of them from the first wrong one on
SHORT = 16  # tokens of a sequence: fewer tell mistakes apart badly
SECONDS = 60  # no mistake is begun after so long


def explain(ev: Evidence, runner: Runner) -> Evidence:
    """The evidence with an explanation of its first divergence, where that has no name yet and can be asked about."""
    first = first_divergence(ev)
    if first is None or first.named or first.position is None or runner.plan.large or ev.case.positions is not None:
        return ev
    assert first.sequence is not None
    pair, sequence, tap = Pair(first.reference, first.dtype, first.path), first.sequence, first.tap
    if tap == "logits" and first.position == 0:
        sequence = shortest(ev.oracle.sequences)
    trace = ev.candidates[pair.path]
    tokens = ev.oracle.sequences[sequence]
    if "@" in tap:
        places = trace.meta["extra"][pair.dtype][tap.split("@")[1]][str(sequence)]
        value, rows = trace.get(pair.dtype, sequence, tap), torch.tensor(places)
    else:
        tokens = tokens[: max(TOKENS, first.position + BEHIND)]
        rows = chosen_rows(len(tokens), first.position) if tap == "logits" else torch.arange(len(tokens))
        value = trace.get(pair.dtype, sequence, tap)[rows]
    if not torch.isfinite(value).all():
        return ev
    asked = runner.folder / "value-to-explain.safetensors"  # not in the folder of the answer, which the cache may fill
    save_file({"value": value.contiguous(), "rows": rows}, asked)
    case = replace(ev.case, prompts=[tokens], dtypes=[pair.dtype], training=None, **NO_IDENTITY)
    flags = ("--of", str(asked), "--tap", tap.split("@")[0], "--seconds", str(SECONDS))
    out = runner.run_aside("explain", "mistakes.explain", case, (*flags, *Conditions.of(trace.meta).flags))
    if out is None:
        return ev
    return replace(ev, explained=read(ev, pair, tap, json.loads((out / "explained.json").read_text())))


def shortest(sequences: list[list[int]]) -> int:
    """Where the first token's logits are wrong all depart; one that is run whole shows tokens seen ahead, too."""
    return min(range(len(sequences)), key=lambda i: (len(sequences[i]) < SHORT, len(sequences[i])))


def chosen_rows(tokens: int, position: int) -> torch.Tensor:
    """ROWS positions, half of them spread over all, half from the first wrong one on."""
    spread = [torch.linspace(start, tokens - 1, ROWS // 2).long() for start in (0, position)]
    return torch.cat(spread).unique()


def read(ev: Evidence, pair: Pair, tap: str, answer: dict[str, Any]) -> Explained:
    found = [(name, part) for name, part in answer["found"]]
    size = None
    if not found or found[0][1] < NAMED:
        size = of_size(answer["error"], sizes(ev, pair, tap, answer["sizes"]))
    return Explained(tap, pair.dtype, pair.path, found, size, answer["tokens"], answer["asked"], answer["of"])


def sizes(
    ev: Evidence, pair: Pair, tap: str, rounded: dict[str, dict[str, float]]
) -> dict[str, tuple[float, str, float]]:
    """The error that computing in bf16 and fp16 makes, the references' where they ran so, else the oracle's; whose it
    is; and how alike (a correlation) the candidate's error and the oracle's are."""
    known = {dtype: (size["rms"], "that of a forward pass", size["alike"]) for dtype, size in rounded.items()}
    for dtype in ev.case.dtypes:
        errors = [ev.measured(trace, dtype).taps.get(tap) for trace in ev.references.values()]
        if dtype in known and all(error is not None for error in errors):
            least = min(e.rms() for e in errors if e is not None)
            known[dtype] = (least, "the references'", known[dtype][2])
    return {dtype: size for dtype, size in known.items() if dtype != pair.dtype}
