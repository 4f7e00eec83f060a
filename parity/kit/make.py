"""A golden-state kit: weights, tokens, what they must give, and how far off is still rounding, as flat files.

With it an implementation in any language proves itself without Python: each bound is an absolute number, measured on
Meta's code and transformers against a float64 oracle. See docs/kit.md, and tests/ports/kit_port.c for a port in C.

    python -m parity.kit --out kit                  # prints: kit          kit: 10.6 MB ...
    python -m parity.kit --out kit --ckpt DIR --prompts prompts.jsonl
    python -m parity.kit --set kits                 # six of them: Llama 2, 3, 3.1, 3.2, 70B's heads, packed documents
    python -m parity.kit --unpack kit --out FOLDER  # its weights for transformers, Meta's code and llama2.c
    python -m parity.kit --check kit --port OUT     # OUT/logits.f32, OUT/layers.0.q.f32, ...; ends: verdict      PASS
    python -m parity.kit --check kit --candidate my_port.py:load        # the same, of a candidate of parity.check

Exit codes of --check: 0 pass, 1 a parity failure, 2 unusable input, 3 nothing failed but not everything was judged.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama.cli import execute, from_config
from nanollama.printable import complain, printable
from parity.contract import UsageError
from parity.kit.gather import CHECKS, DEFAULT_DTYPES, fill, gather
from parity.run.process import Crash
from parity.run.request import Request, require_installed, split_dtypes

if TYPE_CHECKING:
    from parity.kit.arrays import Kit
    from parity.report.model import Report


@dataclass(frozen=True)
class Flags:
    """The command line of a kit, written or judged by."""

    out: Path | None = None  # folder to write the kit to
    set: Path | None = None  # in place of --out: folder to write six kits to, one of each Llama
    unpack: Path | None = None  # a kit to write as checkpoints and states that programs open, into --out
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
    if flags.unpack is not None:
        return unpack_kit(flags, flags.unpack)
    if (flags.out, flags.set, flags.check).count(None) != 2:
        raise UsageError(
            "give either --out DIR, to write a kit, or --set DIR, for six, or --check DIR --port DIR, to judge a port"
        )
    if flags.check is None:
        try:
            return write_kit(flags, flags.out) if flags.out is not None else write_set(flags)
        except Crash as crash:  # of a reference
            complain(crash, " (NANOLLAMA_DEBUG=1 shows all of it)")
            return 3
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

    with writing("--out", out) as work, workspace() as folder:
        table = fill(gather(request, folder), work)
    print("\n".join(map(printable, describe_kit(table, out))))
    return 0


def write_set(flags: Flags) -> int:
    """Six kits and their manifest, all at once: a broken run leaves nothing."""
    out = flags.set
    assert out is not None
    refuse(flags, ("port", "candidate", "json", "ckpt", "tokenizer", "prompts", "dtype"), "--set")
    from parity.kit.family import write_kits

    with writing("--set", out) as work:
        for line in write_kits(work):
            print(printable(line), flush=True)
    print(f"manifest     {printable(str(out / 'manifest.json'))}")
    return 0


def unpack_kit(flags: Flags, folder: Path) -> int:
    refuse(flags, ("set", "ckpt", "tokenizer", "prompts", "dtype", "check", "port", "candidate", "json"), "--unpack")
    if flags.out is None:
        raise UsageError(f"--unpack {folder}: give --out DIR, the folder to write to")
    from parity.kit.arrays import Kit
    from parity.kit.unpack import unpack

    kit = Kit(folder, "--unpack")
    with writing("--out", flags.out) as work:
        for line in unpack(kit, work):
            print(printable(line))
    return 0


@contextmanager
def writing(flag: str, out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end. Raises UsageError where it cannot be written."""
    from parity.synth.checkpoint import new_folder

    try:
        with new_folder(out, flag) as work:
            yield work
    except OSError as error:
        raise UsageError(f"{flag} {out}: cannot be written ({error})") from None


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
