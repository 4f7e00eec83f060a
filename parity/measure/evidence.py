"""Evidence: the traces of one run and what was measured on them, each measured once however many checks ask."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parity.candidates.conditions import Conditions
from parity.contract import Case
from parity.explain.explained import Explained
from parity.measure.listed import Listed, Listing
from parity.measure.metrics import (
    LogitRows,
    Measured,
    OracleRows,
    TapError,
    compare,
    measure,
    noise,
    oracle_rows,
    own_noise,
    relative,
)
from parity.measure.tolerances import AGREE, DECIDED_MARGIN, FEW_POSITIONS, LONG_SEQUENCE_TOKENS
from parity.trace import Trace


@dataclass(frozen=True)
class Pair:
    """One judgement's parties: a reference, a dtype and one path of the candidate."""

    reference: str
    dtype: str
    path: str | None

    @property
    def labels(self) -> dict[str, Any]:
        return {"reference": self.reference, "dtype": self.dtype, "path": self.path}


@dataclass
class Evidence:
    case: Case
    oracle: Trace
    references: dict[str, Trace]
    candidates: dict[str | None, Trace]  # by path; {None: trace} for a candidate with one path
    witnesses: list[Trace] = field(default_factory=list)  # token ids alone, by references that do not judge
    forced: dict[str, Trace] = field(default_factory=dict)  # the references, cut short: inputs of the op gates
    rounded: dict[str, Trace] = field(default_factory=dict)  # by conditions: the oracle that rounds so
    ops: dict[str, Trace] = field(default_factory=dict)  # the oracle's operations on these inputs, see checks/ops.py
    op_errors: dict[Any, Any] = field(default_factory=dict)  # kept by checks/ops.py
    op_noise: dict[Any, Any] = field(default_factory=dict)  # kept by checks/ops.py: of the references
    coarse: Trace | None = None  # the oracle with its RoPE frequencies TABLE_ULP off
    lenient: bool = False  # whether what a table so coarse makes counts as rounding, see parity/measure/rope_table.py
    explained: Explained | None = None  # what the table of mistakes says about the first divergence
    untrained: str = "training is checked on small checkpoints in fp32"  # why the case trains nothing
    _measured: dict[tuple[int, str], Measured] = field(default_factory=dict)
    _oracle_rows: dict[str, list[OracleRows]] = field(default_factory=dict)
    _pairwise: dict[tuple[Pair, str], TapError] = field(default_factory=dict)
    _strict: dict[tuple[str, str], Measured] = field(default_factory=dict)
    _noise: dict[tuple[str, str], Measured] = field(default_factory=dict)
    _extra: dict[tuple[str | None, str, str, int], TapError] = field(default_factory=dict)
    _listed: dict[Pair, Listed | None] = field(default_factory=dict)

    def prepare(self, workers: int, dtypes: list[str]) -> None:
        """Measure everything that the gates ask for at these dtypes, in threads: torch leaves the interpreter lock.

        Single-threaded kernels side by side keep their speed on a busy machine, where threads inside one do not.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(self.oracle_rows, dict.fromkeys(dtypes)))
                runs = [(trace, dtype) for dtype, _, trace in self.per_dtype() if dtype in dtypes]
                judges = (*self.references.values(), *self.rounded.values(), *([self.coarse] if self.coarse else ()))
                runs += [(trace, dtype) for trace in judges for dtype in dtypes if dtype in trace.meta["dtypes"]]
                list(pool.map(lambda run: self.measured(*run), runs))
                pairs = [pair for pair in self.pairs() if pair.dtype in dtypes]
                list(pool.map(lambda job: self.pairwise(*job), [(p, t) for p in pairs for t in self.shared(p)]))
                list(pool.map(self.listed, pairs))
                list(pool.map(lambda job: self.error_at(*job), [x for x in self._extras() if x[1] in dtypes]))
        finally:
            torch.set_num_threads(before)

    def shared(self, pair: Pair) -> list[str]:
        """Taps that the candidate and the reference both have, in order of computation."""
        theirs = self.reference(pair).taps
        return [tap for tap in self.candidate(pair).taps if tap in theirs]

    def pairwise(self, pair: Pair, tap: str) -> TapError:
        """One tap of the candidate against the reference's."""
        if (pair, tap) not in self._pairwise:
            judge = self.judges(pair.path)[pair.reference]
            difference = compare(self.candidates[pair.path], judge, pair.dtype, tap)
            self._pairwise[pair, tap] = difference
        return self._pairwise[pair, tap]

    def pairs(self) -> Iterator[Pair]:
        for path, trace in self.candidates.items():
            for dtype in self.case.dtypes:
                if dtype in trace.meta["dtypes"]:
                    yield from (Pair(judge, dtype, path) for judge in self.judges(path))

    def judges(self, path: str | None) -> dict[str, Trace]:
        """Whose error a path of the candidate is measured by: the references', or under declared conditions, the error
        that such rounding makes in the oracle itself."""
        said = Conditions.of(self.candidates[path].meta)
        return {f"oracle {said}": self.rounded[str(said)]} if said else self.references

    def per_dtype(self) -> Iterator[tuple[str, str | None, Trace]]:
        """(dtype, path, trace) of each candidate run, for checks that need no reference."""
        for path, trace in self.candidates.items():
            yield from ((dtype, path, trace) for dtype in self.case.dtypes if dtype in trace.meta["dtypes"])

    def measured(self, trace: Trace, dtype: str) -> Measured:
        key = (id(trace), dtype)
        if key not in self._measured:
            self._measured[key] = measure(trace, self.oracle, dtype, self.oracle_rows(dtype))
        return self._measured[key]

    def oracle_rows(self, dtype: str) -> list[OracleRows]:
        """The oracle's own choices, per sequence; dtypes that round the weights alike share them."""
        folder = self.oracle.meta["dtypes"][dtype]
        if folder not in self._oracle_rows:
            logits = (self.oracle.get(dtype, i, "logits") for i in range(len(self.oracle.sequences)))
            self._oracle_rows[folder] = [oracle_rows(x) for x in logits]
        return self._oracle_rows[folder]

    def reference(self, pair: Pair) -> Measured:
        """What counts as rounding: at each position, the largest error that any reference makes there.

        At an ill-conditioned position an error's size is a matter of luck; each reference is one more throw. A
        reference that strays from the pair's own by more than the gates allow has no say.
        """
        key = (pair.reference, pair.dtype)
        if key not in self._noise:
            found = self.strict(pair)
            # Of large checkpoints, dtypes run one after the other, and not every one was in doubt.
            if self.lenient and self.coarse is not None and pair.dtype in self.coarse.meta["dtypes"]:
                found = with_drift(found, self.measured(self.coarse, pair.dtype))
            self._noise[key] = found
        return self._noise[key]

    def strict(self, pair: Pair) -> Measured:
        """The same without an allowance for coarse RoPE tables."""
        key = (pair.reference, pair.dtype)
        if key not in self._strict:
            own = self.measured(self.judges(pair.path)[pair.reference], pair.dtype)
            others = [self.measured(t, pair.dtype) for n, t in self.references.items() if n != pair.reference]
            # The oracle that rounds as declared computes in float64: a reference's rounding comes on top.
            if rounded := pair.reference not in self.references:
                others = sorted(others, key=lambda o: o.taps["logits"].rms() if "logits" in o.taps else math.inf)[:1]
            taps = {t: envelope(e, [o.taps[t] for o in others if t in o.taps], rounded) for t, e in own.taps.items()}
            peers = [o for o in others if "logits" in o.taps]
            peers = [o for o in peers if rounded or agree(own.taps["logits"], o.taps["logits"])]
            self._strict[key] = replace(own, taps=taps, rows=largest_kl(own.rows, [o.rows for o in peers]))
        return self._strict[key]

    def be_lenient(self) -> "Evidence":
        """The same evidence, where a coarse RoPE table counts as rounding."""
        return replace(self, lenient=True, op_errors={}, _noise={}, _listed={})

    def candidate(self, pair: Pair) -> Measured:
        return self.measured(self.candidates[pair.path], pair.dtype)

    def listed(self, pair: Pair) -> Listed | None:
        """The log-probabilities that a candidate lists in place of logits, measured; None where it lists none."""
        if pair not in self._listed:
            rows = self.candidates[pair.path].meta.get("log_probs", {}).get(pair.dtype) or []
            self._listed[pair] = self._measure_listed(pair, rows) if any(rows) else None
        return self._listed[pair]

    def _measure_listed(self, pair: Pair, rows: list[dict[str, dict[str, float]]]) -> Listed:
        """Noise as everywhere: at each position, the largest error of any reference that agrees with the pair's own."""
        listing = Listing.of(rows)
        oracle = listing.read(self.oracle, pair.dtype)
        own, *others = (
            listing.measure(listing.read(trace, pair.dtype), oracle)
            for name, trace in sorted(self.judges(pair.path).items(), key=lambda item: item[0] != pair.reference)
        )
        error, kl = listing.measure(listing.values, oracle)
        noise = envelope(own[0], [o[0] for o in others])
        kl_noise = torch.stack([own[1], *(o[1] for o in others if agree(own[0], o[0]))]).amax(0)
        if self.lenient and self.coarse is not None and pair.dtype in self.coarse.meta["dtypes"]:
            drift, kl_drift = listing.measure(listing.read(self.coarse, pair.dtype), oracle)
            noise, kl_noise = replace(noise, drift=drift.error), kl_noise + kl_drift
        return Listed(error, noise, kl, kl_noise, listing.worst(oracle), len(listing.tokens), len(listing.places))

    def rho(self, pair: Pair, tap: str) -> tuple[float, int | None]:
        """The worst error ratio at a tap, over all sequences together and over each long one alone, and which."""
        candidate, reference = self.candidate(pair).taps[tap], self.reference(pair).taps[tap]
        return worst_ratio(candidate, reference, pair.dtype)

    def decided(self, pair: Pair, sequence: int) -> Tensor:
        """True (T,) where the oracle's margin exceeds what the reference's rounding could overturn."""
        largest = self.reference(pair).taps["logits"].worst[sequence]
        return self.oracle_rows(pair.dtype)[sequence].margin > DECIDED_MARGIN * largest

    def error_at(self, path: str | None, dtype: str, kind: str, sequence: int) -> TapError:
        """Extra logits of a candidate ("cached", "batch", ...) against the oracle's rows at their positions."""
        key = (path, dtype, kind, sequence)
        if key not in self._extra:
            trace, error = self.candidates[path], TapError()
            positions = trace.meta["extra"][dtype][kind][str(sequence)]
            expected = self.oracle.get(dtype, sequence, "logits")[positions]
            error.add(sequence, trace.get(dtype, sequence, f"logits@{kind}"), expected)
            self._extra[key] = error
        return self._extra[key]

    def _extras(self) -> Iterator[tuple[str | None, str, str, int]]:
        for dtype, path, trace in self.per_dtype():
            for kind, places in trace.meta.get("extra", {}).get(dtype, {}).items():
                yield from ((path, dtype, kind, int(sequence)) for sequence in places)

    def worst_extra(self, pair: Pair, kind: str) -> tuple[float, int] | None:
        """Another way to run sequences: the worst error ratio, of all together and of each alone, and in which."""
        places = self.candidates[pair.path].meta.get("extra", {}).get(pair.dtype, {}).get(kind, {})
        at = {int(sequence): positions for sequence, positions in places.items()}

        def rho(group: dict[int, list[int]]) -> float:
            errors = [self.error_at(pair.path, pair.dtype, kind, sequence) for sequence in group]
            together = TapError([e.error[0] for e in errors], width=errors[0].width)
            return relative(together, self.reference_at(pair, group), pair.dtype)

        alone = {sequence: rho({sequence: positions}) for sequence, positions in at.items()}
        if not alone:
            return None
        largest = max(alone, key=lambda i: float("inf") if alone[i] != alone[i] else alone[i])
        found = [(rho(at), largest)] + [(alone[i], i) for i, p in at.items() if len(p) >= FEW_POSITIONS]
        return max(found, key=lambda f: float("inf") if f[0] != f[0] else f[0])

    def noise_at(self, pair: Pair, places: dict[int, list[int]]) -> float:
        """The reference's error over these positions, by sequence, of its logits."""
        return noise(self.reference_at(pair, places), pair.dtype)

    def reference_at(self, pair: Pair, places: dict[int, list[int]]) -> TapError:
        """The reference's logits at these positions, by sequence, alone."""
        whole = self.reference(pair).taps["logits"]
        kinds = (whole.error, whole.expected, whole.drift)
        error, expected, drift = ([sums[i][p] for i, p in places.items()] if sums else [] for sums in kinds)
        return TapError(error, expected, width=whole.width, drift=drift)


def envelope(own: TapError, others: list[TapError], all_count: bool = False) -> TapError:
    """The errors of `own`, raised at each position to the largest of those that agree with it, or of all."""
    for other in others:
        if all_count or agree(own, other):
            error = [torch.maximum(a, b) for a, b in zip(own.error, other.error, strict=True)]
            worst = [torch.maximum(a, b) for a, b in zip(own.worst, other.worst, strict=True)]
            own = replace(own, error=error, worst=worst)
    return own


def with_drift(own: Measured, coarse: Measured) -> Measured:
    """A reference's errors, and what a coarse RoPE table adds to them at each position; nothing at taps before RoPE."""
    taps = {}
    for tap, error in own.taps.items():
        drift = coarse.taps[tap]
        worst = [torch.hypot(a, b) for a, b in zip(error.worst, drift.worst, strict=True)]
        taps[tap] = replace(error, drift=drift.error, worst=worst)
    pairs = zip(own.rows, coarse.rows, strict=True)
    return replace(own, taps=taps, rows=[replace(a, kl=a.kl + b.kl) for a, b in pairs])


def agree(own: TapError, other: TapError) -> bool:
    """Whether two references' errors are of one size."""
    close = other.rms() <= AGREE * own.rms() and own.rms() <= AGREE * other.rms()
    return close and len(other.error) == len(own.error)


def largest_kl(own: list[LogitRows], others: list[list[LogitRows]]) -> list[LogitRows]:
    """The KL of `own`, raised at each position to the largest of `others`."""
    for rows in others:
        own = [replace(a, kl=torch.maximum(a.kl, b.kl)) for a, b in zip(own, rows, strict=True)]
    return own


def worst_ratio(error: TapError, reference: TapError, dtype: str) -> tuple[float, int | None]:
    """Largest error ratio over all sequences together (None) and over each long sequence alone (its number)."""
    found = [(relative(error, reference, dtype, i), i) for i in judged(error)]
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])


def judged(error: TapError) -> list[int | None]:
    """What a ratio is taken over: all sequences together (None), and each long one alone (its number)."""
    lengths = [positions.numel() for positions in error.error]
    return [None, *(i for i, n in enumerate(lengths) if n >= LONG_SEQUENCE_TOKENS and len(lengths) > 1)]


def position_ratios(error: TapError, reference: TapError, dtype: str, sequence: int) -> Tensor:
    """The error ratio of each position of one sequence (T,), against that sequence's noise."""
    rms = (error.error[sequence] / error.width).sqrt()
    floor = torch.full_like(rms, own_noise(reference, dtype, sequence))
    if reference.drift:
        floor = (floor.square() + reference.drift[sequence] / error.width).sqrt()
    return torch.where(rms == 0, 0.0, rms / floor)  # inf where the floor is 0
