"""Does this implementation compute what Meta's code and transformers compute?

    python -m parity.check                                   # the embedded tiny checkpoint, nanollama, both references
    python -m parity.check --ckpt Meta-Llama-3.1-8B          # a checkpoint of yours
    python -m parity.check --candidate my_port.py:load       # an implementation of yours

Exit codes: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything could be judged.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from parity.cli import Parser
from parity.contract import UsageError
from parity.run import twin
from parity.run.process import Crash
from parity.run.request import (
    REFERENCES,
    Request,
    plan,
    require_files,
    require_installed,
    split_dtypes,
    split_list,
)

if TYPE_CHECKING:
    from parity.candidates.nano.checkpoint import Description
    from parity.candidates.probe import Probed
    from parity.report.model import Absent, CheckpointEntry, Report


def build_parser() -> Parser:
    parser = Parser("python -m parity.check", __doc__)
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="Meta or HF folder, .gguf, .bin, hub id (default: the embedded tiny one)")
    add("--tokenizer", metavar="FILE", help="a tokenizer file, where the checkpoint has none")
    add(
        "--candidate",
        default="nanollama",
        metavar="NAME",
        help="nanollama, module:attr, file.py:attr, torch:file.py:Class, hf:FOLDER, cmd:PROGRAM ... or http://host:port/v1",
    )
    add(
        "--candidate_python",
        metavar="PYTHON",
        help="run it under this Python: VENV/bin/python, with packages of its own",
    )
    add("--model", metavar="NAME", help="of a server that has several: the one to ask")
    add("--api_key", metavar="VARIABLE", help="the environment variable that holds a server's key")
    add("--references", default="meta,hf", metavar="LIST", help="comma list of meta, hf (default: both)")
    add("--dtype", default="fp32,bf16", metavar="LIST", help="comma list of fp32, bf16, fp16 (default: fp32,bf16)")
    add("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    add("--prompts", type=Path, metavar="FILE", help=r"one prompt a line (\n escapes), or .jsonl of token lists")
    add("--max_new_tokens", type=int, default=32, metavar="N", help="greedy tokens per prompt (default: 32)")
    add("--checks", metavar="LIST", help="comma list, or `list` to print them (default: all)")
    add("--twin", default="on", choices=("on", "off"), help="a candidate of yours on seeded weights, too (default: on)")
    add(
        "--cache",
        default="on",
        choices=("on", "off"),
        help="keep the references' traces for the next run (default: on)",
    )
    add("--json", type=Path, metavar="PATH", help="write the whole report as JSON")
    add("--junit", type=Path, metavar="PATH", help="write the results as JUnit XML")
    add("--html", type=Path, metavar="PATH", help="write the report as one HTML file")
    add("--version", action="store_true", help="print the version and stop")
    return parser


def request_of(args: argparse.Namespace) -> Request:
    """The flags as a request; what can be refused before any work is. Raises UsageError."""
    from parity.candidates import resolve
    from parity.candidates.server.endpoint import server_name
    from parity.checks import CHECKS

    candidate = server_name(args.candidate, model=args.model, api_key=args.api_key, tokenizer=args.tokenizer)
    request = Request(
        candidate,
        args.ckpt,
        args.tokenizer,
        split_list("--references", args.references, tuple(REFERENCES)),
        split_dtypes(args.dtype),
        split_list("--checks", args.checks, tuple(CHECKS)) if args.checks else tuple(CHECKS),
        named=args.checks is not None,
        device=args.device,
        prompts=args.prompts,
        max_new_tokens=args.max_new_tokens,
        twin=args.twin == "on",
        cache=args.cache == "on",
    )
    if request.max_new_tokens < 0:
        raise UsageError(f"--max_new_tokens {request.max_new_tokens}: expected 0 or more")
    require_files(request)
    for flag in ("json", "junit", "html"):
        require_writable(flag, getattr(args, flag))
    require_installed(request.references)
    require_device(request.device)
    if args.candidate_python is not None:
        from parity.candidates.environment import within as in_environment

        request = replace(request, candidate=in_environment(args.candidate_python, args.candidate))
    resolve(request.candidate)
    return request


def require_writable(flag: str, path: Path | None) -> None:
    """Raises UsageError for a report whose folder is not there."""
    if path is not None and not (path.resolve().parent.is_dir() and os.access(path.resolve().parent, os.W_OK)):
        raise UsageError(f"--{flag} {path}: its folder does not exist or cannot be written")


def require_device(device: str) -> None:
    """Raises UsageError for an accelerator that is not there."""
    if device != "cpu":
        import torch

        if not getattr(torch.backends if device == "mps" else torch, device).is_available():
            raise UsageError(f"--device {device}: torch sees no such device here")


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: argparse.Namespace) -> int:
    if args.version:
        from importlib.metadata import version

        print(f"parity {version('nanollama')}")
        return 0
    if args.checks == "list":
        from parity.checks import CHECKS

        for name, function in CHECKS.items():
            print(f"{name:12} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    request = request_of(args)
    try:
        report = check(request)
    except Crash as crash:  # of a reference: nothing was judged
        print(f"error: {crash} (NANOLLAMA_DEBUG=1 shows all of it)", file=sys.stderr)
        return 3
    from parity.checks.verdict import EXIT_CODES
    from parity.report import terminal

    print(terminal.render(report))
    write_reports(args, report)
    return EXIT_CODES[report.verdict]


def write_reports(args: argparse.Namespace, report: "Report") -> None:
    """The files that were asked for."""
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if args.junit is not None:
        from parity.report.junit import junit

        args.junit.write_text(junit(report), encoding="utf-8")
    if args.html is not None:
        from parity.report import html

        args.html.write_text(html.render(report), encoding="utf-8")


def check(request: Request) -> "Report":
    """Run everything and return the report. The candidate is probed first: a typo in it costs seconds."""
    from parity.candidates.nano.checkpoint import describe
    from parity.candidates.probe import probe_in_process
    from parity.machine import Clock, workspace
    from parity.report import unjudged
    from parity.report.model import CheckpointEntry
    from parity.synth.embedded import embedded_checkpoint

    clock = Clock()
    checkpoint = describe(request.ckpt or str(embedded_checkpoint()), request.tokenizer)
    path = request.ckpt or "embedded default"
    entry = CheckpointEntry(path, checkpoint.format, checkpoint.config, checkpoint.parameters, checkpoint.verified)
    with workspace() as folder:
        probed = probe_in_process(request.candidate, checkpoint, request.dtypes, request.device, folder)
        if probed is not None and probed.stops(request.dtypes):
            return unjudged.report(request, probed, checkpoint, entry, clock())
        report = compare(request, checkpoint, entry, probed, folder, clock)
        return twin.merge(report, check_twin(request, checkpoint, probed, folder / "twin"))


def check_twin(request: Request, checkpoint: "Description", probed: "Probed | None", folder: Path) -> "Report | Absent":
    """The report of the same candidate on the checkpoint's seeded twin, or why there is none."""
    from parity.candidates.nano.checkpoint import describe
    from parity.candidates.nano.twin import write
    from parity.candidates.probe import probe_in_process
    from parity.machine import Clock
    from parity.report.model import Absent

    clock = Clock()
    if why := twin.absent(request, checkpoint):
        return why
    try:
        path = write(checkpoint, folder / "checkpoint")
        made = replace(describe(str(path), None), tokenizer=None)  # its prompts are ids
        again = probe_in_process(request.candidate, made, request.dtypes, request.device, folder)
    except UsageError as error:
        return Absent("none", str(error))
    if why := twin.unfit(probed, again, request.dtypes):
        return why
    try:
        entry = twin.entry(checkpoint.path, made)
        return compare(twin.ask_twin(request), made, entry, again, folder / "run", clock)
    except (Crash, UsageError) as error:
        return Absent("error", str(error))


def compare(
    request: Request,
    checkpoint: "Description",
    entry: "CheckpointEntry",
    probed: "Probed | None",
    folder: Path,
    clock: Callable[[], float],
) -> "Report":
    """A plan, its traces, their results, the report."""
    from parity.checks.verdict import crash_results, fails_behind_rope, run_checks_fairly
    from parity.explain.ask import explain
    from parity.machine import cache_folder
    from parity.report.summary import summarise
    from parity.run.cache import trace_cache
    from parity.run.runner import Runner

    made = plan(request, checkpoint, folder, probed.max_positions if probed else None)
    runner = Runner(made, folder, sys.stderr.isatty(), trace_cache(cache_folder()) if request.cache else None)
    ev, results = run_checks_fairly(runner.run(), request.checks)
    if fails_behind_rope(results):
        ev = explain(ev, runner)
    results = crash_results(runner.log.crashes) + results
    return summarise(ev, results, request.candidate, runner.log, clock(), entry)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary folder goes however the run is ended
    sys.exit(main())
