"""Does this implementation compute what Meta's code and transformers compute?

    python -m parity.check                                   # the embedded tiny checkpoint, nanollama, both references
    python -m parity.check --ckpt Meta-Llama-3.1-8B          # a checkpoint of yours
    python -m parity.check --candidate my_port.py:load       # an implementation of yours

Exit codes: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything could be judged.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanollama.cli import execute, from_config
from nanollama.printable import complain
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
    from parity.candidates.probe import Candidate, Probed
    from parity.report.model import Absent, CheckpointEntry, Report


@dataclass(frozen=True)
class Flags:
    """The command line of a check."""

    ckpt: str | None = None  # Meta or HF folder, .gguf, .bin, hub id (default: the embedded tiny one)
    tokenizer: str | None = None  # a tokenizer file, where the checkpoint has none
    candidate: str = "nanollama"  # file.py:attr, module:attr, torch:file.py:Class, hf:FOLDER, cmd:PROGRAM, http://...
    candidate_python: str | None = None  # run it under this Python: VENV/bin/python, with packages of its own
    model: str | None = None  # of a server that has several: the one to ask
    api_key: str | None = None  # the environment variable that holds a server's key
    tp: int = 1  # nanollama over so many processes, each with a part of every layer, is the candidate
    fsdp: int = 1  # nanollama over so many processes, each with a shard of the weights, is the candidate
    first_byte_s: float | None = None  # of an answer of a program (default: 1800 s) or a server (default: 300 s)
    answer_s: float | None = None  # until the answer is whole (default: 3600 s of a program, 600 s of a server)
    answer_mb: float | None = None  # the largest answer, in MiB (default: 64)
    references: str = "meta,hf"  # comma list of meta, hf
    dtype: str = "fp32,bf16"  # comma list of fp32, bf16, fp16
    device: Literal["cpu", "cuda", "mps"] = "cpu"  # where the references and the candidate run
    prompts: Path | None = None  # one prompt a line (\n escapes), or .jsonl of token lists; default: built-in ones
    max_new_tokens: int = 32  # greedy tokens per prompt
    checks: str | None = None  # comma list, or `list` to print them (default: all)
    twin: Literal["on", "off"] = "on"  # a candidate of yours on seeded weights, too
    cache: Literal["on", "off"] = "on"  # keep the references' traces for the next run
    keep: Path | None = None  # a folder for all that is computed: an interrupted run goes on there (default: none)
    json: Path | None = None  # write the whole report as JSON
    junit: Path | None = None  # write the results as JUnit XML
    html: Path | None = None  # write the report as one HTML file
    svg: Path | None = None  # write verdict, cause, table and curve as one picture
    result: Path | None = None  # write what can be sent to others as JSON: figures; no prompt, weight, path or name


def request_of(flags: Flags) -> Request:
    """The flags as a request; what can be refused before any work is. Raises UsageError."""
    from parity.candidates import is_python, resolve
    from parity.candidates.limits import limited
    from parity.candidates.server.endpoint import server_name
    from parity.checks import CHECKS

    candidate = server_name(distributed(flags), model=flags.model, api_key=flags.api_key, tokenizer=flags.tokenizer)
    if flags.candidate_python is not None:
        from parity.candidates.environment import within as in_environment

        candidate = in_environment(flags.candidate_python, flags.candidate)
    request = Request(
        limited(candidate, flags.first_byte_s, flags.answer_s, flags.answer_mb),
        flags.ckpt,
        flags.tokenizer,
        split_list("--references", flags.references, tuple(REFERENCES)),
        split_dtypes(flags.dtype),
        split_list("--checks", flags.checks, tuple(CHECKS)) if flags.checks else tuple(CHECKS),
        named=flags.checks is not None,
        device=flags.device,
        prompts=flags.prompts,
        max_new_tokens=flags.max_new_tokens,
        twin=flags.twin == "on",
        cache=flags.cache == "on",
        keep=flags.keep,
    )
    if request.keep is not None and not request.cache:
        raise UsageError(f"--keep {request.keep}: --cache off keeps nothing; leave one of them out")
    if request.max_new_tokens < 0:
        raise UsageError(f"--max_new_tokens {request.max_new_tokens}: expected 0 or more")
    require_files(request)
    for flag in ("json", "junit", "html", "svg", "result"):
        require_writable(flag, getattr(flags, flag))
    require_installed(request.references)
    require_device(request.device)
    if not is_python(request.candidate):  # else its own process imports it, and says what is wrong
        resolve(request.candidate)
    return request


def distributed(flags: Flags) -> str:
    """The candidate that is asked for, nanollama over processes where --tp or --fsdp say so. Raises UsageError."""
    if flags.tp == flags.fsdp == 1:
        return flags.candidate
    if flags.candidate != "nanollama" or flags.candidate_python or min(flags.tp, flags.fsdp) < 1:
        raise UsageError(f"--tp {flags.tp} --fsdp {flags.fsdp}: numbers of processes of nanollama itself, 1 or more")
    from parity.candidates.nano.distributed import name_of

    return name_of(flags.fsdp, flags.tp)


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
    return execute(from_config(Flags, run), argv, prog="python -m parity.check", doc=__doc__, errors=())


def run(flags: Flags) -> int:
    if flags.checks == "list":
        from parity.checks import CHECKS

        for name, function in CHECKS.items():
            print(f"{name:12} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    request = request_of(flags)
    try:
        report = check(request)
    except Crash as crash:  # of a reference: nothing was judged
        complain(crash, " (NANOLLAMA_DEBUG=1 shows all of it)")
        return 3
    from parity.checks.verdict import EXIT_CODES
    from parity.report import terminal

    print(terminal.render(report))
    write_reports(flags, report)
    return EXIT_CODES[report.verdict]


def write_reports(flags: Flags, report: "Report") -> None:
    """The files that were asked for."""
    if flags.json is not None:
        flags.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if flags.junit is not None:
        from parity.report.junit import junit

        flags.junit.write_text(junit(report), encoding="utf-8")
    if flags.html is not None:
        from parity.report import html

        flags.html.write_text(html.render(report), encoding="utf-8")
    if flags.svg is not None:
        from parity.report import svg

        flags.svg.write_text(svg.render(report), encoding="utf-8")
    if flags.result is not None:
        from parity.candidates.nano.checkpoint import fingerprint
        from parity.report.sendable import sendable
        from parity.synth.embedded import embedded_checkpoint

        digest = fingerprint(flags.ckpt or str(embedded_checkpoint()))
        flags.result.write_text(json.dumps(sendable(report, digest), indent=1) + "\n", encoding="utf-8")


def check(request: Request) -> "Report":
    """Run everything and return the report. The candidate is probed first: a typo in it costs seconds."""
    from parity.candidates.nano.checkpoint import describe
    from parity.candidates.probe import probe_in_process, start_candidate
    from parity.machine import Clock, workspace
    from parity.report import unjudged
    from parity.report.model import CheckpointEntry
    from parity.synth.embedded import embedded_checkpoint

    clock = Clock()
    with workspace() as folder:
        with start_candidate(request.candidate, folder) as candidate:
            checkpoint = describe(request.ckpt or str(embedded_checkpoint()), request.tokenizer)
            path, config = request.ckpt or "embedded default", checkpoint.config
            entry = CheckpointEntry(path, checkpoint.format, config, checkpoint.parameters, checkpoint.verified)
            probed = probe_in_process(candidate, checkpoint, request.dtypes, request.device)
            if probed is not None and probed.stops(request.dtypes):
                return unjudged.report(request, probed, checkpoint, entry, clock())
            report = compare(request, checkpoint, entry, candidate, probed, folder, clock)
        return twin.merge(report, check_twin(request, checkpoint, probed, folder / "twin"))


def check_twin(request: Request, checkpoint: "Description", probed: "Probed | None", folder: Path) -> "Report | Absent":
    """The report of the same candidate on the checkpoint's seeded twin, or why there is none."""
    from parity.candidates.nano.checkpoint import describe
    from parity.candidates.nano.twin import write
    from parity.candidates.probe import probe_in_process, start_candidate
    from parity.machine import Clock
    from parity.report.model import Absent

    clock = Clock()
    if why := twin.absent(request, checkpoint):
        return why
    with start_candidate(request.candidate, folder) as candidate:
        try:
            path = write(checkpoint, folder / "checkpoint")
            made = replace(describe(str(path), None), tokenizer=None)  # its prompts are ids
            again = probe_in_process(candidate, made, request.dtypes, request.device)
        except UsageError as error:
            return Absent("none", str(error))
        if why := twin.unfit(probed, again, request.dtypes):
            return why
        try:
            entry = twin.entry(checkpoint.path, made)
            return compare(twin.ask_twin(request), made, entry, candidate, again, folder / "run", clock)
        except (Crash, UsageError) as error:
            return Absent("error", str(error))


def compare(
    request: Request,
    checkpoint: "Description",
    entry: "CheckpointEntry",
    candidate: "Candidate | None",
    probed: "Probed | None",
    folder: Path,
    clock: Callable[[], float],
) -> "Report":
    """A plan, its traces, their results, the report. candidate: its process, where it has one already."""
    from parity.checks.verdict import crash_results, fails_behind_rope, run_checks_fairly
    from parity.explain.ask import explain
    from parity.machine import cache_folder
    from parity.report.summary import summarise
    from parity.run.cache import kept_in, trace_cache
    from parity.run.runner import Runner

    made = plan(request, checkpoint, folder, probed.max_positions if probed else None)
    cache = trace_cache(cache_folder()) if request.cache and request.keep is None else None
    cache = cache if request.keep is None else kept_in(request.keep)
    runner = Runner(made, folder, sys.stderr.isatty(), cache, candidate.waiting if candidate else {})
    ev, results = run_checks_fairly(runner.run(), request.checks)
    if fails_behind_rope(results):
        ev = explain(ev, runner)
    results = crash_results(runner.log.crashes) + results
    return summarise(ev, results, request.candidate, runner.log, clock(), entry)


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # the temporary folder goes however the run is ended
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
