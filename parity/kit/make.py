"""A golden-state kit: weights, tokens, what they must give, and how far off is still rounding, as flat files.

With it an implementation in any language proves itself without Python: each bound is an absolute number, measured on
Meta's code and transformers against a float64 oracle. See docs/kit.md, and tests/ports/kit_port.c for a port in C.

    python -m parity.kit --out kit                  # prints: kit          kit: 10.6 MB ...
    python -m parity.kit --out kit --ckpt DIR --prompts prompts.jsonl
    python -m parity.kit --check kit --port OUT     # OUT/logits.f32, OUT/layers.0.q.f32, ...; ends: verdict      PASS
    python -m parity.kit --check kit --candidate my_port.py:load        # the same, of a candidate of parity.check

Exit codes of --check: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything was judged.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.check import REFERENCES, TRAINED_PARAMETERS, choose_within, comma_list, require_installed
from parity.cli import Parser
from parity.contract import DTYPES, Case, UsageError
from parity.run.process import Crash
from parity.run.training import training_case
from parity.synth.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from parity.candidates.nano.checkpoint import Description
    from parity.kit.arrays import Kit
    from parity.measure.evidence import Evidence

DEFAULT_DTYPES = "fp32,bf16"
SEEDED = "seeded, Llama 3.1-shaped"
# Llama 3.1's features, small: heads in groups, scaled RoPE, an untied head, an eps that is no code's default.
SHAPE = Shape(64, 2, 4, 2, 192, vocab_size=512, norm_eps=2e-5, rope_factor=8.0, multiple_of=32, context=131_072)


def build_parser() -> Parser:
    parser = Parser("python -m parity.kit", __doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder to write the kit to")
    add("--ckpt", metavar="PATH", help="Meta or HF folder, .gguf, .bin, hub id (default: a small seeded one)")
    add("--tokenizer", metavar="FILE", help="a tokenizer file, where the checkpoint has none")
    add("--prompts", type=Path, metavar="FILE", help=r"one prompt a line (\n escapes), or .jsonl of token lists")
    add("--dtype", metavar="LIST", help="comma list of fp32, bf16, fp16 (default: fp32,bf16); with --check one (fp32)")
    add("--check", type=Path, metavar="DIR", help="a kit that a port is judged by")
    add("--port", type=Path, metavar="DIR", help="folder of NAME.f32 files that the port wrote")
    add("--candidate", metavar="NAME", help="in place of --port: file.py:load, module:attr, cmd:PROGRAM or nanollama")
    add("--json", type=Path, metavar="PATH", help="with --check: write the whole report as JSON")
    add("--version", action="store_true", help="print the version and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: argparse.Namespace) -> int:
    if args.version:
        from importlib.metadata import version

        print(f"parity {version('nanollama')}")
        return 0
    if (args.out is None) == (args.check is None):
        raise UsageError("give either --out DIR, to write a kit, or --check DIR --port DIR, to judge a port by one")
    if args.check is not None and (args.port is None) == (args.candidate is None):
        raise UsageError("--check: give either --port DIR, files that a port wrote, or --candidate file.py:load")
    return judge_port(args) if args.out is None else write_kit(args)


def refuse(args: argparse.Namespace, flags: tuple[str, ...], mode: str) -> None:
    for flag in flags:
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} has no meaning with {mode}")


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_kit(args: argparse.Namespace) -> int:
    refuse(args, ("port", "candidate", "json"), "--out")
    dtypes = comma_list("--dtype", args.dtype or DEFAULT_DTYPES, tuple(DTYPES))
    for flag in ("ckpt", "tokenizer", "prompts"):
        path = getattr(args, flag)
        if path is not None and flag != "ckpt" and not Path(path).is_file():
            raise UsageError(f"--{flag} {path}: no such file")
    require_installed(REFERENCES)
    from parity.machine import workspace
    from parity.synth.checkpoint import new_folder

    try:
        with new_folder(args.out) as out, workspace() as folder:
            source = gather(args, dtypes, folder)
            table = fill(source, out)
    except OSError as error:
        raise UsageError(f"--out {args.out}: cannot be written ({error})") from None
    except Crash as crash:  # of a reference
        print(f"error: {crash} (NANOLLAMA_DEBUG=1 shows all of it)", file=sys.stderr)
        return 3
    print("\n".join(describe_kit(table, args.out)))
    return 0


@dataclass
class Source:
    """What a kit is made from."""

    name: str  # of the checkpoint
    checkpoint: "Description"
    evidence: "Evidence"  # with the oracle in the candidate's place
    notices: list[str]


def gather(args: argparse.Namespace, dtypes: list[str], folder: Path) -> Source:
    """Run the references and the oracle; their traces are left in `folder`."""
    import torch

    from parity.candidates.nano.checkpoint import describe, reference_files
    from parity.machine import SMALL_BYTES, threads_for
    from parity.run.runner import ROPE_POSITIONS, Runner
    from parity.synth.checkpoint import synthesise

    if args.ckpt is None:
        synthesise(SHAPE, folder / "checkpoint")
    checkpoint = describe(args.ckpt or str(folder / "checkpoint"), args.tokenizer)
    if checkpoint.stored_bytes > SMALL_BYTES:
        raise UsageError(f"--ckpt {args.ckpt}: a kit of it would be too large to pass on; use python -m parity.check")
    prompts, _ = choose_within(args.prompts, checkpoint, checkpoint.context, 0)
    opened = reference_files(checkpoint, folder / "converted", REFERENCES, prompts.texts)
    trained = "fp32" in dtypes and checkpoint.parameters <= TRAINED_PARAMETERS
    case = Case(
        **opened.as_case(),
        dtypes=dtypes,
        texts=prompts.texts,
        prompts=prompts.tokens,
        threads=threads_for(checkpoint.stored_bytes),
        rope_positions=list(ROPE_POSITIONS),
        weights=True,
        training=training_case(checkpoint.config["vocab_size"]) if trained else None,
    )
    torch.set_num_threads(case.threads)  # sums, and so the bounds' last digits, are split alike in every run
    runner = Runner(case, list(REFERENCES), "", folder, sys.stderr.isatty(), ops=False, first=opened.first)
    ev = runner.run_references()
    ev.candidates = {None: ev.oracle}
    name = Path(args.ckpt).name if args.ckpt and Path(args.ckpt).exists() else args.ckpt  # a kit is passed on
    return Source(name or SEEDED, checkpoint, ev, [*checkpoint.notices, *opened.notices, *runner.notices])


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
    (out / "README.md").write_text(files("parity").joinpath("kit_readme.txt").read_text("utf-8"), encoding="utf-8")
    write_manifest(out)
    return table


def describe_kit(table: dict[str, Any], out: Path) -> list[str]:
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
        *noise_lines(table["noise_floor"]),
        f"float64      rounded to float32, {tap} would be off by {number(share)} of its noise in {dtype}",
        *(f"erratum      {text}" for text in table["errata"]),
        *(f"note         {text}" for text in table["notices"]),
    ]


# --- Judging ---------------------------------------------------------------------------------------------------------


def judge_port(args: argparse.Namespace) -> int:
    refuse(args, ("ckpt", "tokenizer", "prompts"), "--check")
    dtypes = comma_list("--dtype", args.dtype or "fp32", tuple(DTYPES))
    if len(dtypes) > 1:
        raise UsageError(f"--dtype {args.dtype}: with --check one, that in which the port computed")
    if args.port is not None and not args.port.is_dir():
        raise UsageError(f"--port {args.port}: give the folder that holds the port's NAME.f32 files")
    if args.json is not None and not os.access(args.json.resolve().parent, os.W_OK):
        raise UsageError(f"--json {args.json}: its folder does not exist or cannot be written")
    from parity.kit.arrays import Kit
    from parity.kit.check import report
    from parity.report import summary, terminal

    kit = Kit(args.check)
    if args.candidate is None:
        found = report(kit, args.port, dtypes[0])
    else:
        found = judge_candidate(kit, args.candidate, dtypes[0])
    print(terminal.render(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return summary.EXIT_CODES[found["verdict"]]


def judge_candidate(kit: "Kit", name: str, dtype: str) -> dict[str, Any]:
    """The report of a candidate, which is asked for what a port would have written."""
    from parity.kit.candidate import Answers
    from parity.kit.check import report
    from parity.machine import workspace

    with workspace() as folder:
        (folder / "port").mkdir()
        asked = Answers(kit, dtype, folder / "port")
        asked.write(name, folder)
        return report(kit, folder / "port", dtype, name, asked.results, asked.notices)
