"""A record of benchmarks.frozen: what is kept of a report, what the last bits depend on, and what differs between two.

differences(before["cases"], after["cases"], bitwise=True)        # [Difference(case, field, before, after), ...]
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA = "nanollama.frozen/1"
REPOSITORY = Path(__file__).resolve().parent.parent
# Of every process, so that a machine with more cores splits no sum otherwise; parity.check takes all for large models.
THREADS = 1
# Of a report: what another run on another day may say otherwise.
FLEETING = (
    "environment",
    "peak_anonymous_bytes",
    "peak_bytes",
    "seconds",
    "seconds_in_forward",
    "speed",
    "tokens_per_s",
)
# What the last bits of floats decide without being floats (a digest, the worst element's place) is under this key.
ROUNDED = "rounded"
ABSENT = "(absent)"
LINE = 400  # characters of a line of a record, about
SHOWN = 600  # characters of a value in the line of a difference


# --- The comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    case: str
    field: str  # the keys on the way to it, with dots between
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.case}: {self.field}: before {_shown(self.before)}, after {_shown(self.after)}"


def _shown(value: object) -> str:
    text = value if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return str(text) if len(str(text)) <= SHOWN else f"{str(text)[:SHOWN]}..."


def differences(before: dict[str, Any], after: dict[str, Any], *, bitwise: bool) -> list[Difference]:
    """What differs between the cases of two records. `bitwise` is False for records of two machines."""
    return list(_walk(before, after, bitwise, ()))


def _walk(before: Any, after: Any, bitwise: bool, way: tuple[str, ...]) -> Iterator[Difference]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if bitwise or key != ROUNDED:
                yield from _walk(before.get(key, ABSENT), after.get(key, ABSENT), bitwise, (*way, key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from _walk(*pair, bitwise, (*way, str(i)))
    elif not _same(before, after, bitwise):
        yield Difference(way[0], ".".join(way[1:]) or "the whole case", before, after)


def _same(before: object, after: object, bitwise: bool) -> bool:
    """Floats are compared as they are printed, which tells apart all but NaNs; -0.0 is not 0.0, nor 1 True or 1.0."""
    if not bitwise and isinstance(before, float) and isinstance(after, float):
        return True
    return type(before) is type(after) and repr(before) == repr(after)


def machine() -> dict[str, str]:
    """What the last bits of a float depend on, beside the code."""
    import torch

    packages = {name: version(name) for name in ("torch", "transformers", "llama_models")}
    return packages | {
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(THREADS),
    }


def _cpu_model() -> str:
    """Name, family and model of the first core, where the system says so."""
    info = Path("/proc/cpuinfo")
    said = info.read_text() if info.is_file() else ""
    keys = ("model name", "cpu family", "model")
    found = [re.search(rf"^{key}\s*:\s*(.+)$", said, re.MULTILINE) for key in keys]
    return ", ".join(match[1] for match in found if match)


# --- What is kept of a report ----------------------------------------------------------------------------------------


def without_fleeting(found: Any, folder: Path) -> Any:
    """The same without seconds and memory, and with FOLDER for the temporary folder."""
    if isinstance(found, dict):
        return {key: without_fleeting(value, folder) for key, value in found.items() if key not in FLEETING}
    if isinstance(found, list):
        return [without_fleeting(value, folder) for value in found]
    return found.replace(str(folder), "FOLDER").replace(str(REPOSITORY), ".") if isinstance(found, str) else found


def kept_of_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report of parity.check with its results by name, and what rounding decides apart.

    How many mistakes were tried as explanations depends on the time that it takes, and with it which come second.
    """
    decided = ("noise_floor", "rho", "training", "quantized")
    results = by_name(report["results"], ("check", "gate", "reference", "dtype", "path", "metric", "checkpoint"))
    kept = {key: value for key, value in report.items() if key not in (*decided, "results")}
    if explained := (report.get("first_divergence") or {}).get("explained"):
        best = {key: value for key, value in explained.items() if key != "asked"} | {"best": explained["best"][:1]}
        kept["first_divergence"] = {**report["first_divergence"], "explained": best}
    return kept | {"results": results, ROUNDED: {key: report[key] for key in decided if key in report}}


def by_name(rows: list[dict[str, Any]], naming: tuple[str, ...]) -> dict[str, Any]:
    """Rows under a name that their own fields make.

    Where something was judged, its place and reason are rounding's (the worst element, how many tokens are decided);
    the reason of a check that was skipped, or that ended in an error, is not.
    """
    named: dict[str, Any] = {}
    for row in rows:
        name = unused(" ".join(str(row[key]) for key in naming if row.get(key) is not None), named)
        rest = {key: value for key, value in row.items() if key not in naming}
        if row.get("status") in ("pass", "fail"):
            rest[ROUNDED] = {key: rest.pop(key, None) for key in ("where", "reason")}
        named[name] = rest
    return named


def unused(name: str, taken: dict[str, Any]) -> str:
    """The name, numbered where a row before has it."""
    number = 2
    while (again := name if number == 2 and name not in taken else f"{name} ({number})") in taken:
        number += 1
    return again


def digest(*files: Path) -> str:
    """SHA-256 of the files' bytes, in this order."""
    made = hashlib.sha256()
    for path in files:
        made.update(path.read_bytes())
    return made.hexdigest()


# --- Two records ----------------------------------------------------------------------------------------------------


def laid_out(value: Any, indent: int = 0) -> str:
    """JSON in which what fits into a line is one, so that a difference shows as a line or two."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= LINE or not isinstance(value, dict | list):
        return line
    inner = "\n" + " " * (indent + 1)
    if isinstance(value, list):
        return f"[{inner}{(',' + inner).join(laid_out(item, indent + 1) for item in value)}\n{' ' * indent}]"
    items = (f"{json.dumps(key, ensure_ascii=False)}: {laid_out(item, indent + 1)}" for key, item in value.items())
    return f"{{{inner}{(',' + inner).join(items)}\n{' ' * indent}}}"


def read_record(path: Path) -> dict[str, Any]:
    """Raises ValueError where there is none, or one of another kind."""
    if not path.is_file():
        small = " --small" if path.name == "small.json" else ""
        raise ValueError(f"{path}: no such record: make one, python -m benchmarks.frozen{small} --store {path.parent}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {record.get('schema')!r}: expected {SCHEMA!r}; store it again")
    return record


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Difference], str]:
    """What differs between two records, and how they were compared."""
    other = [key for key, value in after["machine"].items() if before["machine"].get(key) != value]
    found = differences(before["cases"], after["cases"], bitwise=not other)
    if not other:
        return found, "bit for bit, on the machine of the record"
    says = ", ".join(f"{key} {before['machine'].get(key)} there and {after['machine'][key]} here" for key in other)
    return found, f"words and integers, no floats, on another machine: {says}"
