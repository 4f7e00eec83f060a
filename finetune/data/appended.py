"""Whether documents are those of before with more behind them: what a run that goes on may find in its data.

before = Extent.of(documents)                # saved with the run
Extent.of(grown).begins_with(before)
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from finetune.data.documents import Documents, whole, whole_mask

LOOKED_AT = 512  # documents, evenly spread, whose tokens count; of all others the lengths


@dataclass(frozen=True)
class Extent:
    """The first `count` documents of some data, by a digest of their lengths and of the tokens of some."""

    count: int
    digest: str
    first: Callable[[int], str] | None = field(default=None, compare=False, repr=False)  # the digest of the first n

    @classmethod
    def of(cls, documents: Documents) -> "Extent":
        count = len(documents.lengths)
        return cls(count, digest(documents, count), lambda n: digest(documents, n))

    @classmethod
    def read(cls, saved: object) -> "Extent | None":
        """As `saved` gave it; None for anything else."""
        fits = isinstance(saved, dict) and type(saved.get("count")) is int and type(saved.get("digest")) is str
        return cls(saved["count"], saved["digest"]) if fits and isinstance(saved, dict) else None

    def begins_with(self, before: "Extent") -> bool:
        assert self.first is not None, "an extent that was read from a file knows no documents"
        return 0 < before.count <= self.count and self.first(before.count) == before.digest

    def saved(self) -> dict[str, int | str]:
        return {"count": self.count, "digest": self.digest}


def digest(documents: Documents, count: int) -> str:
    """Of the first `count` documents."""
    found = hashlib.sha256(np.ascontiguousarray(documents.lengths[:count], dtype="<i8").tobytes())
    for i in np.unique(np.linspace(0, max(0, count - 1), min(count, LOOKED_AT)).astype(np.int64)).tolist():
        found.update(whole(documents, i).astype("<i8").tobytes() + whole_mask(documents, i).tobytes())
    return found.hexdigest()
