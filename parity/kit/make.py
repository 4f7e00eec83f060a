"""A golden-state kit: weights, tokens, what they must give, and how far off is still rounding, as flat files.

With it an implementation in any language proves itself without Python: each bound is an absolute number, measured on
Meta's code and transformers against a float64 oracle. See docs/kit.md, and tests/ports/kit_port.c for a port in C.

    python -m parity.kit --out kit                  # prints: kit          kit: 10.6 MB ...
    python -m parity.kit --out kit --ckpt DIR --prompts prompts.jsonl
    python -m parity.kit --check kit --port OUT     # OUT/logits.f32, OUT/layers.0.q.f32, ...; ends: verdict      PASS
    python -m parity.kit --check kit --candidate my_port.py:load        # the same, of a candidate of parity.check

Exit codes of --check: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything was judged.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama.cli import execute, from_config
from nanollama.printable import complain, printable
from parity.contract import UsageError
from parity.run.process import Crash
from parity.run.request import Request, choose_within, require_installed, split_dtypes
from parity.synth.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from parity.candidates.nano.checkpoint import Description
    from parity.kit.arrays import Kit
    from parity.measure.evidence import Evidence
    from parity.report.model import Report

DEFAULT_DTYPES = "fp32,bf16"
CHECKS = ("weights", "rope", "taps", "logits", "kl", "argmax", "training")  # that a kit has arrays for
SEEDED = "seeded, Llama 3.1-shaped"
# Llama 3.1's features, small: heads in groups, scaled RoPE, an untied head, an eps that is no code's default.
SHAPE = Shape(64, 2, 4, 2, 192, vocab_size=512, norm_eps=2e-5, rope_factor=8.0, multiple_of=32, context=131_072)


@dataclass(frozen=True)
class Flags:
    """The command line of a kit, written or judged by."""

    out: Path | None = None  # folder to write the kit to
    ckpt: str | None = None  # Meta or HF folder, .gguf, .bin, hub id (default: a small seeded one)
    tokenizer: str | None = None  # a tokenizer file, where the checkpoint has none
    prompts: Path | None = None  # one prompt a line (\n escapes), or .jsonl of token lists; default: built-in ones
    dtype: str | None = None  # comma list of fp32, bf16, fp16 (default: fp32,bf16); with --check one (fp32)
    check: Path | None = None  # a kit that a port is judged by
    port: Path | None = None  # folder of NAME.f32 files that the port wrote
    candidate: str | None = None  # in place of --port: file.py:load, module:attr, cmd:PROGRAM or nanollama
    json: Path | None = None  # with --check: write the whole report as JSON


def main(argv: list[str] | None = None) -> int:
    return execute(from_config(Flags, run), argv, prog="python -m parity.kit", doc=__doc__, errors=())


def run(flags: Flags) -> int:
    if flags.out is not None and flags.check is None:
        return write_kit(flags, flags.out)
    if flags.check is None or flags.out is not None:
        raise UsageError("give either --out DIR, to write a kit, or --check DIR --port DIR, to judge a port by one")
    if (flags.port is None) == (flags.candidate is None):
        raise UsageError("--check: give either --port DIR, files that a port wrote, or --candidate file.py:load")
    return check_port(flags, flags.check)


def refuse(flags: Flags, names: tuple[str, ...], mode: str) -> None:
    for name in names:
        if getattr(flags, name) is not None:
            raise UsageError(f"--{name} has no meaning with {mode}")


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_kit(flags: Flags, out: Path) -> int:
    refuse(flags, ("port", "candidate", "json"), "--out")
    request = request_of(flags)
    from parity.machine import workspace
    from parity.synth.checkpoint import new_folder

    try:
        with new_folder(out) as work, workspace() as folder:
            source = gather(request, folder)
            table = fill(source, work)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error})") from None
    except Crash as crash:  # of a reference
        complain(crash, " (NANOLLAMA_DEBUG=1 shows all of it)")
        return 3
    print("\n".join(map(printable, describe_kit(table, out))))
    return 0


def request_of(flags: Flags) -> Request:
    """The flags as a request for the references alone. Raises UsageError."""
    request = Request(
        ckpt=flags.ckpt,
        tokenizer=flags.tokenizer,
        dtypes=split_dtypes(flags.dtype or DEFAULT_DTYPES),
        checks=CHECKS,
        prompts=flags.prompts,
        max_new_tokens=0,
        texts=False,
    )
    for flag in ("tokenizer", "prompts"):
        path = getattr(request, flag)
        if path is not None and not Path(path).is_file():
            raise UsageError(f"--{flag} {path}: no such file")
    require_installed(request.references)
    return request


@dataclass(frozen=True)
class Source:
    """What a kit is made from."""

    name: str  # of the checkpoint
    checkpoint: "Description"
    evidence: "Evidence"  # with the oracle in the candidate's place
    notices: list[str]


def gather(request: Request, folder: Path) -> Source:
    """Run the references and the oracle; their traces are left in `folder`."""
    import torch

    from parity.candidates.nano.checkpoint import describe
    from parity.machine import SMALL_BYTES
    from parity.run.request import plan
    from parity.run.runner import Runner
    from parity.synth.checkpoint import synthesise

    ckpt = request.ckpt
    if ckpt is None:
        synthesise(SHAPE, folder / "checkpoint")
    checkpoint = describe(ckpt or str(folder / "checkpoint"), request.tokenizer)
    if checkpoint.stored_bytes > SMALL_BYTES:
        raise UsageError(f"--ckpt {ckpt}: a kit of it would be too large to pass on; use python -m parity.check")
    prompts, _ = choose_within(request.prompts, checkpoint, checkpoint.context, request.max_new_tokens)
    made = plan(request, checkpoint, folder, prompts=replace(prompts, notices=[]))  # a kit's reader sees the ids
    torch.set_num_threads(made.case.threads)  # sums, and so the bounds' last digits, are split alike in every run
    runner = Runner(made, folder, sys.stderr.isatty())
    ev = runner.run_references()
    name = Path(ckpt).name if ckpt and Path(ckpt).exists() else ckpt  # a kit is passed on
    return Source(name or SEEDED, checkpoint, ev.of_candidates({None: ev.oracle}), runner.log.notices)


def fill(source: Source, out: Path) -> dict[str, Any]:
    """Write a kit into an empty folder; returns kit.json's table without arrays and gates."""
    from parity.candidates.nano.checkpoint import float32_weights
    from parity.kit.arrays import KitWriter
    from parity.kit.gates import table_of, write_forward, write_training
    from parity.synth.checkpoint import write_manifest

    ev, writer, weights = source.evidence, KitWriter(out), dict[str, "Tensor"]()
    for name, weight in float32_weights(source.checkpoint, ev.references["meta"].meta["weights"]):
        writer.add(name, "weights.f32", weight, "a weight, in Meta's layout")
        weights |= {name: weight} if ev.case.training else {}
    write_forward(ev, writer)
    write_training(ev, writer, weights)
    table = table_of(ev, source.notices)
    table["checkpoint"] |= {"path": source.name, "format": source.checkpoint.format}
    writer.finish(table)
    (out / "README.md").write_text(files("parity.kit").joinpath("readme.txt").read_text("utf-8"), encoding="utf-8")
    write_manifest(out)
    return table


def describe_kit(table: dict[str, Any], out: Path) -> list[str]:
    from parity.report.model import NoiseFloor
    from parity.report.terminal import noise_lines, number

    size, environment = sum(path.stat().st_size for path in out.iterdir()), table["environment"]
    lengths, (share, tap) = table["sequences"], table["float32_share"]
    decided = ", ".join(f"{part:.0%} in {dtype}" for dtype, part in table["decided_fraction"].items())
    checkpoint, dtype = table["checkpoint"], table["dtypes"][0]
    return [
        f"kit          {out}: {size / 1e6:.1f} MB",
        f"checkpoint   {checkpoint['path']} ({checkpoint['format']}, {checkpoint['parameters']:,} parameters)",
        f"references   Meta's llama_models, transformers (torch {environment['torch']}, transformers "
        f"{environment['transformers']})",
        f"tokens       {sum(lengths)} in {len(lengths)} sequences, longest {max(lengths)}; decided: {decided}",
        *noise_lines([NoiseFloor.of_json(entry) for entry in table["noise_floor"]]),
        f"float64      rounded to float32, {tap} would be off by {number(share)} of its noise in {dtype}",
        *(f"erratum      {text}" for text in table["errata"]),
        *(f"note         {text}" for text in table["notices"]),
    ]


# --- Judging ---------------------------------------------------------------------------------------------------------


def check_port(flags: Flags, folder: Path) -> int:
    from parity.checks.verdict import EXIT_CODES
    from parity.report import terminal

    found = judge(flags, folder)
    print(terminal.render(found))
    return EXIT_CODES[found.verdict]


def judge(flags: Flags, folder: Path) -> "Report":
    """The report of --check, of files that a port wrote or of a candidate; --json is written. Raises UsageError."""
    refuse(flags, ("ckpt", "tokenizer", "prompts"), "--check")
    dtypes = split_dtypes(flags.dtype or "fp32")
    if len(dtypes) > 1:
        raise UsageError(f"--dtype {flags.dtype}: with --check one, that in which the port computed")
    if flags.port is not None and not flags.port.is_dir():
        raise UsageError(f"--port {flags.port}: give the folder that holds the port's NAME.f32 files")
    if flags.json is not None and not os.access(flags.json.resolve().parent, os.W_OK):
        raise UsageError(f"--json {flags.json}: its folder does not exist or cannot be written")
    from parity.kit.arrays import Kit
    from parity.kit.check import report

    kit = Kit(folder)
    if flags.port is not None:
        found = report(kit, flags.port, dtypes[0])
    else:
        assert flags.candidate is not None
        found = check_candidate(kit, flags.candidate, dtypes[0])
    if flags.json is not None:
        flags.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return found


def check_candidate(kit: "Kit", name: str, dtype: str) -> "Report":
    """The report of a candidate, which is asked for what a port would have written."""
    from parity.kit.candidate import Answers
    from parity.kit.check import report
    from parity.machine import workspace

    with workspace() as folder:
        (folder / "port").mkdir()
        asked = Answers(kit, dtype, folder / "port")
        asked.write(name, folder)
        return report(kit, folder / "port", dtype, name, asked.results, asked.notices)
