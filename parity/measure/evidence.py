"""Evidence: the traces of one run, and what is measured on them: noise floors and errors, each once."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from parity.candidates.conditions import Conditions
from parity.contract import Case
from parity.explain.explained import Explained
from parity.measure import noise
from parity.measure.listed import Listed, Listing
from parity.measure.metrics import (
    Measured,
    OracleRows,
    TapError,
    compare,
    measure,
    noise_rms,
    oracle_rows,
    own_noise,
    relative,
)
from parity.measure.tolerances import DECIDED_MARGIN, FEW_POSITIONS, LONG_SEQUENCE_TOKENS
from parity.trace import Trace

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One judgement's parties: a reference, a dtype and one path of the candidate."""

    reference: str
    dtype: str
    path: str | None

    @property
    def labels(self) -> dict[str, Any]:
        return {"reference": self.reference, "dtype": self.dtype, "path": self.path}


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch's kernels on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Kept:
    """Measurements by what they are of: each is made once, however many checks ask."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._found:
            self._found[key] = make()
        found: T = self._found[key]
        return found


@dataclass(frozen=True, eq=False)
class Evidence:
    """The traces of one run. A value: the runner makes it, and what is measured on it is kept apart, in `floors` (of
    the references, which other candidates share) and `errors` (of the candidate)."""

    case: Case
    oracle: Trace
    references: dict[str, Trace]
    candidates: dict[str | None, Trace]  # by path; {None: trace} for a candidate with one path
    witnesses: tuple[Trace, ...] = ()  # token ids alone, by references that no gate asks
    forced: dict[str, Trace] = field(default_factory=dict)  # the references, cut short: inputs of the op gates
    rounded: dict[str, Trace] = field(default_factory=dict)  # by conditions: the oracle that rounds so
    ops: dict[str, Trace] = field(default_factory=dict)  # the oracle's operations on these inputs, see checks/ops.py
    coarse: Trace | None = None  # the oracle with its RoPE frequencies TABLE_ULP off
    lenient: bool = False  # whether what a table so coarse makes counts as rounding, see parity/measure/rope_table.py
    explained: Explained | None = None  # what the table of mistakes says about the first divergence
    untrained: str = "training is checked on small checkpoints in fp32"  # why the case trains nothing
    floors: Kept = field(default_factory=Kept, repr=False)
    errors: Kept = field(default_factory=Kept, repr=False)

    def of_candidates(self, candidates: dict[str | None, Trace]) -> "Evidence":
        """The same references, asked about others: what was measured on the references is kept."""
        return replace(self, candidates=candidates, errors=Kept())

    def measure_all(self, workers: int, dtypes: list[str]) -> None:
        """Measure everything that the gates ask for at these dtypes, in threads: torch leaves the interpreter lock.

        Single-threaded kernels side by side keep their speed on a busy machine, where threads inside one do not.
        """
        with single_threaded(), ThreadPoolExecutor(workers) as pool:
            list(pool.map(self.oracle_rows, dict.fromkeys(dtypes)))
            runs = [(trace, dtype) for dtype, _, trace in self.per_dtype() if dtype in dtypes]
            known = (*self.references.values(), *self.rounded.values(), *([self.coarse] if self.coarse else ()))
            runs += [(trace, dtype) for trace in known for dtype in dtypes if dtype in trace.meta["dtypes"]]
            list(pool.map(lambda run: self.measured(*run), runs))
            pairs = [pair for pair in self.pairs() if pair.dtype in dtypes]
            list(pool.map(lambda job: self.pairwise(*job), [(p, t) for p in pairs for t in self.shared(p)]))
            list(pool.map(self.listed, pairs))
            list(pool.map(lambda job: self.error_at(*job), [x for x in self._extras() if x[1] in dtypes]))

    def measure_references(self, dtypes: list[str]) -> None:
        """What of this needs no candidate: it can be done while one runs."""
        with single_threaded():
            for dtype in dtypes:
                for trace in self.references.values():
                    if dtype in trace.meta["dtypes"]:
                        self.measured(trace, dtype)

    # --- Parties -----------------------------------------------------------------------------------------------------

    def pairs(self) -> Iterator[Pair]:
        for path, trace in self.candidates.items():
            for dtype in self.case.dtypes:
                if dtype in trace.meta["dtypes"]:
                    yield from (Pair(name, dtype, path) for name in self.yardsticks(path))

    def yardsticks(self, path: str | None) -> dict[str, Trace]:
        """Whose error a path of the candidate is measured by: the references', or under declared conditions, the error
        that such rounding makes in the oracle itself."""
        said = Conditions.of(self.candidates[path].meta)
        return {f"oracle {said}": self.rounded[str(said)]} if said else self.references

    def per_dtype(self) -> Iterator[tuple[str, str | None, Trace]]:
        """(dtype, path, trace) of each candidate run, for checks that need no reference."""
        for path, trace in self.candidates.items():
            yield from ((dtype, path, trace) for dtype in self.case.dtypes if dtype in trace.meta["dtypes"])

    def shared(self, pair: Pair) -> list[str]:
        """Taps that the candidate and the reference both have, in order of computation."""
        theirs = self.noise_floor(pair).taps
        return [tap for tap in self.candidate(pair).taps if tap in theirs]

    # --- Noise floors ------------------------------------------------------------------------------------------------

    def noise_floor(self, pair: Pair) -> Measured:
        """What counts as rounding: at each position, the largest error that any reference makes there (noise.py)."""
        # Of large checkpoints, dtypes run one after the other, and not every one was in doubt.
        if not self.lenient or self.coarse is None or pair.dtype not in self.coarse.meta["dtypes"]:
            return self.strict_noise_floor(pair)
        strict, coarse = self.strict_noise_floor(pair), self.measured(self.coarse, pair.dtype)
        key = ("lenient", self.yardsticks(pair.path)[pair.reference], pair.dtype, self.coarse)
        return self.floors.once(key, lambda: noise.add_drift(strict, coarse))

    def strict_noise_floor(self, pair: Pair) -> Measured:
        """The same without an allowance for coarse RoPE tables."""
        yardstick = self.yardsticks(pair.path)[pair.reference]
        others = [trace for name, trace in self.references.items() if name != pair.reference]

        def join() -> Measured:
            own, *rest = (self.measured(trace, pair.dtype) for trace in (yardstick, *others))
            return noise.join_floors(own, rest, declared=pair.reference not in self.references)

        return self.floors.once(("strict", yardstick, *others, pair.dtype), join)

    def be_lenient(self) -> "Evidence":
        """The same evidence, where a coarse RoPE table counts as rounding."""
        return replace(self, lenient=True)

    def noise_at(self, pair: Pair, places: dict[int, list[int]]) -> float:
        """The noise of the logits over these positions, by sequence."""
        return noise_rms(self.floor_at(pair, places), pair.dtype)

    def floor_at(self, pair: Pair, places: dict[int, list[int]]) -> TapError:
        """The noise floor of the logits at these positions, by sequence, alone."""
        return noise.pick_positions(self.noise_floor(pair).taps["logits"], places)

    # --- Errors ------------------------------------------------------------------------------------------------------

    def measured(self, trace: Trace, dtype: str) -> Measured:
        """One trace against the oracle."""
        kept = self.errors if any(trace is mine for mine in self.candidates.values()) else self.floors
        key = ("measured", trace, dtype)
        return kept.once(key, lambda: measure(trace, self.oracle, dtype, self.oracle_rows(dtype)))

    def oracle_rows(self, dtype: str) -> list[OracleRows]:
        """The oracle's own choices, per sequence; dtypes that round the weights alike share them."""

        def rows() -> list[OracleRows]:
            return [oracle_rows(self.oracle.get(dtype, i, "logits")) for i in range(len(self.oracle.sequences))]

        return self.floors.once(("oracle rows", self.oracle.meta["dtypes"][dtype]), rows)

    def pairwise(self, pair: Pair, tap: str) -> TapError:
        """One tap of the candidate against the reference's."""
        mine, theirs = self.candidates[pair.path], self.yardsticks(pair.path)[pair.reference]
        key = ("pairwise", mine, theirs, pair.dtype, tap)
        return self.errors.once(key, lambda: compare(mine, theirs, pair.dtype, tap))

    def candidate(self, pair: Pair) -> Measured:
        return self.measured(self.candidates[pair.path], pair.dtype)

    def listed(self, pair: Pair) -> Listed | None:
        """The log-probabilities that a candidate lists in place of logits, measured; None where it lists none."""
        trace = self.candidates[pair.path]
        rows = trace.meta.get("log_probs", {}).get(pair.dtype) or []
        key = ("listed", trace, pair, self.lenient, self.coarse)
        return self.errors.once(key, lambda: self._measure_listed(pair, rows) if any(rows) else None)

    def _measure_listed(self, pair: Pair, rows: list[dict[str, dict[str, float]]]) -> Listed:
        """Noise as everywhere: at each position, the largest error of any reference that agrees with the pair's own."""
        listing = Listing.of(rows)
        oracle = listing.read(self.oracle, pair.dtype)
        own, *others = (
            listing.measure(listing.read(trace, pair.dtype), oracle)
            for name, trace in sorted(self.yardsticks(pair.path).items(), key=lambda item: item[0] != pair.reference)
        )
        error, kl = listing.measure(listing.values, oracle)
        floor = noise.raise_to(own[0], [o[0] for o in others])
        kl_floor = torch.stack([own[1], *(o[1] for o in others if noise.agree(own[0], o[0]))]).amax(0)
        if self.lenient and self.coarse is not None and pair.dtype in self.coarse.meta["dtypes"]:
            drift, kl_drift = listing.measure(listing.read(self.coarse, pair.dtype), oracle)
            floor, kl_floor = replace(floor, drift=drift.error), kl_floor + kl_drift
        return Listed(error, floor, kl, kl_floor, listing.worst(oracle), len(listing.tokens), len(listing.places))

    def rho(self, pair: Pair, tap: str) -> tuple[float, int | None]:
        """The worst error ratio at a tap, over all sequences together and over each long one alone, and which."""
        return worst_ratio(self.candidate(pair).taps[tap], self.noise_floor(pair).taps[tap], pair.dtype)

    def decided(self, pair: Pair, sequence: int) -> Tensor:
        """True (T,) where the oracle's margin exceeds what rounding could overturn."""
        largest = self.noise_floor(pair).taps["logits"].worst[sequence]
        return self.oracle_rows(pair.dtype)[sequence].margin > DECIDED_MARGIN * largest

    def error_at(self, path: str | None, dtype: str, kind: str, sequence: int) -> TapError:
        """Extra logits of a candidate ("cached", "batch", ...) against the oracle's rows at their positions."""
        trace = self.candidates[path]

        def compare_rows() -> TapError:
            error, positions = TapError(), trace.meta["extra"][dtype][kind][str(sequence)]
            expected = self.oracle.get(dtype, sequence, "logits")[positions]
            error.add(sequence, trace.get(dtype, sequence, f"logits@{kind}"), expected)
            return error

        return self.errors.once(("extra", trace, dtype, kind, sequence), compare_rows)

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
            return relative(together, self.floor_at(pair, group), pair.dtype)

        alone = {sequence: rho({sequence: positions}) for sequence, positions in at.items()}
        if not alone:
            return None
        largest = max(alone, key=lambda i: float("inf") if alone[i] != alone[i] else alone[i])
        found = [(rho(at), largest)] + [(alone[i], i) for i, p in at.items() if len(p) >= FEW_POSITIONS]
        return max(found, key=lambda f: float("inf") if f[0] != f[0] else f[0])


def worst_ratio(error: TapError, reference: TapError, dtype: str) -> tuple[float, int | None]:
    """Largest error ratio over all sequences together (None) and over each long sequence alone (its number)."""
    found = [(relative(error, reference, dtype, i), i) for i in groups_of(error)]
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])


def groups_of(error: TapError) -> list[int | None]:
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
