"""Documents as training sees them: token sequences by number, some with a mask of the tokens that are labels.

documents.tokens(7, 0, 100)          # the first hundred tokens of document 7
mask_of(documents, 7, 0, 100)        # which of them are to be predicted
"""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
IGNORE = -100  # label of a token whose successor is not to be predicted; torch's own convention
HOLD_OUT_EACH = 20  # every 20th document is held out


class Documents(Protocol):
    """Token sequences that each begin with BOS, if there is one."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def lengths(self) -> Ints:
        """Tokens of each document, its BOS included."""

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        """A part of one document."""


@runtime_checkable
class MaskedDocuments(Documents, Protocol):
    """Documents of which only some tokens are to be predicted."""

    def mask(self, document: int, start: int, stop: int) -> Bools:
        """Which tokens of a part of one document are labels."""


def mask_of(documents: Documents, document: int, start: int, stop: int) -> Bools:
    """Which tokens of a part are labels; all, where the documents have no mask, but for a first one without BOS."""
    if isinstance(documents, MaskedDocuments):
        return documents.mask(document, start, stop)
    return np.arange(start, stop) >= (documents.bos_id is None)


def first_documents(documents: Documents, max_tokens: int) -> int:
    return min(len(documents.lengths), int(np.searchsorted(np.cumsum(documents.lengths), max_tokens)) + 1)


def whole(documents: Documents, i: int) -> Ints:
    return documents.tokens(i, 0, int(documents.lengths[i]))


def whole_mask(documents: Documents, i: int) -> Bools:
    """Which tokens of one document are labels."""
    return mask_of(documents, i, 0, int(documents.lengths[i]))
