"""What a kit is made from: the references and the oracle run once, and what they computed goes into a new folder."""

import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.contract import UsageError
from parity.run.request import Request, choose_within
from parity.synth.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from parity.candidates.nano.checkpoint import Description
    from parity.measure.evidence import Evidence

DEFAULT_DTYPES = "fp32,bf16"
CHECKS = ("weights", "rope", "taps", "logits", "kl", "argmax", "training")  # that a kit has arrays for
SEEDED = "seeded, Llama 3.1-shaped"
# Llama 3.1's features, small: heads in groups, scaled RoPE, an untied head, an eps that is no code's default.
SHAPE = Shape(64, 2, 4, 2, 192, vocab_size=512, norm_eps=2e-5, rope_factor=8.0, multiple_of=32, context=131_072)


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
