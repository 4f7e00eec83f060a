"""Which mistake gives a candidate's numbers? The oracle runs once for each of a table, on one sequence.

Given is a tap (or the logits) of a candidate, as a file with `value` (R, ...) and `rows` (R,), the positions that they
belong to. What a mistake explains is the part of the squared error that it takes away: 1 - (what it leaves / error)^2,
over all positions, or at the median one if that is more: where integers are rounded, a number that lies between two of
them falls to the other side at some positions, and all that follows is rounded otherwise there.
First come what can be read off the numbers alone (a factor, a bias, another order), then reference/mistakes/table.py.

    python -m reference.mistakes.explain --case case.json --of value.safetensors --tap logits --out DIR

writes DIR/explained.json.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanollama.cli import UsageError
from reference.command import Conditions, Flags, run_command
from reference.driver import set_numerics
from reference.files import Checkpoint, open_folder
from reference.files.weights import Unusable
from reference.mistakes.readings import readings
from reference.mistakes.table import HALVES, Mistake, mistakes
from reference.oracle.forward import Oracle, forward, rounding_groups
from reference.oracle.rounding import NOTHING, Rounded
from reference.protocol import check_sequences, read_case, write_json

ENOUGH = 0.999  # of the error explained: after EARLY_S, only what is of the same kind is asked
EARLY_S = 2.0
LOOSE = 4  # times as much must be explained by what takes a number for each position or feature
KEPT = 8  # of the best that are written
NOTHING_BESIDE = 1e-12  # a position's squared error beside the largest: there, nothing is to be explained
ROUNDING = 1e-6  # beside it, what may be rounding: there the error has not begun
HEAD_ROWS = 8192  # of the vocabulary, spread over it, are computed for each mistake
HEAD_BLOCK = 512


@dataclass(frozen=True)
class Question:
    """One tap of one sequence: the candidate's `value` (R, ...) float64 at positions `rows` (R,)."""

    right: Oracle
    tap: str
    value: Tensor
    rows: Tensor

    def answer(self, mistake: Mistake) -> Tensor | None:
        """The tap with a mistake, as `value`, of the logits some columns; None where the mistake does not reach it."""
        oracle, found = mistake.applied(self.right), dict[str, Tensor]()
        if self.tap.startswith("layers."):  # what comes after is not needed
            order = oracle.order or tuple(range(oracle.config["n_layers"]))
            oracle = replace(oracle, order=order[: int(self.tap.split(".")[1]) + 1])

        def emit(tap: str, value: Tensor) -> None:
            if tap == self.tap:
                found[tap] = value[self.rows]

        normed = forward(oracle, emit)
        return head(oracle, normed[self.rows], mistake) if self.tap == "logits" else found.get(self.tap)

    def truth(self) -> Tensor:
        """The right values, of the logits all columns."""
        if self.tap == "logits":
            normed = forward(self.right, lambda tap, value: None)[self.rows]
            return torch.cat([block for _, _, block in self.right.logit_blocks(normed)], -1)
        right = self.answer(Mistake("none"))
        if right is None:
            raise Unusable(f"--tap {self.tap!r} is no tap of this checkpoint")
        return right

    def seen(self, x: Tensor) -> Tensor:
        """The columns of whole logits that `answer` gives."""
        return x[:, columns(x.shape[1])] if self.tap == "logits" else x


def columns(vocab_size: int) -> Tensor:
    """All of a small vocabulary; of a large one blocks spread over it, the first and the last among them."""
    if vocab_size <= HEAD_ROWS:
        return torch.arange(vocab_size)
    starts = torch.linspace(0, vocab_size - HEAD_BLOCK, HEAD_ROWS // HEAD_BLOCK).long()
    return (starts[:, None] + torch.arange(HEAD_BLOCK)).flatten()


def head(oracle: Oracle, normed: Tensor, mistake: Mistake) -> Tensor:
    """(R, dim) -> (R, columns)"""
    name, chosen = oracle.checkpoint.head, columns(oracle.config["vocab_size"])
    parts, kind = chosen.split(HEAD_BLOCK), oracle.rounding or torch.float64
    load = oracle.checkpoint.weights.load
    rows = torch.cat([load(name, kind, start=int(part[0]), stop=int(part[-1]) + 1).double() for part in parts])
    rounded = oracle.rounded if mistake.head is None else mistake.head
    logits = rounded.inputs(normed) @ rounded.weights(rows).T
    return logits if mistake.whole is None else HALVES[mistake.whole](logits)


def squares(x: Tensor) -> float:
    return float(x.square().sum())


def rms(x: Tensor) -> float:
    return (squares(x) / x.numel()) ** 0.5


def share(c: Tensor, o: Tensor, answer: Tensor) -> float:
    """The part of the squared error c - o that `answer` in place of o takes away, (R, ...) each.

    What is left is held against c as well: numbers that are next to nothing are like any small multiple of o.
    """
    left, error, own = (
        (c - x).nan_to_num(nan=1e30).flatten(1).square().sum(1) for x in (answer, o, torch.zeros_like(o))
    )
    error = torch.minimum(error, own)
    at_positions = (1 - left / error.clamp_min(1e-300))[error > NOTHING_BESIDE * error.max()]
    return max(
        1 - float(left.sum()) / max(float(error.sum()), 1e-300),
        float(at_positions.median() if len(at_positions) else 0),
    )


def begins(rows: Tensor, error: Tensor) -> int:
    """The position where an error (R, ...) begins; 0 where there is none."""
    size = error.flatten(1).square().sum(1)
    found = rows[size > ROUNDING * size.max()]
    return int(found.min()) if len(found) else 0


def explain(question: Question, seconds: float) -> dict[str, Any]:
    """Every mistake with its share of the error, the best first; how many were asked within the time."""
    started = time.perf_counter()
    truth = question.truth()
    value, right = question.value.flatten(1), truth.flatten(1)
    found = list(readings(question.tap, question.value, truth))
    shares = {name: share(value, right, other) for name, other, _ in found}
    loose = {name for name, _, many in found if many}
    c, o = question.seen(question.value), question.seen(truth)
    table = list(mistakes(question.right.config, len(question.right.sequences[0]), begins(question.rows, c - o)))
    sizes, count = dict[str, dict[str, float]](), 0
    for kind in table if squares(c - o) > 0 else ():
        if max(shares.values(), default=0.0) >= ENOUGH and time.perf_counter() - started > EARLY_S:
            break
        for mistake in kind:
            if time.perf_counter() - started > seconds:
                break
            answer = question.answer(mistake)
            count += 1
            if answer is not None and answer.shape == c.shape:
                shares[mistake.name] = share(c, o, answer)
                if mistake.whole is not None:
                    sizes[mistake.whole] = size(c - o, answer - o)
    best = sorted(shares, key=lambda name: (1 - shares[name]) * (LOOSE if name in loose else 1))
    return {
        "tap": question.tap,
        "tokens": len(question.right.sequences[0]),
        "error": rms(value - right),
        "expected": rms(right),
        "found": [[name, shares[name]] for name in best[:KEPT]],
        "sizes": sizes,
        "asked": count,
        "of": sum(map(len, table)),
        "seconds": round(time.perf_counter() - started, 2),
    }


def size(error: Tensor, made: Tensor) -> dict[str, float]:
    """Of the error that a lower precision makes: its RMS, and how alike (a correlation) `error` is."""
    alike = float((error * made).sum()) / max((squares(error) * squares(made)) ** 0.5, 1e-300)
    return {"rms": rms(made), "alike": alike}


def asked(
    checkpoint: Checkpoint,
    tokens: list[int],
    dtype: str,
    tap: str,
    value: Tensor,
    rows: Tensor,
    rounded: Rounded = NOTHING,
) -> Question:
    """A question about one sequence; `value` (R, ...) in any dtype; `rounded`: what is so by declaration."""
    check_sequences([tokens], checkpoint.config["vocab_size"])
    right = Oracle(checkpoint, [tokens], rounding_groups(checkpoint, (dtype,))[dtype], rounded=rounded)
    return Question(right, tap, value.double(), rows)


def main(arguments: list[str] | None = None) -> int:
    return run_command("reference.mistakes.explain", explain_case, arguments)


def explain_case(
    of: Path,  # file with the candidate's value (R, ...) and rows (R,)
    *,
    flags: Flags = Flags(),
    tap: str = "logits",  # which tap it is
    seconds: float = 60.0,  # no mistake is begun after so long
    conditions: Conditions = Conditions(),
) -> None:
    """Which mistake gives a candidate's numbers?"""
    flags.check()
    if flags.case is None or flags.out is None:
        raise UsageError("give --case and --out")
    case = read_case(flags.case)
    if not case.prompts or len(case.prompts) != 1 or len(case.dtypes) != 1:
        raise Unusable(f"{flags.case}: expected one prompt of token ids and one dtype")
    set_numerics(case.threads)
    rounded = Rounded.declared(**vars(conditions))
    given, checkpoint = load_file(of), open_folder(case.checkpoint)
    with torch.inference_mode():
        question = asked(checkpoint, case.prompts[0], case.dtypes[0], tap, given["value"], given["rows"], rounded)
        found = explain(question, seconds)
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(flags.out / "explained.json", found)


if __name__ == "__main__":
    raise SystemExit(main())
