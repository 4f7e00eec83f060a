"""`python -m reference.oracle`: a case, or the likeliest next tokens of a prompt."""

from pathlib import Path

from reference.command import Conditions, Flags, run_command
from reference.driver import set_numerics
from reference.files import open_folder
from reference.meta_text import open_text
from reference.oracle.rounding import Rounded
from reference.oracle.run import next_tokens, run_case
from reference.protocol import check_sequences, read_case


def main(arguments: list[str] | None = None) -> int:
    return run_command("reference.oracle", answer, arguments)


def answer(
    *,
    flags: Flags = Flags(),
    ops: Path | None = None,  # trace folder whose operations are computed on its own inputs
    conditions: Conditions = Conditions(),
    off_ulp: float = 0.0,  # RoPE frequencies are off by so many ulp
) -> None:
    """The float64 forward pass that the references are judged by."""
    flags.check()
    rounded = Rounded.declared(**vars(conditions))
    if flags.case is not None:
        assert flags.out is not None
        run_case(read_case(flags.case), flags.out, ops, rounded, off_ulp)
        return
    assert flags.ckpt is not None and flags.prompt is not None
    set_numerics(flags.threads)
    checkpoint = open_folder(flags.ckpt)
    text = open_text(checkpoint, flags.tokenizer)
    tokens = text.encode(flags.prompt, bos=True)
    check_sequences([tokens], checkpoint.config["vocab_size"])
    best = next_tokens(checkpoint, tokens, flags.dtype, rounded)
    print(f"{'token':>7} {'logit':>9} {'margin':>9}  text")
    for token, logit in best:
        print(f"{token:7d} {logit:9.4f} {best[0][1] - logit:9.4f}  {text.decode([token])!r}")


if __name__ == "__main__":
    raise SystemExit(main())
