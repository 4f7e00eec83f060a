"""What can be read off a tap's numbers alone: a factor, a bias, rounding, another order, some tokens only.

Each reading is the right values o (R, ...) changed as the candidate's c seem to be, by few numbers taken from c.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from reference.oracle.rounding import FLOATS, to_float

CAPS = (15.0, 20.0, 30.0, 50.0, 100.0)  # of logits, as models that have them write
FEW_ROWS = 8  # fewer positions tell no number a feature from chance
QUIET = 1e-3  # of the squared error, that may lie outside of the tokens that are said to be wrong
SAME = 0.9  # correlation from which two features may be one in another place

Reading = tuple[str, Tensor, bool]


def readings(tap: str, c: Tensor, o: Tensor) -> Iterator[Reading]:
    """(name, values (R, F), whether many numbers are taken from c) of all that apply to this tap."""
    what = {"logits": "the logits", "embed": "the embedding"}.get(tap, f"{tap.split('.')[-1]}'s values")
    c, o = c.flatten(1), o.flatten(1)
    if not torch.isfinite(c).all():
        return
    factor = float((c * o).sum() / o.square().sum())
    yield f"{what} are {factor:.6g} times what they should be", factor * o, False
    for name, kind in FLOATS.items():
        yield f"{what} are rounded to {name}", to_float(kind)(o), False
    if len(c) >= FEW_ROWS:
        yield f"a bias is added: {what} are off alike at every position", o + (c - o).mean(0), True
        yield from _permuted(what, c, o)
    if tap == "logits":
        yield from _logits(c, o)


def _logits(c: Tensor, o: Tensor) -> Iterator[Reading]:
    yield "log-probabilities are returned, not logits", o - o.logsumexp(-1, keepdim=True), False
    yield "probabilities are returned, not logits", o.softmax(-1), False
    yield "the vocabulary is shifted by one", o.roll(1, -1), False
    yield "the vocabulary is shifted by one back", o.roll(-1, -1), False
    for cap in CAPS:
        yield f"the logits are capped at {cap:g} by tanh", cap * (o / cap).tanh(), False
    factors = (c * o).sum(-1, keepdim=True) / o.square().sum(-1, keepdim=True)
    spread = f"{float(factors.min()):.4g} to {float(factors.max()):.4g}"
    yield f"the logits have another factor at each position ({spread}): a temperature by position", factors * o, True
    yield from _tail(c, o)


def _tail(c: Tensor, o: Tensor) -> Iterator[Reading]:
    """The tokens from some id on, at most half of them, are all that is wrong, by one number."""
    off = (c - o).square().sum(0)
    start = int((off.cumsum(0) <= QUIET * off.sum()).sum())
    if start >= len(off) // 2:
        shift = (c - o)[:, start:].mean()
        lower = "lower" if shift < 0 else "higher"
        changed = torch.cat((o[:, :start], o[:, start:] + shift), -1)
        yield (
            f"the logits of tokens {start} and up are {abs(float(shift)):.3g} {lower}: a tail of the vocabulary",
            changed,
            False,
        )
        replaced = torch.cat((o[:, :start], c[:, start:].mean().expand_as(o[:, start:])), -1)
        yield f"the logits of tokens {start} and up are all {float(c[:, start:].mean()):.3g}", replaced, False


def _permuted(what: str, c: Tensor, o: Tensor) -> Iterator[Reading]:
    """Each feature of c is found among those of o, none twice; a few thousand features at most."""
    if c.shape[1] > 4096:
        return
    unit = [x / x.norm(dim=0).clamp_min(1e-300) for x in (c, o)]
    alike = unit[0].T @ unit[1]  # (features of c, features of o)
    found = alike.argmax(1)
    moved = found != torch.arange(len(found))
    if moved.any() and len(found.unique()) == len(found) and bool((alike.amax(1) > SAME).all()):
        yield (
            f"{what} are right in another order: {int(moved.sum())} of {len(found)} rows are permuted",
            o[:, found],
            False,
        )
