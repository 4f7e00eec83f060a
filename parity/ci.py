"""A port judged where its repository is built: a check, its reports in one folder, and what a forge shows of it.

    python -m parity.ci --candidate my_port.py:load --out parity-report
    python -m parity.ci --kit kit --port out                   # files that a program wrote: no reference runs

OUT has report.json, report.html, report.svg, junit.xml, parity.sarif, summary.md and badge.json. Under GitHub Actions
the summary goes to the job's page, and the cause to the candidate's line. action.yml of this repository is this.

Exit codes: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything could be judged.
"""

import json
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama.cli import execute, from_config, read
from nanollama.printable import complain, error_line
from parity import check
from parity.contract import UsageError
from parity.machine import user_folder
from parity.run.process import Crash

if TYPE_CHECKING:
    from parity.report.model import Report
    from parity.report.place import Place


@dataclass(frozen=True)
class Flags:
    """What is judged, by what, and where the reports go."""

    candidate: str | None = None  # as of parity.check: file.py:attr, module:attr, torch:file.py:Class, cmd:PROGRAM, ...
    ckpt: str | None = None  # Meta or HF folder, .gguf, .bin, hub id (default: the embedded tiny one)
    kit: Path | None = None  # judge by this kit, in seconds, in place of the references
    port: Path | None = None  # with --kit: folder of NAME.f32 files that the port wrote, in place of --candidate
    flags: str = ""  # more flags of parity.check (with --kit: of parity.kit), in one string
    source: Path | None = None  # the file that annotations point at (default: the candidate's own)
    out: Path = Path("parity-report")  # folder for the reports; those of an earlier run are replaced


def main(argv: list[str] | None = None) -> int:
    return execute(from_config(Flags, run), argv, prog="python -m parity.ci", doc=__doc__, errors=())


def run(flags: Flags) -> int:
    out = user_folder("--out", flags.out)
    try:
        report = judge(flags)
    except UsageError as error:
        tell_unusable(flags, out, error)
        raise
    except Crash as crash:  # of a reference
        tell_unusable(flags, out, crash)
        complain(crash, " (NANOLLAMA_DEBUG=1 shows all of it)")
        return 3
    from parity.checks.verdict import EXIT_CODES

    tell(flags, out, report)
    return EXIT_CODES[report.verdict]


def judge(flags: Flags) -> "Report":
    """The report of a check, or of a kit. Raises UsageError."""
    try:
        more = shlex.split(flags.flags)
    except ValueError as error:
        raise UsageError(f"--flags {flags.flags!r}: {error}") from None
    if flags.source is not None and not flags.source.is_file():
        raise UsageError(f"--source {flags.source}: no such file")
    if flags.kit is None:
        if flags.port is not None:
            raise UsageError(f"--port {flags.port}: goes with --kit, by which its files are judged")
        if flags.candidate is None:
            raise UsageError("--candidate is missing: file.py:attr, torch:file.py:Class, cmd:PROGRAM, http://...")
        given = ["--candidate", flags.candidate, *(["--ckpt", flags.ckpt] if flags.ckpt else [])]
        asked = read(check.Flags, [*given, *more])
        if asked.checks == "list":
            raise UsageError("--flags '--checks list': python -m parity.check --checks list prints them")
        report = check.check(check.request_of(asked))
        check.write_reports(asked, report)  # those that --flags ask for, beside ours
        return report
    if (flags.port is None) == (flags.candidate is None):
        raise UsageError("--kit: give either --port DIR, files that a port wrote, or --candidate file.py:load")
    if flags.ckpt is not None:
        raise UsageError(f"--ckpt {flags.ckpt}: a kit has weights of its own")
    from parity.kit import make

    given = ["--port", str(flags.port)] if flags.port else ["--candidate", str(flags.candidate)]
    return make.judge(read(make.Flags, [*given, *more]), flags.kit)


# --- What is told ----------------------------------------------------------------------------------------------------


def tell(flags: Flags, out: Path, report: "Report") -> None:
    """Every report, the terminal's last."""
    from parity.report import annotations, terminal
    from parity.report.place import place_of, source_of

    source = flags.source or (source_of(report.candidate) if flags.candidate else None)
    place = place_of(report, source) if source else fallback()
    files: dict[str, Any] = {name: out / f"report.{name}" for name in ("json", "html", "svg")}
    check.write_reports(check.Flags(junit=out / "junit.xml", **files), report)
    dtypes = list(report.tokens.decided_fraction_by_dtype)
    write(out, annotations.markdown(report), annotations.badge(report.verdict, dtypes),
          annotations.sarif(report, place, root()))  # fmt: skip
    with quoted():
        print(terminal.render(report))
    message = annotations.headline(report) if report.verdict == "fail" else report.why
    line = annotations.annotation(report.verdict, message, place, root())
    set_outputs(report.verdict, out, line)


def tell_unusable(flags: Flags, out: Path, error: Exception) -> None:
    """That nothing was judged, and why."""
    from parity.report import annotations
    from parity.report.place import Place, source_of

    source = flags.source or (source_of(flags.candidate) if flags.candidate else None)
    message = error_line(error)
    for name in ("report.json", "report.html", "report.svg", "junit.xml"):  # of an earlier run
        (out / name).unlink(missing_ok=True)
    write(out, annotations.unusable_markdown(message), annotations.badge("unusable", []),
          annotations.unusable_sarif(message))  # fmt: skip
    place = Place(source) if source and source.is_file() else fallback()
    set_outputs("unusable", out, annotations.annotation("unusable", message, place, root()))


def write(out: Path, summary: str, badge: dict[str, Any], sarif: dict[str, Any]) -> None:
    (out / "summary.md").write_text(summary, encoding="utf-8")
    (out / "badge.json").write_text(json.dumps(badge, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "parity.sarif").write_text(json.dumps(sarif, indent=1) + "\n", encoding="utf-8")
    append("GITHUB_STEP_SUMMARY", summary)


def set_outputs(verdict: str, out: Path, annotation: str | None) -> None:
    """The annotation is for a runner alone; the outputs are plain words, and a path in a delimiter of its own."""
    mark = secrets.token_hex(16)
    append("GITHUB_OUTPUT", f"verdict={verdict}\nreport<<{mark}\n{out.resolve()}\n{mark}\n")
    if annotation is not None and os.environ.get("GITHUB_ACTIONS") == "true":
        print(annotation, flush=True)


def append(variable: str, text: str) -> None:
    """To the file that a runner reads, where there is one."""
    if path := os.environ.get(variable):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


@contextmanager
def quoted() -> Iterator[None]:
    """What is printed inside is no command to a runner."""
    mark = secrets.token_hex(16)
    runner = os.environ.get("GITHUB_ACTIONS") == "true"
    if runner:
        print(f"::stop-commands::{mark}")
    try:
        yield
    finally:
        if runner:
            print(f"::{mark}::")


def root() -> Path:
    """Of the repository that is built."""
    return Path(os.environ.get("GITHUB_WORKSPACE") or ".").resolve()


def fallback() -> "Place | None":
    """For a candidate that is no file of the repository, a server say: the workflow that asks."""
    from parity.report.place import Place

    _, _, file = os.environ.get("GITHUB_WORKFLOW_REF", "").partition("@")[0].partition("/.github/")
    path = root() / ".github" / file
    return Place(path) if file and path.is_file() else None


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # the temporary folder goes however the run is ended
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
