"""The command line that the three implementations share.

python -m reference.meta --case case.json --out DIR                      # write a trace
python -m reference.meta --ckpt Meta-Llama-3.1-8B --prompt "Simply put," # print what it answers
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from reference.driver import Engine, fits_whole, run_case, set_numerics
from reference.files import Checkpoint, open_folder
from reference.files.weights import DTYPES, Unusable
from reference.protocol import Case, check_sequences, read_case


class Parser(argparse.ArgumentParser):
    """Usage errors are one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise Unusable(f"{message} (--help lists the flags)")


def parser(program: str, description: str) -> Parser:
    result = Parser(prog=f"python -m {program}", description=description, allow_abbrev=False)
    result.add_argument("--case", type=Path, help="JSON file that says what to run and record; - for standard input")
    result.add_argument("--out", type=Path, help="folder for the trace")
    result.add_argument("--ckpt", type=Path, help="Meta or Hugging Face checkpoint folder")
    result.add_argument("--tokenizer", help="tokenizer file, where the checkpoint has none")
    result.add_argument("--prompt", help="text to continue")
    result.add_argument("--max_new_tokens", type=int, default=32, help="greedy tokens (default 32)")
    result.add_argument("--dtype", choices=[name for name in DTYPES if name != "fp64"], default="bf16")
    result.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    return result


def parse(flags: Parser, arguments: list[str]) -> argparse.Namespace:
    """Either --case and --out, or --ckpt and --prompt."""
    options, unknown = flags.parse_known_args(arguments)
    if unknown:
        known = [flag for action in flags._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.0)
        raise Unusable(f"unknown argument {unknown[0]}; did you mean {near[0]}?")
    if (options.case is None) == (options.ckpt is None):
        raise Unusable("give --case and --out, or --ckpt and --prompt")
    if options.case is not None and options.out is None:
        raise Unusable("--case needs --out DIR for the trace")
    if options.ckpt is not None and options.prompt is None:
        raise Unusable("--ckpt needs --prompt TEXT")
    return options


def add_conditions(flags: Parser) -> None:
    """What is rounded, by declaration."""
    flags.add_argument("--integers", metavar="SCHEME", help="round weights to int8 (a scale a row), int4/32, ... first")
    flags.add_argument("--activations", metavar="SCHEME", help="round the inputs of linear layers: int8/32, fp16, ...")
    flags.add_argument("--kv", metavar="SCHEME", help="round keys and values: fp16, bf16, fp8, int8 (a scale a head)")
    flags.add_argument("--attention_dtype", metavar="SCHEME", help="round queries and attention weights: fp16, bf16")


def engine_main(
    program: str, description: str, make_engine: Callable[[Checkpoint, str], Engine], arguments: list[str]
) -> None:
    """Write a trace of --case, or print the greedy answer to --prompt."""
    options = parse(parser(program, description), arguments)
    if options.case is not None:
        case = read_case(options.case)
        run_case(case, make_engine(open_folder(case.checkpoint), case.device), options.out)
        return
    set_numerics(options.threads)
    checkpoint = open_folder(options.ckpt)
    dtype = DTYPES[options.dtype]
    if not fits_whole(Case(str(options.ckpt)), checkpoint, dtype):
        size = checkpoint.bytes_at(dtype) / 2**30
        raise Unusable(f"{options.ckpt}: {size:.0f} GiB at {options.dtype} do not fit in memory as they are; try bf16")
    engine = make_engine(checkpoint, "cpu")
    text = engine.text(options.tokenizer)
    prompt = text.encode(options.prompt, bos=True)
    check_sequences([prompt], checkpoint.config["vocab_size"])
    with torch.inference_mode():
        model = engine.whole(dtype, len(prompt) + options.max_new_tokens)
        print(text.decode(model.greedy(prompt, options.max_new_tokens, text.stop_ids)))


def run_command(main: Callable[[list[str]], None]) -> int:
    """Run `main` on the arguments of the process. Unusable input: one line on stderr, exit code 2."""
    try:
        main(sys.argv[1:])
        return 0
    except Unusable as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:  # no space, no permission, a file gone
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
