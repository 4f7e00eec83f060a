"""Public implementations of Llama, judged one by one: right code passes, wrong code fails and is explained.

    python -m parity.peers --only transformers-sdpa,llama.cpp-f32
    python -m parity.peers --clones ~/clones --json benchmarks/results/peers.json --markdown docs/peers.md
    python -m parity.peers --list

With --json, rows of earlier runs stay in the file; --markdown shows all of them. Exit code 1 where a peer with no
known finding fails, or one that has one passes: the table is then to be looked at.
"""

import json as jsonlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nanollama.cli import execute
from parity.contract import UsageError
from parity.machine import cache_folder, workspace
from parity.peers import page
from parity.peers.registry import PEERS, Peer
from parity.peers.run import Row, chosen, run


def unexpected(peer: Peer, row: Row) -> str | None:
    """What makes a row news."""
    failed = "fail" in (row.verdicts or {}).values()
    if row.verdicts and failed != bool(peer.finding):
        return f"{peer.name} {'fails, and nothing is known to be wrong with it' if failed else 'passes'}"
    return None


def main(argv: list[str] | None = None) -> int:
    return execute(judge_peers, argv, prog="python -m parity.peers", doc=__doc__, errors=())


def judge_peers(
    *,
    only: str | None = None,  # comma list of rows (default: all)
    clones: Path | None = None,  # folder where the public repositories are cloned; without: their rows are skipped
    envs: Path | None = None,  # folder of environments (default: in the cache folder)
    json: Path | None = None,  # keep the rows here
    markdown: Path | None = None,  # write the table
    list: bool = False,  # print the rows and stop
) -> int:
    """Judge the peers one by one, print the table, and say by the exit code whether a row is news."""
    peers = chosen(only, PEERS)
    if list:
        print("\n".join(f"{p.name:20} {p.of}{f' (clone of {p.clone})' if p.clone else ''}" for p in peers))
        return 0
    rows: dict[str, Any] = read(json) if json and json.is_file() else {}
    news = []
    with ExitStack() as stack:
        folder = stack.enter_context(workspace())
        for peer in peers:
            print(f"{peer.name} ...", file=sys.stderr, flush=True)
            row = run(peer, folder, envs or cache_folder() / "peers", clones)
            rows[peer.name] = row.as_json()
            news += [said] if (said := unexpected(peer, row)) else []
            if json:
                json.write_text(jsonlib.dumps({"schema": "nanollama.peers/1", "rows": rows}, indent=1) + "\n")
    print(page.text(rows, peers))
    if markdown:
        markdown.write_text(page.markdown(rows, environment()))
    print("\n".join(news), end="\n" if news else "")
    return 1 if news else 0


def read(path: Path) -> dict[str, Any]:
    """The rows of an earlier run. Raises UsageError for another file."""
    found = jsonlib.loads(path.read_text())
    if not isinstance(found, dict) or found.get("schema") != "nanollama.peers/1":
        raise UsageError(f"--json {path}: is no table of this command's; give another path")
    rows: dict[str, Any] = found["rows"]
    return rows


def environment() -> str:
    from parity.machine import environment as versions

    found = versions(1, "cpu")
    return f"torch {found['torch']}, transformers {found['transformers']}, Python {found['python']}, CPU, one thread"


if __name__ == "__main__":
    sys.exit(main())
