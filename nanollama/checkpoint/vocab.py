"""Old names of nanollama.vocabulary, for programs that import them from here."""

from nanollama.vocabulary.read import read
from nanollama.vocabulary.value import SPACE, TokenType, Vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = TokenType
__all__ = ["BYTE", "CONTROL", "NORMAL", "SPACE", "UNKNOWN", "UNUSED", "USER_DEFINED", "Vocabulary", "read"]
