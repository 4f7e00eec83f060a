"""The command lines of the three implementations.

python -m reference.meta --case case.json --out DIR                      # write a trace
python -m reference.meta --ckpt Meta-Llama-3.1-8B --prompt "Simply put," # print what it answers
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from nanollama.cli import Commands, UsageError, execute, from_config
from reference.driver import Engine, fits_whole, run_case, set_numerics
from reference.files import Checkpoint, open_folder
from reference.files.weights import DTYPES, Unusable
from reference.protocol import Case, check_sequences, read_case


@dataclass(frozen=True)
class Flags:
    """Either --case and --out, or --ckpt and --prompt."""

    case: Path | None = None  # JSON file that says what to run and record; - for standard input
    out: Path | None = None  # folder for the trace
    ckpt: Path | None = None  # Meta or Hugging Face checkpoint folder
    tokenizer: str | None = None  # tokenizer file, where the checkpoint has none
    prompt: str | None = None  # text to continue
    max_new_tokens: int = 32  # greedy tokens
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the answer to --prompt; a case names its own
    threads: int = 2  # CPU threads

    def check(self) -> None:
        """Raises UsageError for a line that asks for nothing, or for half of it."""
        if (self.case is None) == (self.ckpt is None):
            raise UsageError("give --case and --out, or --ckpt and --prompt")
        if self.case is not None and self.out is None:
            raise UsageError("--case needs --out DIR for the trace")
        if self.ckpt is not None and self.prompt is None:
            raise UsageError("--ckpt needs --prompt TEXT")


@dataclass(frozen=True)
class Conditions:
    """What is rounded, by declaration."""

    integers: str | None = None  # round weights to int8 (a scale a row), int4/32, ... first
    activations: str | None = None  # round the inputs of linear layers: int8/32, fp16, ...
    kv: str | None = None  # round keys and values: fp16, bf16, fp8, int8 (a scale a head)
    attention_dtype: str | None = None  # round queries and attention weights: fp16, bf16


def run_command(program: str, command: Commands, arguments: Sequence[str] | None, doc: str | None = None) -> int:
    """The exit code. Unusable input, a full disk, a file that is gone: one line on stderr, exit code 2."""
    return execute(command, arguments, prog=f"python -m {program}", doc=doc, errors=(Unusable, OSError))


def engine_main(
    program: str, doc: str, make_engine: Callable[[Checkpoint, str], Engine], arguments: Sequence[str] | None
) -> int:
    """Write a trace of --case, or print the greedy answer to --prompt."""
    return run_command(program, from_config(Flags, partial(answer, make_engine)), arguments, doc)


def answer(make_engine: Callable[[Checkpoint, str], Engine], flags: Flags) -> None:
    flags.check()
    if flags.case is not None:
        case = read_case(flags.case)
        assert flags.out is not None
        run_case(case, make_engine(open_folder(case.checkpoint), case.device), flags.out)
        return
    assert flags.ckpt is not None and flags.prompt is not None
    set_numerics(flags.threads)
    checkpoint = open_folder(flags.ckpt)
    dtype = DTYPES[flags.dtype]
    if not fits_whole(Case(str(flags.ckpt)), checkpoint, dtype):
        size = checkpoint.bytes_at(dtype) / 2**30
        raise Unusable(f"{flags.ckpt}: {size:.0f} GiB at {flags.dtype} do not fit in memory as they are; try bf16")
    engine = make_engine(checkpoint, "cpu")
    text = engine.text(flags.tokenizer)
    prompt = text.encode(flags.prompt, bos=True)
    check_sequences([prompt], checkpoint.config["vocab_size"])
    with torch.inference_mode():
        model = engine.whole(dtype, len(prompt) + flags.max_new_tokens)
        print(text.decode(model.greedy(prompt, flags.max_new_tokens, text.stop_ids)))
