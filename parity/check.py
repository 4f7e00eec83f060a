"""Does this implementation compute what Meta's code and transformers compute?

    python -m parity.check                                   # the embedded tiny checkpoint, nanollama, both references
    python -m parity.check --ckpt Meta-Llama-3.1-8B          # a checkpoint of yours
    python -m parity.check --candidate my_port.py:load       # an implementation of yours

Exit codes: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything could be judged.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.cli import Parser
from parity.contract import DTYPES, Case, UsageError
from parity.run import twin
from parity.run.process import Crash
from parity.run.prompts import CORPUS, DIALOGS, Prompts, built_in, from_file, seeded, within
from parity.run.training import training_case

if TYPE_CHECKING:
    from parity.candidates.nano.checkpoint import Description
    from parity.candidates.probe import Probed

REFERENCES = ("meta", "hf")
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # org/name; a path that starts with a dot is none
# Of each sequence of a large checkpoint, taps are kept at this many positions; logits at all.
LARGE_POSITIONS = 16
TRAINED_PARAMETERS = 4_000_000  # larger models are trained only where --checks names it


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


def comma_list(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The items of a comma list, each one known. Raises UsageError."""
    items = list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    for item in items:
        if item not in known:
            raise UsageError(f"{flag} {item!r} is unknown: expected {', '.join(known)}")
    if not items:
        raise UsageError(f"{flag} is empty: expected a comma list of {', '.join(known)}")
    return items


def require_installed(references: Sequence[str]) -> None:
    """Raises UsageError where a reference's package is missing."""
    for module in [{"meta": "llama_models", "hf": "transformers"}[r] for r in references]:
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"the package {module} is not installed: pip install {module}, or leave its reference out")


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be refused before any work. Raises UsageError."""
    from parity.candidates.server.endpoint import server_name
    from parity.checks import CHECKS

    chosen: dict[str, Any] = {
        "candidate": server_name(args.candidate, model=args.model, api_key=args.api_key, tokenizer=args.tokenizer),
        "references": comma_list("--references", args.references, REFERENCES),
        "dtypes": comma_list("--dtype", args.dtype, tuple(DTYPES)),
        "checks": comma_list("--checks", args.checks, tuple(CHECKS)) if args.checks else list(CHECKS),
    }
    if args.max_new_tokens < 0:
        raise UsageError(f"--max_new_tokens {args.max_new_tokens}: expected 0 or more")
    if args.ckpt is not None and not Path(args.ckpt).exists() and not re.fullmatch(HUB_ID, args.ckpt):
        raise UsageError(
            f"--ckpt {args.ckpt}: no such file; give a Meta or Hugging Face folder, a .gguf, a .bin or a hub id"
        )
    if args.tokenizer is not None and not Path(args.tokenizer).is_file():
        raise UsageError(f"--tokenizer {args.tokenizer}: no such file")
    for flag in ("json", "junit", "html"):
        path = getattr(args, flag)
        if path is not None and not (path.resolve().parent.is_dir() and os.access(path.resolve().parent, os.W_OK)):
            raise UsageError(f"--{flag} {path}: its folder does not exist or cannot be written")
    require_installed(chosen["references"])
    if args.device != "cpu":
        import torch

        if not getattr(torch.backends if args.device == "mps" else torch, args.device).is_available():
            raise UsageError(f"--device {args.device}: torch sees no such device here")
    return chosen


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
    chosen = validate(args)
    from parity.candidates import resolve

    if args.candidate_python is not None:
        from parity.candidates.environment import within as in_environment

        chosen["candidate"] = in_environment(args.candidate_python, args.candidate)
    resolve(chosen["candidate"])
    try:
        report = check(args, chosen)
    except Crash as crash:  # of a reference: nothing was judged
        print(f"error: {crash} (NANOLLAMA_DEBUG=1 shows all of it)", file=sys.stderr)
        return 3
    from parity.report import summary, terminal

    print(terminal.render(report))
    write_reports(args, report)
    return summary.EXIT_CODES[report["verdict"]]


def write_reports(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """The files that were asked for."""
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.junit is not None:
        from parity.report.junit import junit

        args.junit.write_text(junit(report), encoding="utf-8")
    if args.html is not None:
        from parity.report import html

        args.html.write_text(html.render(report), encoding="utf-8")


def check(args: argparse.Namespace, chosen: dict[str, Any]) -> dict[str, Any]:
    """Run everything and return the report. The candidate is probed first: a typo in it costs seconds."""
    from parity.candidates.nano.checkpoint import describe
    from parity.machine import Clock, workspace
    from parity.report import unjudged
    from parity.run.runner import embedded_default, probed

    clock = Clock()
    checkpoint = describe(args.ckpt or str(embedded_default()), args.tokenizer)
    entry = {"path": args.ckpt or "embedded default", "format": checkpoint.format, "verified": checkpoint.verified}
    with workspace() as folder:
        found = probed(chosen["candidate"], checkpoint, chosen["dtypes"], args.device, folder)
        if found is not None and found.stops(chosen["dtypes"]):
            return unjudged.report(found, chosen["candidate"], chosen, checkpoint, entry, clock())
        report = compare(args, chosen, checkpoint, entry, found.max_positions if found else None, folder, clock)
        return twin.merge(report, check_twin(args, chosen, checkpoint, found, folder / "twin"))


def check_twin(
    args: argparse.Namespace,
    chosen: dict[str, Any],
    checkpoint: "Description",
    found: "Probed | None",
    folder: Path,
) -> dict[str, Any] | twin.Absent:
    """The report of the same candidate on the checkpoint's seeded twin, or why there is none."""
    from parity.candidates.nano.checkpoint import describe
    from parity.candidates.nano.twin import write
    from parity.machine import Clock
    from parity.run.runner import probed

    clock = Clock()
    if why := twin.absent(args, chosen["checks"], checkpoint):
        return why
    try:
        path = write(checkpoint, folder / "checkpoint")
        made = replace(describe(str(path), None), tokenizer=None)  # its prompts are ids
        theirs = probed(chosen["candidate"], made, chosen["dtypes"], args.device, folder)
    except UsageError as error:
        return twin.Absent("none", str(error))
    if why := twin.unfit(found, theirs, chosen["dtypes"]):
        return why
    asked = argparse.Namespace(
        **{**vars(args), "prompts": None, "max_new_tokens": min(args.max_new_tokens, twin.NEW_TOKENS)}
    )
    checks = chosen | {"checks": twin.twin_checks(chosen["checks"])}
    positions = theirs.max_positions if theirs else None
    try:
        return compare(asked, checks, made, twin.entry(checkpoint.path, made), positions, folder / "run", clock)
    except (Crash, UsageError) as error:
        return twin.Absent("error", str(error))


def compare(
    args: argparse.Namespace,
    chosen: dict[str, Any],
    checkpoint: "Description",
    entry: dict[str, Any],
    max_positions: int | None,
    folder: Path,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """References, oracle and candidate, judged. `max_positions`: what the candidate holds, where it says so."""
    from parity.candidates.nano.checkpoint import reference_files
    from parity.explain.ask import explain
    from parity.machine import SMALL_BYTES, cache_folder, threads_for, too_large
    from parity.report import summary
    from parity.run.cache import trace_cache
    from parity.run.runner import ROPE_POSITIONS, Runner

    context = min(checkpoint.context, max_positions or checkpoint.context)
    prompts, new_tokens = choose_within(args.prompts, checkpoint, context, args.max_new_tokens)
    large = checkpoint.stored_bytes > SMALL_BYTES
    untrained = why_untrained(args.checks, chosen, large, checkpoint.parameters)
    # What is stored fits whole (memory-mapped) if anything does: its run makes the greedy text.
    dtypes = sorted(chosen["dtypes"], key=lambda dtype: dtype != checkpoint.stored_dtype)
    files = reference_files(checkpoint, folder / "converted", chosen["references"], prompts.texts)
    case = Case(
        **files.as_case(),
        dtypes=dtypes if large else chosen["dtypes"],
        texts=prompts.texts,
        prompts=prompts.tokens,
        corpus=list(CORPUS) if checkpoint.tokenizer else [],
        dialogs=[list(d) for d in DIALOGS] if checkpoint.tokenizer else [],
        device=args.device,
        threads=threads_for(checkpoint.stored_bytes),
        max_new_tokens=new_tokens,
        rope_positions=[p for p in ROPE_POSITIONS if max_positions is None or p < max_positions],
        n_positions=LARGE_POSITIONS if large else None,
        too_large=too_large(checkpoint.parameters, chosen["dtypes"]),
        weights="weights" in chosen["checks"],
        training=None if untrained else training_case(checkpoint.config["vocab_size"]),
        vocab_size=checkpoint.config["vocab_size"],
        context=context,
    )
    runner = Runner(
        case,
        chosen["references"],
        chosen["candidate"],
        folder,
        sys.stderr.isatty(),
        own_files=(str(checkpoint.path.resolve()), str(checkpoint.tokenizer) if checkpoint.tokenizer else None),
        ops="ops" in chosen["checks"],
        large=large,
        first=files.first,
        witnesses=witnesses(chosen, files.checkpoint) if checkpoint.tokenizer else (),
        cache=trace_cache(cache_folder()) if args.cache == "on" else None,
    )
    runner.notices += [*checkpoint.notices, *files.notices, *prompts.notices]
    ev = runner.run()
    ev.untrained = untrained or ""
    ev, results = summary.judge_fairly(ev, chosen["checks"])
    if summary.fails_behind_rope(results):
        ev = explain(ev, runner)
    results = summary.crash_results(runner.crashes) + results
    return summary.summarise(ev, results, runner, clock(), entry)


def witnesses(chosen: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """References that are asked for token ids alone: a candidate may follow what the only other one does not open."""
    if chosen["references"] != ["meta"] or not {"tokens", "chat"} & set(chosen["checks"]):
        return ()
    more = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    opens_more = any((folder / name).is_file() for name in more)
    return ("hf",) if opens_more and importlib.util.find_spec("transformers") is not None else ()


def why_untrained(asked: str | None, chosen: dict[str, Any], large: bool, parameters: int) -> str | None:
    """Why this run trains nothing; None when it does."""
    if "training" not in chosen["checks"]:
        return "it was not asked for"
    if large or "fp32" not in chosen["dtypes"]:
        return "training is checked on small checkpoints in fp32"
    if asked is None and parameters > TRAINED_PARAMETERS:
        return f"{parameters / 1e6:.0f} million parameters take a while to train: ask for it with --checks training"
    return None


def choose_prompts(file: Path | None, checkpoint: "Description") -> Prompts:
    """The user's prompts, the built-in ones, or seeded token ids where there is no tokenizer. Raises UsageError."""
    vocab_size = checkpoint.config["vocab_size"]
    prompts = from_file(file) if file else built_in() if checkpoint.tokenizer else seeded(vocab_size)
    if prompts.texts and not checkpoint.tokenizer:
        raise UsageError(f"--prompts {file}: {checkpoint.path} has no tokenizer; give --tokenizer, or a .jsonl of ids")
    for i, ids in enumerate(prompts.tokens or [], 1):
        if max(ids) >= vocab_size:
            raise UsageError(f"--prompts {file}, prompt {i}: id {max(ids)} is outside the {vocab_size} tokens")
    return prompts


def choose_within(
    file: Path | None, checkpoint: "Description", context: int, max_new_tokens: int
) -> tuple[Prompts, int]:
    """Prompts, and how many tokens follow each, that together stay within `context`. Raises UsageError."""
    from parity.candidates.nano.model import opened_tokenizer

    prompts = choose_prompts(file, checkpoint)
    new = min(max_new_tokens, context // 2)
    tokenizer = opened_tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else None
    encode = (lambda text: tokenizer.encode(text, bos=True)) if tokenizer else None
    cut = within(prompts, context - new, encode, file)
    if cut is prompts and new == max_new_tokens:
        return prompts, new
    note = f"{context} positions are all that there is: prompts have {context - new} tokens at most, {new} follow"
    return replace(cut, notices=[*cut.notices, note]), new


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary folder goes however the run is ended
    sys.exit(main())
