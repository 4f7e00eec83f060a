"""The rows of `python -m parity.peers` as text and as docs/peers.md."""

from typing import Any

from nanollama.printable import printable_all
from parity.peers.registry import PEERS, Peer
from parity.report.terminal import number, table

HEAD = ("peer", "version", "fp32", "bf16", "rho of logits", "KL mean, nats", "what the harness says", "conditions")


def text(rows: dict[str, dict[str, Any]], peers: list[Peer]) -> str:
    """For the terminal."""
    rows = printable_all(rows)
    lines = [HEAD[:6], *(_figures(peer, rows[peer.name]) for peer in peers if peer.name in rows)]
    return "\n".join([*table(lines), *(f"{p.name}: {rows[p.name]['why']}" for p in peers if rows[p.name]["why"])])


def _figures(peer: Peer, row: dict[str, Any]) -> tuple[str, ...]:
    verdicts = row["verdicts"] or {}
    words = (verdicts.get(dtype, "-" if verdicts else "not run").upper() for dtype in ("fp32", "bf16"))
    rho, kl = (", ".join(number(v) for v in (row[key] or {}).values()) for key in ("rho", "kl"))
    return (peer.name, row["version"] or "-", *words, rho or "-", kl or "-")


def markdown(rows: dict[str, dict[str, Any]], environment: str) -> str:
    """The whole page docs/peers.md."""
    known = [peer for peer in PEERS if peer.name in rows]
    parts = [
        "# Public implementations, judged",
        "",
        "Made by `python -m parity.peers --json benchmarks/results/peers.json --markdown docs/peers.md`; do not edit. "
        "Each row is a wrapper of at most 60 lines under `parity/peers/` or, where it says *no wrapper*, the "
        "project's own file as `--candidate torch:FILE.py:Class`, with not a line written; judged by `parity.check` "
        "on a seeded checkpoint (4 layers, dim 128, 8 heads, 2 kv heads) whose shape is that of Llama 2, 3, 3.1 or "
        "3.2, against Meta's code and transformers. *rho* is the error of the logits by that of the references, at "
        "most 2; *KL* is "
        "from the float64 oracle. fp32 stands before bf16 where both were run.",
        "",
        f"{environment}. What needs packages gets an environment of its own, made by the command; what is no "
        "package needs a clone in `--clones FOLDER`. `python -m parity.peers --only NAME` repeats a row.",
        "",
        *_grid([HEAD, *(_cells(peer, rows[peer.name]) for peer in known)]),
        "",
        "## What is wrong, and how to see it without the harness",
        "",
        "`x-hf` is any folder of Llama 3.1's shape, `x.gguf` the same as GGUF: "
        "`python -m parity.synth --format hf --out x-hf`, `python -m nanollama convert x-hf x.gguf --format gguf`.",
        "",
    ]
    for peer in known:
        if "fail" in (rows[peer.name]["verdicts"] or {}).values():
            parts += _failure(peer, rows[peer.name])
    return "\n".join(parts).rstrip() + "\n"


def _cells(peer: Peer, row: dict[str, Any]) -> tuple[str, ...]:
    name, *figures = _figures(peer, row)
    said = row["cause"] or row["why"] or "; ".join(row["notices"]) or "-"
    return (f"`{name}`: {peer.of}", *figures, said, peer.conditions or "-")


def _failure(peer: Peer, row: dict[str, Any]) -> list[str]:
    said = peer.finding or "Not explained yet"
    lines = [f"### {peer.of}, {row['version']}", "", f"{said}.", ""]
    return [*lines, "```python", *peer.repeat.strip().splitlines(), "```", ""] if peer.repeat else lines


def _grid(rows: list[tuple[str, ...]]) -> list[str]:
    whole = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in whole]
