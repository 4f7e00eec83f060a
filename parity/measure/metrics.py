"""Error statistics of a trace against the oracle: sums of squares per tap and position, KL and margins per row.

Everything is accumulated in float64, in row blocks: a (T, 128256) tensor needs a block's memory and no more.
Each trace is read once; the gates are then arithmetic on these small tables.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parity.contract import UNIT
from parity.trace import Trace
from reference.protocol import tap_names

# Small enough for a core's cache: the passes over a block then run at its speed and not at the memory's.
ROW_BLOCK_ELEMENTS = 1 << 18


def blocks(rows: int, width: int) -> list[slice]:
    """Row slices of about ROW_BLOCK_ELEMENTS elements."""
    step = max(1, ROW_BLOCK_ELEMENTS // max(1, width))
    return [slice(i, min(rows, i + step)) for i in range(0, rows, step)]


def unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of element `flat` of a tensor of this shape."""
    index: list[int] = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.insert(0, i)
    return tuple(index)


@dataclass
class Place:
    """Where an error is largest, with both values."""

    sequence: int
    index: tuple[int, ...]  # position first
    value: float
    expected: float

    def __str__(self) -> str:
        at = ", ".join(str(i) for i in self.index[1:])
        element = f", element ({at})" if at else ""
        return f"sequence {self.sequence}, position {self.index[0]}{element}: {self.value:.6g} for {self.expected:.6g}"


@dataclass
class TapError:
    """One tap of one trace against expected values; per sequence, over the features of each position: (T,) each."""

    error: list[Tensor] = field(default_factory=list)  # sum of squared errors
    expected: list[Tensor] = field(default_factory=list)  # sum of squared expected values
    worst: list[Tensor] = field(default_factory=list)  # largest |error|, NaN where there is one
    width: int = 1  # numbers per position
    place: Place | None = None
    largest: float = -1.0
    # Of a reference: the squared error that a coarse RoPE table makes there, which counts as rounding too.
    drift: list[Tensor] = field(default_factory=list)

    def add(self, sequence: int, actual: Tensor, expected: Tensor) -> None:
        """actual, expected: (T, ...), any dtype. Shapes that differ raise ValueError."""
        if actual.shape != expected.shape:
            raise ValueError(f"shape {tuple(actual.shape)}: expected {tuple(expected.shape)}")
        a, o = actual.flatten(1), expected.flatten(1)
        rows, self.width = a.shape
        error, square, worst = (torch.zeros(rows, dtype=torch.float64) for _ in range(3))
        for block in blocks(rows, self.width):
            wanted = o[block].double()
            difference = a[block].double() - wanted
            error[block] = torch.linalg.vecdot(difference, difference)
            square[block] = torch.linalg.vecdot(wanted, wanted)
            worst[block] = difference.abs().amax(1)  # 8 times the speed of vector_norm's
        self.error.append(error)
        self.expected.append(square)
        self.worst.append(worst)
        self._note_place(sequence, actual, expected, worst)

    def _note_place(self, sequence: int, actual: Tensor, expected: Tensor, worst: Tensor) -> None:
        """Remember the largest error; a NaN counts as the largest."""
        sizes = torch.nan_to_num(worst, nan=torch.inf)
        if sizes.numel() and float(sizes.max()) > self.largest:
            row = int(sizes.argmax())
            difference = (actual[row].double() - expected[row].double()).abs()
            flat = torch.nan_to_num(difference, nan=torch.inf).argmax()
            index = unravel(int(flat), difference.shape)
            self.largest = float(sizes.max())
            self.place = Place(sequence, (row, *index), float(actual[row][index]), float(expected[row][index]))

    def rms(self, sequence: int | None = None) -> float:
        """Root mean square error over one sequence, or over all."""
        return self._rms(self.error, sequence)

    def rms_expected(self, sequence: int | None = None) -> float:
        return self._rms(self.expected, sequence)

    def rms_drift(self, sequence: int | None = None) -> float:
        return self._rms(self.drift, sequence)

    def _rms(self, sums: list[Tensor], sequence: int | None) -> float:
        chosen = torch.cat(sums) if sequence is None else sums[sequence]
        return float((chosen.sum() / max(1, chosen.numel() * self.width)).sqrt())


def noise_rms(reference: TapError, dtype: str, sequence: int | None = None) -> float:
    """The error that counts as rounding: the reference's own, at least half a rounding of the oracle's values."""
    own = own_noise(reference, dtype, sequence)
    return math.hypot(own, reference.rms_drift(sequence)) if reference.drift else own


def own_noise(reference: TapError, dtype: str, sequence: int | None = None) -> float:
    """Noise without what a coarse RoPE table may add."""
    return max(reference.rms(sequence), UNIT[dtype] * reference.rms_expected(sequence) / 2)


def relative(error: TapError, reference: TapError, dtype: str, sequence: int | None = None) -> float:
    """The error ratio. What a table may add grows with the position, so each position is then held against its own."""
    if not reference.drift:
        return ratio(error.rms(sequence), own_noise(reference, dtype, sequence))
    floor = own_noise(reference, dtype, sequence) ** 2
    chosen = range(len(error.error)) if sequence is None else [sequence]
    squares = torch.cat([error.error[i] for i in chosen]) / error.width
    allowed = floor + torch.cat([reference.drift[i] for i in chosen]) / error.width
    return ratio(float(torch.where(squares == 0, 0.0, squares / allowed).mean().sqrt()), 1.0)


def ratio(error: float, floor: float) -> float:
    """error / floor, with 0/0 = 0: a tensor of zeros reproduced exactly is right."""
    if error == 0:
        return 0.0
    return error / floor if floor > 0 else float("inf")


@dataclass
class OracleRows:
    """What the oracle's logits of one sequence say by themselves, (T,) each."""

    argmax: Tensor
    margin: Tensor  # best minus second-best logit
    log_norm: Tensor  # log of the sum of exponentials
    negentropy: Tensor  # sum of p log p, nats


@dataclass
class LogitRows:
    """Per position (T,) of one sequence: how one trace's logits differ from the oracle's."""

    kl: Tensor  # KL(oracle || trace), nats, float64
    argmax: Tensor  # the trace's own choice, int64


def oracle_rows(oracle: Tensor) -> OracleRows:
    """oracle: (T, V) float64."""
    columns: list[list[Tensor]] = [[], [], [], []]
    for block in blocks(*oracle.shape):
        o = oracle[block].double()
        top, log_norm = o.topk(2, dim=-1), torch.logsumexp(o, dim=-1)
        negentropy = torch.linalg.vecdot((o - log_norm.unsqueeze(1)).exp(), o) - log_norm
        values = (top.indices[:, 0], top.values[:, 0] - top.values[:, 1], log_norm, negentropy)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return OracleRows(*(torch.cat(column) for column in columns))


def logit_rows(actual: Tensor, oracle: Tensor, rows: OracleRows) -> LogitRows:
    """actual, oracle: (T, V). KL from sums over the row: exact to about 1e-14 nats, far below the gate's 1e-10."""
    kl, argmax = torch.zeros(oracle.shape[0], dtype=torch.float64), torch.zeros(oracle.shape[0], dtype=torch.long)
    for block in blocks(*oracle.shape):
        a = actual[block].double()
        p = (oracle[block].double() - rows.log_norm[block].unsqueeze(1)).exp()
        kl[block] = rows.negentropy[block] - torch.linalg.vecdot(p, a) + torch.logsumexp(a, dim=-1)
        argmax[block] = a.argmax(-1)
    return LogitRows(kl.clamp_min(0), argmax)  # clamp keeps NaN


@dataclass
class Measured:
    """One trace at one dtype against the oracle."""

    taps: dict[str, TapError]
    rows: list[LogitRows]  # one per sequence; empty without logits
    missing: list[str]  # taps that the trace lacks
    broken: dict[str, str]  # tap -> why it could not be compared


def measure(trace: Trace, oracle: Trace, dtype: str, oracle_logits: list[OracleRows]) -> Measured:
    """Read `trace` once and compare each of its taps with the oracle's. `oracle_logits`: per sequence."""
    measured = Measured({}, [], [], {})
    n_sequences = len(oracle.sequences)
    for tap in tap_names(oracle.n_layers):
        if not all(trace.has(dtype, i, tap) for i in range(n_sequences)):
            measured.missing.append(tap)
            continue
        error = TapError()
        try:
            for i in range(n_sequences):
                actual, expected = trace.get(dtype, i, tap), oracle.get(dtype, i, tap)
                error.add(i, actual, expected)
                if tap == "logits":
                    measured.rows.append(logit_rows(actual, expected, oracle_logits[i]))
        except ValueError as wrong_shape:
            measured.broken[tap] = str(wrong_shape)
            continue
        measured.taps[tap] = error
    return measured


def compare(trace: Trace, other: Trace, dtype: str, tap: str) -> TapError:
    """One tap of one trace against the same tap of another, not the oracle."""
    error = TapError()
    for i in range(len(other.sequences)):
        error.add(i, trace.get(dtype, i, tap), other.get(dtype, i, tap))
    return error


def percentile(values: Tensor, q: float) -> float:
    """The q-quantile (0..1) of a vector."""
    return float(torch.quantile(values, q))
