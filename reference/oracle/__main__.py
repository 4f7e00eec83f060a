"""`python -m reference.oracle`: a case, or the likeliest next tokens of a prompt."""

from pathlib import Path

from reference.command import add_conditions, parse, parser, run_command
from reference.driver import set_numerics
from reference.files import open_folder
from reference.meta_text import open_text
from reference.oracle.rounding import Rounded
from reference.oracle.run import next_tokens, run_case
from reference.protocol import check_sequences, read_case


def main(arguments: list[str]) -> None:
    flags = parser("reference.oracle", "The float64 forward pass that the references are judged by.")
    flags.add_argument("--ops", type=Path, help="trace folder whose operations are computed on its own inputs")
    add_conditions(flags)
    flags.add_argument("--off_ulp", type=float, default=0.0, metavar="N", help="RoPE frequencies off by N ulp")
    options = parse(flags, arguments)
    rounded = Rounded.declared(options.integers, options.activations, options.kv, options.attention_dtype)
    if options.case is not None:
        run_case(read_case(options.case), options.out, options.ops, rounded, options.off_ulp)
        return
    set_numerics(options.threads)
    checkpoint = open_folder(options.ckpt)
    text = open_text(checkpoint, options.tokenizer)
    tokens = text.encode(options.prompt, bos=True)
    check_sequences([tokens], checkpoint.config["vocab_size"])
    best = next_tokens(checkpoint, tokens, options.dtype, rounded)
    print(f"{'token':>7} {'logit':>9} {'margin':>9}  text")
    for token, logit in best:
        print(f"{token:7d} {logit:9.4f} {best[0][1] - logit:9.4f}  {text.decode([token])!r}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
