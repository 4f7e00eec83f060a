"""The one table of bounds: what each gate allows, how it is measured, and the noise floor that was seen.

Ratios compare the candidate's error with the error that the reference itself makes at the same place, so 1 means "as
good as the reference". Loosening a bound needs an entry in docs/LOG.md that says what was measured.

G3.logits also bounds G7 (cache, metamorphic), and G4 the adapter merge of G8; kits take their factors from here. Where
nothing may differ at all (G0, bitwise, reruns) the bound is a 0 in the check itself.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    value: float
    unit: str
    noise: str  # the largest value that correct code was seen to reach, and where
    reason: str


BOUNDS: dict[str, Bound] = {
    "G1": Bound(
        1.0,
        "of what float32 explains",
        "0 for torch.polar, 1 for cos() and sin()",
        "one ulp of 1.0, and what 4 ulp of a pow and a product a pair are at that position: see rope_table.py",
    ),
    "G2": Bound(
        2.0,
        "RMS(c-o) / max(RMS(r-o), u RMS(o)/2)",
        "see docs/LOG.md",
        "one op on the reference's own input: errors cannot pile up",
    ),
    "G3.logits": Bound(
        2.0,
        "RMS(c-o) / max(RMS(r-o), u RMS(o)/2)",
        "1.43 over 200 random shapes",
        "two correct implementations make independent rounding errors of one size",
    ),
    "G3.taps": Bound(
        3.0,
        "RMS(c-o) / max(RMS(r-o), u RMS(o)/2)",
        "2.30 over 200 random shapes",
        "as for logits, over fewer elements, so with more scatter",
    ),
    "G4": Bound(
        3.0,
        "RMS(c-r) / max(RMS(r-o), u RMS(o)/2)",
        "1.9 between Meta and transformers",
        "the difference of two independent errors is sqrt(2) times one",
    ),
    "G5.mean": Bound(4.0, "ratio of KL", "see docs/LOG.md", "KL grows with the square of the error: 2 squared"),
    "G5.p99": Bound(4.0, "ratio of KL", "see docs/LOG.md", "KL grows with the square of the error: 2 squared"),
    "G5.max": Bound(9.0, "ratio of KL", "see docs/LOG.md", "a maximum scatters more: 3 squared"),
    "G6": Bound(
        0.0, "decided positions that differ", "0", "where the oracle's margin exceeds the noise, there is one answer"
    ),
    "G8.grad": Bound(3.0, "RMS(c-o) / max(RMS(r-o), u RMS(o)/2)", "see docs/LOG.md", "as for taps"),
    "G8.step": Bound(
        2.0, "ulp of max(|p|, lr)", "see docs/LOG.md", "AdamW from identical gradients is a dozen roundings"
    ),
}

# Losses of ten steps that agree to so many digits agree, whatever the reference's own are.
STEP_DIGITS = 5
KL_FLOOR_NATS = 1e-10
# A position's KL hangs on its two or three likeliest tokens: over few positions, correct code reached 23 times the
# reference's (2 positions), and 4.2 at the 99th percentile (46). Fewer than these are judged by G3, G4 and G6.
KL_POSITIONS = 128
# References whose errors differ in size by more than this factor are not both right: each is then used alone. The two
# that are known to be right were seen to differ by 3.7 (bf16, dim 8, five layers); a wrong one by thousands in fp32.
AGREE = 5.0
# A position is decided when the oracle's margin exceeds this many times the reference's largest error in that row.
DECIDED_MARGIN = 4.0
# A sequence at least this long is judged on its own too, so that an error which grows with the position is not
# diluted by short prompts; shorter ones hold too few numbers for a stable ratio and are judged together.
LONG_SEQUENCE_TOKENS = 64
# Another way to run a sequence that is kept at fewer positions is judged together with the others alone: at a single
# position, correct code reached 2.2 times the reference's error.
FEW_POSITIONS = 16
# What the pow of a RoPE frequency may be off, in ulp of it: libraries in use were seen to be 2 (TensorFlow) and 4
# (tinygrad). Where a gate fails without it, the error that such a table makes counts as rounding, and is reported.
TABLE_ULP = 4.0
# A table whose worst frequency is off by more than this many times the references' own (or ulp) is graded in a notice.
TABLE_WORSE = 2.0
