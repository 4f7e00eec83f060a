"""Log-probabilities that a candidate lists in place of logits: a few tokens at some positions, against the oracle's.

    listing = Listing.of(trace.meta["log_probs"]["fp32"])
    error, kl = listing.measure(listing.values, listing.read(oracle, "fp32"))

Errors are taken as those of logits are, position by position. KL is that of the distributions over the tokens that are
listed, each renormalised to them: what is left over is a difference from 1, which a server's float32 does not hold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parity.measure.metrics import TapError, blocks
from parity.trace import Trace


@dataclass(frozen=True)
class Listing:
    """N numbers, sorted by sequence and position."""

    places: list[tuple[int, int]]  # the P positions that anything is listed at: sequence, position
    group: Tensor  # (N,) the index of its place
    tokens: Tensor  # (N,) ids
    values: Tensor  # (N,) float64: log-probabilities, nats
    sequences: int  # of the case, with or without a listing

    @classmethod
    def of(cls, rows: list[dict[str, dict[str, float]]]) -> "Listing":
        """rows: for each sequence {position: {id: log-probability}}, as trace.json has it."""
        found = [
            (i, int(p), row) for i, of in enumerate(rows) for p, row in sorted(of.items(), key=lambda x: int(x[0]))
        ]
        group = [n for n, (_, _, row) in enumerate(found) for _ in row]
        tokens = [int(token) for _, _, row in found for token in row]
        values = torch.tensor([x for _, _, row in found for x in row.values()], dtype=torch.float64)
        places = [(i, position) for i, position, _ in found]
        return cls(places, torch.tensor(group), torch.tensor(tokens), values, len(rows))

    def read(self, trace: Trace, dtype: str) -> Tensor:
        """The log-probabilities (N,) of the same tokens by a trace's logits, in float64."""
        found = torch.empty_like(self.values)
        for sequence in {i for i, _ in self.places}:
            logits = trace.get(dtype, sequence, "logits")  # (T, V)
            norms = torch.cat([torch.logsumexp(logits[block].double(), 1) for block in blocks(*logits.shape)])
            mine = torch.tensor([i == sequence for i, _ in self.places])[self.group]
            positions = torch.tensor([p for _, p in self.places])[self.group[mine]]
            found[mine] = logits[positions, self.tokens[mine]].double() - norms[positions]
        return found

    def measure(self, values: Tensor, oracle: Tensor) -> tuple[TapError, Tensor]:
        """values, oracle (N,) -> mean squared errors by position, and KL(oracle || values) (P,) in nats.

        No KL where few positions have two tokens: of one alone it is 0.
        """
        difference = values - oracle
        squares = self._means(difference.square())
        expected = self._means(oracle.square())
        worst = torch.zeros(len(self.places), dtype=torch.float64)
        worst = worst.scatter_reduce(0, self.group, difference.abs(), "amax")
        error = TapError(self._split(squares), self._split(expected), self._split(worst))
        return error, self._kl(values, oracle) if len(self.tokens) >= 2 * len(self.places) else torch.empty(0)

    def worst(self, oracle: Tensor) -> str:
        """Where the largest error is; a NaN counts as the largest."""
        n = int(torch.nan_to_num((self.values - oracle).abs(), nan=torch.inf).argmax())
        sequence, position = self.places[int(self.group[n])]
        values = f"{float(self.values[n]):.6g} for {float(oracle[n]):.6g}"
        return f"sequence {sequence}, position {position}, token {int(self.tokens[n])}: {values}"

    def _sums(self, x: Tensor) -> Tensor:
        return torch.zeros(len(self.places), dtype=torch.float64).index_add(0, self.group, x)

    def _means(self, x: Tensor) -> Tensor:
        return self._sums(x) / self._sums(torch.ones_like(x))

    def _kl(self, values: Tensor, oracle: Tensor) -> Tensor:
        p, q = (x - self._sums(x.exp()).log()[self.group] for x in (oracle, values))
        return self._sums(p.exp() * (p - q)).clamp_min(0)  # clamp keeps NaN

    def _split(self, x: Tensor) -> list[Tensor]:
        counts = [0] * self.sequences
        for sequence, _ in self.places:
            counts[sequence] += 1
        return list(x.split(counts))


@dataclass(frozen=True)
class Listed:
    """A candidate's log-probabilities against the oracle's, beside a reference's. Statistics over P positions."""

    error: TapError
    noise: TapError
    kl: Tensor  # (P,) nats
    kl_noise: Tensor  # (P,) nats, the reference's
    where: str  # the candidate's largest error
    numbers: int
    positions: int
