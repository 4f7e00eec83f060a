"""Old names of nanollama.vocabulary, for programs that import them from here."""

from nanollama.vocabulary.read import read
from nanollama.vocabulary.value import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

__all__ = ["BYTE", "CONTROL", "NORMAL", "SPACE", "UNKNOWN", "UNUSED", "USER_DEFINED", "Vocabulary", "read"]
