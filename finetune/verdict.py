"""What a run's validation losses say, in one sentence: beside chance, a bigram model, and where the run began.

>>> yards = Yardsticks(Score(6.2, 3.0), Score(4.1, 2.0))
>>> judge(yards, Score(4.0, 1.95), Score(3.4, 1.66), 600, Score(3.5, 1.7), 1000).text
'better than where it began by 0.29 bits per byte; best at step 600, kept as final/'
"""

import math
from dataclasses import dataclass

from finetune.data.documents import Documents
from finetune.evaluate import HeldOut, Score, bigram

SAME_NATS = 1e-3  # a token; what differs less is no better and no worse


@dataclass(frozen=True)
class Yardsticks:
    """What needs no model: every token alike, and a bigram model fitted on the training text."""

    uniform: Score
    bigram: Score

    def text(self) -> str:
        return (
            f"uniform {self.uniform.loss:.4f} nats a token and {self.uniform.bpb:.4f} bits per byte, "
            f"bigram {self.bigram.loss:.4f} and {self.bigram.bpb:.4f}"
        )


def yardsticks(train: Documents, held_out: HeldOut, vocab_size: int) -> Yardsticks:
    nats = math.log(vocab_size)
    return Yardsticks(held_out.score(nats * held_out.tokens, held_out.tokens), bigram(train, held_out, vocab_size))


def doubt(yards: Yardsticks, began: Score) -> str:
    """A word on a checkpoint that predicts worse than chance before its first step; "" where it does not."""
    if began.loss <= yards.uniform.loss:
        return ""
    return (
        f"before the first step the checkpoint predicts worse than chance ({began.loss:.2f} nats a token, uniform is "
        f"{yards.uniform.loss:.2f}): is the tokenizer its own, and are the data of its kind?"
    )


@dataclass(frozen=True)
class Verdict:
    text: str
    is_worse: bool = False  # than where the run began


def judge(
    yards: Yardsticks,
    began: Score | None,
    kept: Score,
    step: int,
    last: Score,
    last_step: int,
    *,
    learns_text: bool = True,
) -> Verdict:
    """kept: the score of step `step`, which becomes final/; last: that of the run's last step. learns_text: the loss is
    that of the next token; else the yardsticks know nothing of it, and it is judged as it is.
    """
    final = f"step {step}, kept as final/" if step == last_step else f"best at step {step}, kept as final/"
    if step != last_step:
        final += f" (the last, {last_step}, ended at {last.bpb:.4f})" if last.loss > kept.loss + SAME_NATS else ""
    beaten = _beaten(yards, kept) if learns_text else ""
    if began is None:
        return Verdict(f"{kept.bpb:.4f} bits per byte at {final}{beaten}")
    gain = began.bpb - kept.bpb if learns_text else began.loss - kept.loss
    unit = "bits per byte" if learns_text else "of loss"
    if not math.isfinite(kept.loss) or kept.loss > began.loss + SAME_NATS:
        return Verdict(
            f"worse than where it began by {-gain:.2g} {unit}: lower --lr, or look at the data; {final}{beaten}",
            is_worse=True,
        )
    if kept.loss > began.loss - SAME_NATS:
        return Verdict(f"no better than where it began: raise --lr or --max_steps; {final}{beaten}")
    return Verdict(f"better than where it began by {_rounded(gain)} {unit}; {final}{beaten}")


def _rounded(gain: float) -> str:
    """Two digits behind the point, more where they would be zeros."""
    return f"{gain:.2f}" if gain >= 0.05 else f"{gain:.2g}"


def _beaten(yards: Yardsticks, kept: Score) -> str:
    if kept.loss > yards.uniform.loss:
        return "; it still predicts worse than chance"
    return "; a bigram model still predicts better" if kept.loss > yards.bigram.loss else ""
