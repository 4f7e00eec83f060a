"""Gates on what must be equal exactly or nearly so before any forward pass: token ids, chat, config, weights, RoPE."""

from collections.abc import Iterator
from typing import Any

from parity.contract import Result, Status, judge
from parity.evidence import Evidence
from parity.tolerances import BOUNDS


def tokens(ev: Evidence) -> Iterator[Result]:
    """G0: token ids of the prompts (with BOS) and of the corpus (without), id for id."""
    yield from _equal_lists(ev, "tokens", ("token_ids", "corpus_ids"), "the candidate has no encode()")


def chat(ev: Evidence) -> Iterator[Result]:
    """G0: token ids of rendered dialogs."""
    yield from _equal_lists(ev, "chat", ("dialog_ids",), "the candidate has no encode_chat()")


def _equal_lists(ev: Evidence, check: str, keys: tuple[str, ...], lacking: str) -> Iterator[Result]:
    for path, trace in _first_candidate(ev):
        for name, reference in ev.references.items():
            labels: dict[str, Any] = {"reference": name, "path": path}
            pairs = [(k, trace.meta.get(k), reference.meta.get(k)) for k in keys if reference.meta.get(k)]
            compared = [
                (k, i, a, b)
                for k, mine, theirs in pairs
                if mine and theirs
                for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
            ]
            compared = [row for row in compared if row[3] is not None]
            if not compared:
                reason = f"not covered: {lacking if pairs else 'the reference has no tokenizer or template here'}"
                yield Result(check, "G0", Status.SKIP, required=False, reason=reason, **labels)
                continue
            wrong = [(k, i, a, b) for k, i, a, b in compared if a != b]
            where = _first_difference(ev, *wrong[0]) if wrong else None
            yield judge(
                len(wrong), 0, check=check, gate="G0", metric="texts that differ", unit="texts", where=where,
                reason=f"{len(compared)} texts", **labels,
            )  # fmt: skip


def _first_difference(ev: Evidence, key: str, i: int, mine: list[int], theirs: list[int]) -> str:
    at = next((j for j, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    texts = {"token_ids": ev.case.texts, "corpus_ids": ev.case.corpus, "dialog_ids": ev.case.dialogs}[key] or []
    return f"{key[:-4]} {i}, id {at}: {mine[at : at + 3]} for {theirs[at : at + 3]} in {str(texts[i])[:60]!r}"


def _first_candidate(ev: Evidence) -> list[tuple[str | None, Any]]:
    """Paths of one candidate share tokenizer, config and weights: judge them once."""
    return list(ev.candidates.items())[:1]


def config(ev: Evidence) -> Iterator[Result]:
    """G0: the configuration that the candidate read is the one that the reference read, key by key."""
    for path, trace in _first_candidate(ev):
        for name, reference in ev.references.items():
            mine, theirs = trace.meta.get("config"), reference.meta["config"]
            labels: dict[str, Any] = {"reference": name, "path": path}
            if not mine:
                reason = "not covered: the candidate has no config()"
                yield Result("config", "G0", Status.SKIP, required=False, reason=reason, **labels)
                continue
            wrong = [k for k in theirs if mine.get(k) != theirs[k]]
            where = "; ".join(f"{k}: {mine.get(k)} for {theirs[k]}" for k in wrong) or None
            yield judge(len(wrong), 0, check="config", gate="G0", metric="keys", unit="keys", where=where, **labels)


def weights(ev: Evidence) -> Iterator[Result]:
    """G0: the same tensors by name, shape and checksum, read by two readers that share no code."""
    for path, trace in _first_candidate(ev):
        for name, reference in ev.references.items():
            mine, theirs = trace.meta.get("weights"), reference.meta.get("weights")
            labels: dict[str, Any] = {"reference": name, "path": path}
            if not mine or not theirs:
                reason = "not covered: the candidate has no weights()" if theirs else "the reference hashed no weights"
                yield Result("weights", "G0", Status.SKIP, required=False, reason=reason, **labels)
                continue
            names = sorted(set(mine) | set(theirs))
            wrong = [n for n in names if _hash(mine.get(n)) != _hash(theirs.get(n))]
            where = f"{wrong[0]}: {_hash(mine.get(wrong[0]))} for {_hash(theirs.get(wrong[0]))}" if wrong else None
            yield judge(
                len(wrong), 0, check="weights", gate="G0", metric="tensors that differ", unit="tensors", where=where,
                reason=f"{len(names)} tensors", **labels,
            )  # fmt: skip


def _hash(entry: dict[str, Any] | None) -> tuple[Any, ...] | None:
    return None if entry is None else (tuple(entry["shape"]), entry["crc32"])


def rope(ev: Evidence) -> Iterator[Result]:
    """G1: float32 cos and sin at short positions and far ones, in ulp of 1.0 (2**-24 below 1)."""
    for path, trace in _first_candidate(ev):
        for name, reference in ev.references.items():
            mine, theirs = trace.rope(), reference.rope()
            labels: dict[str, Any] = {"reference": name, "path": path}
            if not mine or not theirs:
                reason = "not covered: the candidate has no rope()"
                yield Result("rope", "G1", Status.SKIP, required=False, reason=reason, **labels)
                continue
            worst, where = 0.0, None
            for table in ("cos", "sin"):
                error = (mine[table].double() - theirs[table].double()).abs()
                at = int(error.argmax())
                if not float(error.max()) <= worst:
                    row, column = divmod(at, error.shape[1])
                    worst = float(error.max())
                    where = f"{table}, position {ev.case.rope_positions[row]}, pair {column}"
            yield judge(
                worst / 2.0**-23, BOUNDS["G1"].value, check="rope", gate="G1", metric="max |difference|",
                unit="ulp of 1.0", where=where, **labels,
            )  # fmt: skip
