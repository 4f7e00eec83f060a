"""The driver of a candidate that has tokens alone: the next token at some positions of each sequence, greedy text, and
the log-probabilities that it lists.

Greedy text is not enough: a model without RoPE scaling writes what the right one writes until the text is long.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from parity.candidates import answers
from parity.candidates.crash import Unasked, Wrong
from parity.candidates.interface import WAYS, Interface
from parity.contract import Case
from parity.run.recording import EXTRA_ROWS, Progress, Recording
from parity.trace import TraceWriter


def run_tokens(candidate: Interface, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> Recording:
    out = Recording(dtype)
    out.uncovered = {way.kind: "the candidate gives tokens and no logits" for way in WAYS if not way.bitwise}
    with out.count_seconds(), out.step("logits", "argmax", "G6"):
        out.answers = [_next_tokens(candidate, ids, case) for ids in case.prompts or []]
        out.done = True
        progress(f"{dtype} answers", 0.4)
    if out.done and "log_probs" in candidate.has:
        with out.count_seconds(), out.step("log_probs", "logits", "G3"):
            out.log_probs = [_log_probs(candidate, ids, case) for ids in case.prompts or []]
            if not any(out.log_probs):
                raise NotImplementedError("the candidate lists no log-probabilities")
            progress(f"{dtype} log-probabilities", 0.7)
    with out.count_seconds(), out.step("greedy", "greedy", "G6"):
        if out.done:
            out.generated = list(_texts(candidate, case))
    progress(f"{dtype} answers", 1.0)
    return out


def _next_tokens(candidate: Interface, ids: list[int], case: Case) -> dict[str, Any]:
    """Position -> the token after it, at some positions of one sequence: those that can be asked."""
    found = {}
    for p in _some_positions(ids):
        with suppress(Unasked):
            found[str(p)] = _ask_tokens(candidate, ids[: p + 1], 1, case)[0]
    return found


def _some_positions(ids: list[int]) -> list[int]:
    return torch.linspace(0, len(ids) - 1, min(EXTRA_ROWS, len(ids))).int().tolist()


def _log_probs(candidate: Interface, ids: list[int], case: Case) -> dict[str, dict[str, float]]:
    """Position -> id -> its log-probability there, of one sequence."""
    found = candidate.ask("log_probs", ids, _some_positions(ids))
    return answers.log_probs(found, candidate.row("log_probs").signature, len(ids), case.vocab_size)


def _texts(candidate: Interface, case: Case) -> Iterator[list[int]]:
    """The greedy text after each prompt; shorter where the candidate stops."""
    assert case.prompts is not None
    lengths = case.prompt_lengths or [len(p) for p in case.prompts]
    for ids, length in zip(case.prompts, lengths, strict=True):
        n = len(ids) - length
        try:
            yield _ask_tokens(candidate, ids[:length], n, case)[:n] if n else []
        except Unasked:
            yield []


def _ask_tokens(candidate: Interface, ids: list[int], n: int, case: Case) -> list[int]:
    asked = f"next_tokens({len(ids)} ids, {n})"
    found = answers.ids(candidate.ask("next_tokens", ids, n), asked, case.vocab_size)
    if not found or len(found) > n:
        raise Wrong(f"{asked} returned {len(found) or 'no'} token{'s' * (len(found) > 1)}")
    return found
