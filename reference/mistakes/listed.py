"""Two columns of log-probabilities of the same tokens, a trainer's and an engine's: how far is each from the oracle, and why?

Given are sequences and, of each token that is listed, its place and both values. The oracle computes them in float64;
then with every mistake of table.py, and as samplers and batches change them: temperature, top-p and top-k, a token late,
no BOS, padding or earlier documents seen. What a mistake explains is the part of a column's squared error that it takes
away.

    python -m reference.mistakes.listed --case case.json --of columns.safetensors --out DIR

columns.safetensors holds sequence (N,) and position (N,) of the tokens, a and b (N,) in nats; DIR/listed.json is written.
"""  # noqa: E501

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanollama.cli import UsageError
from reference.command import Flags, run_command
from reference.driver import set_numerics
from reference.files import Checkpoint, open_folder
from reference.files.weights import Unusable
from reference.mistakes.table import HALVES, Mistake, mistakes
from reference.oracle.forward import Oracle, forward
from reference.protocol import check_sequences, read_case, write_json

TEMPERATURES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)
TOP_P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
TOP_K = (5, 10, 20, 40, 50, 100)
ENOUGH = 0.999  # of an error explained: nothing more is asked about this column
KEPT = 5  # of the best that are written
LEAST = 2.0**-20  # nats: below it a float32 log-probability has no digits


@dataclass(frozen=True)
class Columns:
    """N listed tokens: place[n] = (sequence, position), and each side's log-probability, (N,) float64."""

    sequence: Tensor
    position: Tensor
    sides: dict[str, Tensor]

    def tokens(self, sequences: list[list[int]]) -> Tensor:
        return torch.tensor(
            [sequences[s][p] for s, p in zip(self.sequence.tolist(), self.position.tolist(), strict=True)]
        )


@dataclass(frozen=True)
class Listing:
    """The oracle, and the tokens that it is asked about."""

    right: Oracle
    columns: Columns

    def logits(self, oracle: Oracle, shift: list[int] | None = None, mistake: Mistake | None = None) -> Tensor:
        """(N, V) before each listed token. shift: of each sequence, how much later its tokens come than listed."""
        parts = []
        for i, ids in enumerate(oracle.sequences):  # each alone: a mistake may be written for one
            at_tokens = self.columns.position[self.columns.sequence == i] + (shift[i] if shift else 0)
            if len(at_tokens):
                parts.append(before(replace(oracle, sequences=[ids]), at_tokens, mistake))
        return torch.cat(parts)

    def read(self, logits: Tensor) -> Tensor:
        """(N, V) -> log-probabilities (N,) of the listed tokens."""
        return at(logits.log_softmax(-1), self.columns.tokens(self.right.sequences))

    def with_mistake(self, mistake: Mistake) -> Tensor:
        return self.read(self.logits(mistake.applied(self.right), mistake=mistake))


def before(oracle: Oracle, positions: Tensor, mistake: Mistake | None) -> Tensor:
    """One sequence's logits (R, V) before the tokens at these positions."""
    normed = forward(oracle, lambda tap, value: None)
    if mistake is not None and mistake.head is not None:
        oracle = replace(oracle, rounded=mistake.head)
    found = torch.cat([block for _, _, block in oracle.logit_blocks(normed[positions - 1])], -1)
    return found if mistake is None or mistake.whole is None else HALVES[mistake.whole](found)


def at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None])[:, 0]


# --- What is not in the table of mistakes ----------------------------------------------------------------------------

Answer = tuple[str, Tensor]  # a mistake, and the log-probabilities (N,) that it gives


def samplings(logits: Tensor, tokens: Tensor) -> Iterator[Answer]:
    """As samplers change a distribution before its log-probabilities are taken."""
    for temperature in TEMPERATURES:
        scaled = (logits / temperature).log_softmax(-1)
        heat = "" if temperature == 1 else f" at temperature {temperature:g}"
        if heat:
            yield f"log-probabilities are taken{heat}", at(scaled, tokens)
        ranked = scaled.sort(dim=-1, descending=True).values.exp().cumsum(-1)
        for p in TOP_P:
            yield f"log-probabilities are renormalised to top-p {p:g}{heat}", kept(scaled, tokens, nucleus(ranked, p))
        for k in TOP_K:
            mass = ranked[:, min(k, ranked.shape[1]) - 1]
            yield f"log-probabilities are renormalised to top-k {k}{heat}", kept(scaled, tokens, mass)


def nucleus(ranked: Tensor, p: float) -> Tensor:
    """ranked (N, V), summed probabilities from the likeliest on -> the mass (N,) of the fewest that reach p."""
    count = (ranked < p).sum(-1, keepdim=True).clamp(max=ranked.shape[1] - 1)
    return ranked.gather(1, count)[:, 0]


def kept(log_probs: Tensor, tokens: Tensor, mass: Tensor) -> Tensor:
    return at(log_probs, tokens) - mass.log()


def roundings(logits: Tensor, tokens: Tensor) -> Iterator[Answer]:
    for name, low in HALVES.items():
        rounded = at(low(logits).log_softmax(-1), tokens)
        yield f"the logits are rounded to {name}", rounded
        yield f"the log-probabilities are computed in {name}", low(rounded)
    right = at(logits.log_softmax(-1), tokens)
    yield "log-probabilities are to base 2, not e", right / math.log(2)
    yield "log-probabilities are to base 10, not e", right / math.log(10)
    yield "probabilities are given, not their logarithms", right.exp()
    yield "negative log-probabilities are given", -right


def displaced(columns: Columns, right: Tensor) -> Iterator[Answer]:
    """Each value stands at the next or the previous listed token of its sequence."""
    same = columns.sequence[1:] == columns.sequence[:-1]
    late, early = right.clone(), right.clone()
    late[1:][same], early[:-1][same] = right[:-1][same], right[1:][same]
    yield "each log-probability stands one token late", late
    yield "each log-probability stands one token early", early


def batches(listing: Listing) -> Iterator[Answer]:
    """Other sequences than those given: what a batch or a tokenizer does to them."""
    right, sequences = listing.right, listing.right.sequences
    longest = max(map(len, sequences))

    def read(changed: list[list[int]], shift: list[int]) -> Tensor:
        return listing.read(listing.logits(replace(right, sequences=changed), shift))

    if all(len(s) > 2 for s in sequences) and int(listing.columns.position.min()) > 1:
        yield "the first token (BOS) is missing", read([s[1:] for s in sequences], [-1] * len(sequences))
    yield "the first token (BOS) is there twice", read([s[:1] + s for s in sequences], [1] * len(sequences))
    pads = [longest - len(s) for s in sequences]
    if any(pads):
        yield (
            "padding on the left is attended to",
            read([[0] * n + s for n, s in zip(pads, sequences, strict=True)], pads),
        )
    if len(sequences) > 1:
        before = [sequences[i - 1] if i else [] for i in range(len(sequences))]
        yield (
            "each document sees the one before it: packed without a mask",
            read([a + b for a, b in zip(before, sequences, strict=True)], [len(a) for a in before]),
        )


# --- The verdict on each column --------------------------------------------------------------------------------------


def explain(listing: Listing, dtypes: dict[str, str], bound: float, seconds: float) -> dict[str, Any]:
    """Errors of both columns, what rounding costs each in its dtype, and the mistakes that explain most of the error.

    Asked about are the sides whose error is more than `bound` times that cost.
    """
    started, columns = time.perf_counter(), listing.columns
    logits = listing.logits(listing.right)
    tokens = columns.tokens(listing.right.sequences)
    right = listing.read(logits)
    table = [m for alike in mistakes(listing.right.config, max(map(len, listing.right.sequences))) for m in alike]
    floors = {m.whole: max(rms(listing.with_mistake(m) - right), LEAST) for m in table if m.whole is not None}
    floors["fp32"] = max(floors["fp16"] / 2**10, LEAST)  # 24 bits in place of 11, and sums round as well
    found: dict[str, dict[str, float]] = {
        side: {} for side, x in columns.sides.items() if not rms(x - right) <= bound * floors[dtypes[side]]
    }
    cheap = roundings(logits, tokens), displaced(columns, right), batches(listing), samplings(logits, tokens)
    asked = 0
    for name, values in chain(*cheap, ((m.name, listing.with_mistake(m)) for m in table)):
        if time.perf_counter() - started > seconds or all(max(f.values(), default=0) > ENOUGH for f in found.values()):
            break
        asked += 1
        for side, shares in found.items():
            shares[name] = share(columns.sides[side], right, values)
    return {
        "right": right.tolist(),
        "floors": floors,
        "found": {side: sorted(f.items(), key=lambda item: -item[1])[:KEPT] for side, f in found.items()},
        "asked": asked,
        "seconds": round(time.perf_counter() - started, 2),
    }


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def share(given: Tensor, right: Tensor, values: Tensor) -> float:
    """The part of the squared error that `values` in place of the right ones takes away."""
    left, error = (float((given - x).nan_to_num(nan=1e30).square().sum()) for x in (values, right))
    return 1 - left / max(error, 1e-300)


def asked_about(checkpoint: Checkpoint, sequences: list[list[int]], columns: Columns) -> Listing:
    """The stored weights as they are: what rounding them costs is part of a dtype's cost."""
    check_sequences(sequences, checkpoint.config["vocab_size"])
    return Listing(Oracle(checkpoint, sequences, None), columns)


def main(arguments: list[str] | None = None) -> int:
    return run_command("reference.mistakes.listed", explain_columns, arguments)


def explain_columns(
    of: Path,  # file with sequence, position, a and b, (N,) each
    *,
    flags: Flags = Flags(),
    dtype_a: Literal["fp32", "bf16", "fp16"] = "bf16",  # in which a claims to compute
    dtype_b: Literal["fp32", "bf16", "fp16"] = "bf16",  # in which b claims to compute
    bound: float = 3.0,  # times the cost of rounding: beyond it, a side is asked about
    seconds: float = 120.0,  # nothing is asked after so long
) -> None:
    """How far is each of two columns of log-probabilities from the oracle, and why?"""
    flags.check()
    if flags.case is None or flags.out is None:
        raise UsageError("give --case and --out")
    case = read_case(flags.case)
    if not case.prompts:
        raise Unusable(f"{flags.case}: expected prompts of token ids")
    set_numerics(case.threads)
    given = load_file(of)
    columns = Columns(given["sequence"].long(), given["position"].long(), {s: given[s].double() for s in ("a", "b")})
    with torch.inference_mode():
        listing = asked_about(open_folder(case.checkpoint), case.prompts, columns)
        found = explain(listing, {"a": dtype_a, "b": dtype_b}, bound, seconds)
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(flags.out / "listed.json", found)


if __name__ == "__main__":
    raise SystemExit(main())
