"""Gates on what must be equal exactly or nearly so before any forward pass: token ids, chat, config, weights, RoPE.

A checkpoint may bring several tokenizers (tokenizer.model, tokenizer.json) and chat formats that disagree. That is a
finding about the checkpoint (`disagreements`). A candidate that follows one of them in every text is not blamed where a
reference follows another: that reference does not judge it, and the report says which file it follows.
"""

from collections.abc import Iterator
from typing import Any

from parity.candidates.interface import lacking
from parity.contract import Result, Status, judge
from parity.measure import rope_table
from parity.measure.evidence import Evidence
from parity.measure.tolerances import BOUNDS

KEYS = {"tokens": ("token_ids", "corpus_ids"), "chat": ("dialog_ids",)}
Row = tuple[str, int, list[int], list[int]]  # list of a trace, index of the text, the candidate's ids, another's


def tokens(ev: Evidence) -> Iterator[Result]:
    """G0: token ids of the prompts (with BOS) and of the corpus (without), id for id."""
    yield from _equal_lists(ev, "tokens", "encode")
    for path, trace in _first_candidate(ev):
        for method, key in (("encode", "token_ids"), ("encode_plain", "corpus_ids")):
            judged = any(trace.meta.get(k) for k in KEYS["tokens"])  # by the other one's ids
            if judged and not trace.meta.get(key) and method in trace.meta.get("lacking", {}):
                reason = f"not covered: {lacking(trace.meta, method)}"
                yield Result("tokens", "G0", Status.SKIP, required=False, path=path, reason=reason)


def chat(ev: Evidence) -> Iterator[Result]:
    """G0: token ids of rendered dialogs."""
    yield from _equal_lists(ev, "chat", "encode_chat")


def _equal_lists(ev: Evidence, check: str, method: str) -> Iterator[Result]:
    for path, trace in _first_candidate(ev):
        for name, reference in ev.references.items():
            labels: dict[str, Any] = {"check": check, "gate": "G0", "reference": name, "path": path}
            compared = _compared(check, trace.meta, reference.meta)
            if not compared:
                theirs = any(reference.meta.get(key) for key in KEYS[check])
                nothing = reference.meta.get("untexted") or NOTHING[check].format(name)
                reason = lacking(trace.meta, method) if theirs else nothing
                yield Result(status=Status.SKIP, required=False, reason=f"not covered: {reason}", **labels)
                continue
            wrong, reason = _differing(compared), f"{len(compared)} texts"
            if wrong and _as_text(check, trace.meta, reference.meta):
                wrong, reason = [], f"{reason}; special tokens' names in messages are text to the candidate"
            where = _first_difference(ev, *wrong[0]) if wrong else None
            labels |= {"metric": "texts that differ", "unit": "texts", "where": where}
            if wrong and (file := _followed(ev, check, trace.meta)):
                own = reference.meta["readings"][0][check]
                reason = f"the candidate follows {file} in every text, this reference {own}: the two disagree"
                yield Result(status=Status.SKIP, required=False, value=len(wrong), bound=0, reason=reason, **labels)
                continue
            yield judge(len(wrong), 0, reason=reason, **labels)


NOTHING = {
    "tokens": "the {} reference has no tokenizer here",
    "chat": "the {} reference has no chat template or format here",
}


def _compared(check: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[Row]:
    """The texts of which both have ids."""
    return [
        (key, i, a, b)
        for key in KEYS[check]
        if mine.get(key) and theirs.get(key)
        for i, (a, b) in enumerate(zip(mine[key], theirs[key], strict=True))
        if a is not None and b is not None
    ]


def _differing(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row[2] != row[3]]


def _as_text(check: str, mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the candidate has the ids of the reference's other reading of the same file: with messages as text."""
    own, *others = theirs.get("readings") or [{}]
    same = [_compared(check, mine, one) for one in others if one["tokens"] == own["tokens"]]
    return any(rows and not _differing(rows) for rows in same)


def _followed(ev: Evidence, check: str, mine: dict[str, Any]) -> str | None:
    """Which of the checkpoint's files, as some reference reads it, gives the candidate's ids of all texts."""
    for name, found in readings(ev, check).items():
        rows = _compared(check, mine, found)
        if len(rows) == len(_compared(check, mine, mine)) and not _differing(rows):
            return name
    return None


def readings(ev: Evidence, check: str, first: int = 0) -> dict[str, dict[str, Any]]:
    """The ids of the case's texts by each of the checkpoint's files that has any, by what it is called.

    first: of each reference's readings; 1 leaves out its own of dialogs, where it has one with messages as text.
    """
    known = [trace.meta.get("readings", []) for trace in (*ev.references.values(), *ev.witnesses)]
    found = {one[check]: one for several in known for one in several[first:] or several[:1]}
    return {name: one for name, one in found.items() if any(one.get(key) for key in KEYS[check])}


def disagreements(ev: Evidence) -> list[str]:
    """Findings about the checkpoint: its files give different ids for the same texts."""
    return [line for check in KEYS for line in _disagreements(ev, check)]


def _disagreements(ev: Evidence, check: str) -> Iterator[str]:
    what = {"tokens": "tokenizers disagree", "chat": "chat formats disagree"}[check]
    (first, base), *others = list(readings(ev, check, 1).items()) or [("", {})]
    told: list[dict[str, Any]] = []
    for name, other in others:
        rows, again = _compared(check, base, other), any(not _differing(_compared(check, o, other)) for o in told)
        if (wrong := _differing(rows)) and not again:
            told.append(other)
            number = f"{len(wrong)} of {len(rows)} {'texts' if check == 'tokens' else 'dialogs'}"
            place = _first_difference(ev, *wrong[0])
            yield f"the checkpoint's {what}: {first} and {name} give different ids for {number}, first at {place}"


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
                reason = f"not covered: {lacking(trace.meta, 'config')}"
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
                why = lacking(trace.meta, "weights") if theirs else "the reference hashed no weights"
                reason = f"not covered: {why}"
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
    """G1: cos and sin at short positions and far ones, near the reference's or exact ones as float32 can be."""
    for path, trace in _first_candidate(ev):
        for name, reference in ev.references.items():
            mine, theirs = trace.rope(), reference.rope()
            labels: dict[str, Any] = {"reference": name, "path": path}
            if not mine or not theirs:
                reason = f"not covered: {lacking(trace.meta, 'rope') if theirs else 'the reference has no RoPE table'}"
                yield Result("rope", "G1", Status.SKIP, required=False, reason=reason, **labels)
                continue
            config, positions = ev.oracle.meta["config"], ev.case.rope_positions
            if wrong := [t for t in ("cos", "sin") if mine[t].shape != theirs[t].shape]:
                reason = f"{wrong[0]} has shape {tuple(mine[wrong[0]].shape)}: expected {tuple(theirs[wrong[0]].shape)}"
                yield Result("rope", "G1", Status.FAIL, reason=reason, where=wrong[0], **labels)
                continue
            found = rope_table.worst(mine, theirs, config, positions)
            where = f"{found.table}, position {positions[found.row]}, pair {found.pair}: {found.ulp:.3g} ulp of 1.0"
            beyond = not found.share <= BOUNDS["G1"].value
            yield judge(
                found.share, BOUNDS["G1"].value, check="rope", gate="G1", metric="max |difference|",
                unit=BOUNDS["G1"].unit, where=where if found.share != 0 else None,
                reason=rope_table.cause(mine, config, positions) if beyond else None, **labels,
            )  # fmt: skip
