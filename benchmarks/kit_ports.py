"""Ports in other languages against every kit: each passes, and each planted mistake fails at the tap where it is made.

    python -m parity.kit --set kits
    python -m benchmarks.kit_ports --kits kits --json benchmarks/results/kit_ports.json --table ports.md
    c            llama2     PASS  eps bf16 pairing document swapped
    ...
    5 ports, 6 kits: 30 of 30 pass, 203 of 203 planted mistakes fail at their tap, by themselves and by the check

A port is a file of tests/ports that takes KIT OUT [MISTAKE], judges itself (exit code 0 or 1, its last line says the
first array beyond its bound) and writes OUT/NAME.f32, which `parity.kit --check` judges again.
"""

import json as json_
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollama.cli import run
from parity.kit.arrays import Kit
from parity.kit.check import report

SOURCES = Path(__file__).parents[1] / "tests" / "ports"
Config = dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    tap: str  # or array: the first that must fail
    applies: Callable[[Kit], bool] = lambda kit: True


def heads_in_groups(kit: Kit) -> bool:
    config = kit.table["config"]
    return bool(1 < config["n_kv_heads"] < config["n_heads"])


MISTAKES: dict[str, Mistake] = {
    "eps": Mistake("layers.0.attn_norm"),
    "bf16": Mistake("layers.0.q"),
    "scaling": Mistake("layers.0.q_rope", lambda kit: kit.table["config"]["rope_scaling"] is not None),
    "pairing": Mistake("layers.0.q_rope"),
    "heads": Mistake("layers.0.attn_mix", heads_in_groups),
    "document": Mistake("layers.0.attn_mix"),
    "swapped": Mistake("layers.0.gate"),
    "labels": Mistake("train.loss", lambda kit: "train.loss" in kit.arrays),
}


@dataclass(frozen=True)
class Port:
    """How a port is started. `compiler`: names to look for; the first that is there runs once, before."""

    source: str
    compiler: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # of the compiler, {source} and {out} filled in
    start: tuple[str, ...] = ("{out}/port",)
    lacks: tuple[str, ...] = ()  # mistakes that it does not plant


RUSTC = ("rustc", str(Path.home() / ".cargo" / "bin" / "rustc"))
PORTS: dict[str, Port] = {
    "c": Port("kit_port.c", ("cc", "gcc", "clang"), ("-std=c99", "-O2", "-o", "{out}/port", "{source}", "-lm"),
              lacks=("labels",)),
    "rust": Port("kit_port.rs", RUSTC, ("--edition", "2021", "-O", "-o", "{out}/port", "{source}")),
    "javascript": Port("kit_port.js", start=("node", "{source}")),
    "java": Port("KitPort.java", ("javac",), ("-d", "{out}", "{source}"), ("java", "-cp", "{out}", "KitPort")),
    "numpy": Port("kit_port.py", start=(sys.executable, "{source}")),
}  # fmt: skip


class Missing(ValueError):
    """A compiler or a runtime is not installed."""


def found(names: Sequence[str]) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise Missing(f"{' or '.join(Path(name).name for name in names)} is not installed")


def build(name: str, out: Path) -> list[str]:
    """Compile a port into the folder `out`; returns the command to start it. Raises Missing."""
    port = PORTS[name]
    fill = lambda words: [word.format(source=SOURCES / port.source, out=out) for word in words]
    if port.compiler:
        subprocess.run([found(port.compiler), *fill(port.flags)], check=True, cwd=out)
    program, *rest = fill(port.start)
    return [found((program,)), *rest]


def run_port(command: list[str], kit: Path, out: Path, mistake: str = "") -> tuple[int, str]:
    """Exit code and last line."""
    out.mkdir()
    argv = [*command, str(kit), str(out), *([mistake] if mistake else [])]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
    return done.returncode, done.stdout.strip().splitlines()[-1]


def departs(kit: Kit, out: Path) -> tuple[str, str | None]:
    """The verdict of `parity.kit --check`, and the first array beyond its bound."""
    found = report(kit, out, "fp32")
    failed = [result.where for result in found.results if result.status.value == "fail"]
    divergence = found.first_divergence
    return found.verdict, divergence.tap if divergence else failed[0] if failed else None


def judge(command: list[str], kit: Kit, work: Path, mistake: str) -> dict[str, Any]:
    """One try: what the port says of itself, what the check says, and whether both are as they must be."""
    out = work / (mistake or "right")
    code, line = run_port(command, kit.folder, out, mistake)
    verdict, tap = departs(kit, out)
    shutil.rmtree(out)
    if mistake:
        wanted = MISTAKES[mistake].tap
        right = code == 1 and line.endswith(f"first at {wanted}") and (verdict, tap) == ("fail", wanted)
    else:
        right = code == 0 and line.startswith("PASS") and verdict == "pass"
    return {"mistake": mistake or None, "says": line, "verdict": verdict, "tap": tap, "as_expected": right}


def planted(port: str, kit: Kit) -> list[str]:
    return [name for name, m in MISTAKES.items() if m.applies(kit) and name not in PORTS[port].lacks]


def judge_all(port: str, command: list[str], kit: Kit, work: Path) -> list[dict[str, Any]]:
    """The port as it is, then with each mistake that shows in this kit."""
    return [judge(command, kit, work, mistake) for mistake in ("", *planted(port, kit))]


def markdown(tried: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """A row a port, a column a kit: the share of its worst bound, and how many mistakes were found at their tap."""
    kits = list(next(iter(tried.values())))
    lines = [f"| port | {' | '.join(kits)} |", f"| --- |{' --- |' * len(kits)}"]
    for port, by_kit in tried.items():
        cells = []
        for right, *wrong in by_kit.values():
            share = right["says"].split(" the worst at ")[-1].split(" ")[0] if right["as_expected"] else "**fails**"
            cells.append(f"{share}, {sum(w['as_expected'] for w in wrong)} of {len(wrong)}")
        lines.append(f"| {port} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    *,
    kits: Path,  # folder that `python -m parity.kit --set` wrote
    json: Path | None = None,  # file for the result
    table: Path | None = None,  # file for the table of docs/kit.md
) -> int:
    """Run every port with every mistake on every kit."""
    opened = {path.name: Kit(path) for path in sorted(kits.iterdir()) if path.is_dir()}
    tried: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for port in PORTS:
        with tempfile.TemporaryDirectory() as folder:
            command = build(port, Path(folder))
            tried[port] = {name: judge_all(port, command, kit, Path(folder)) for name, kit in opened.items()}
        for name, (right, *wrong) in tried[port].items():
            marks = " ".join(w["mistake"] + ("" if w["as_expected"] else " (MISSED)") for w in wrong)
            print(f"{port:<12} {name:<10} {right['says'].split(':')[0]:<5} {marks}", flush=True)
    rights = [by[0]["as_expected"] for kits in tried.values() for by in kits.values()]
    wrongs = [w["as_expected"] for kits in tried.values() for by in kits.values() for w in by[1:]]
    if json is not None:
        made = {"command": "python -m benchmarks.kit_ports --kits kits", "kits": {n: k.table["environment"] for n, k in
                                                                                opened.items()}}  # fmt: skip
        json.write_text(json_.dumps({**made, "tried": tried}, indent=1) + "\n")
    if table is not None:
        table.write_text(markdown(tried))
    print(
        f"{len(tried)} ports, {len(opened)} kits: {sum(rights)} of {len(rights)} pass, {sum(wrongs)} of {len(wrongs)} "
        "planted mistakes fail at their tap, by themselves and by the check"
    )
    return 0 if all(rights) and all(wrongs) else 1


if __name__ == "__main__":
    run(main)
