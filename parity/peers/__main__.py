"""Public implementations of Llama, judged one by one: right code passes, wrong code fails and is explained.

    python -m parity.peers --only transformers-sdpa,llama.cpp-f32
    python -m parity.peers --clones ~/clones --json benchmarks/results/peers.json --markdown docs/peers.md
    python -m parity.peers --list

With --json, rows of earlier runs stay in the file; --markdown shows all of them. Exit code 1 where a peer with no
known finding fails, or one that has one passes: the table is then to be looked at.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from parity.cli import Parser
from parity.contract import UsageError
from parity.machine import cache_folder, workspace
from parity.peers.page import markdown, text
from parity.peers.registry import PEERS, Peer
from parity.peers.run import Row, chosen, run


def unexpected(peer: Peer, row: Row) -> str | None:
    """What makes a row news."""
    failed = "fail" in (row.verdicts or {}).values()
    if row.verdicts and failed != bool(peer.finding):
        return f"{peer.name} {'fails, and nothing is known to be wrong with it' if failed else 'passes'}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m parity.peers", __doc__)
    parser.add_argument("--only", metavar="LIST", help="comma list of rows (default: all)")
    parser.add_argument("--clones", type=Path, metavar="FOLDER", help="where the public repositories are cloned")
    parser.add_argument("--envs", type=Path, metavar="FOLDER", help="of environments (default: in the cache folder)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="keep the rows here")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    return parser.run(_main, argv)


def _main(args: argparse.Namespace) -> int:
    peers = chosen(args.only, PEERS)
    if args.list:
        print("\n".join(f"{p.name:20} {p.of}{f' (clone of {p.clone})' if p.clone else ''}" for p in peers))
        return 0
    rows: dict[str, Any] = read(args.json) if args.json and args.json.is_file() else {}
    news = []
    with ExitStack() as stack:
        folder = stack.enter_context(workspace())
        for peer in peers:
            print(f"{peer.name} ...", file=sys.stderr, flush=True)
            row = run(peer, folder, args.envs or cache_folder() / "peers", args.clones)
            rows[peer.name] = row.as_json()
            news += [said] if (said := unexpected(peer, row)) else []
            if args.json:
                args.json.write_text(json.dumps({"schema": "nanollama.peers/1", "rows": rows}, indent=1) + "\n")
    print(text(rows, peers))
    if args.markdown:
        args.markdown.write_text(markdown(rows, environment()))
    print("\n".join(news), end="\n" if news else "")
    return 1 if news else 0


def read(path: Path) -> dict[str, Any]:
    """The rows of an earlier run. Raises UsageError for another file."""
    found = json.loads(path.read_text())
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
