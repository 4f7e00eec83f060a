"""sentencepiece's compiled rules for rewriting text (nmt_nfkc and the like), checked: C++ and Rust follow them blindly.

The bytes are a uint32 size, a double-array trie of that many bytes (uint32 units), and NUL-terminated replacements.

    python -c "from nanollama.gate.charsmap import check_charsmap; check_charsmap(b'')"

Source: sentencepiece's normalizer.cc (DecodePrecompiledCharsMap) and darts-clone for the units.
"""

import numpy as np


def check_charsmap(rules: bytes) -> None:
    """Raises ValueError unless every step through the trie stays inside it, and every replacement in the text."""
    if not rules:
        return
    size = int.from_bytes(rules[:4], "little")
    if len(rules) <= 4 or size < 1024 or size % 1024 or size >= len(rules) - 4 or rules[-1:] != b"\0":
        raise ValueError("its rules for rewriting text (precompiled_charsmap) are cut or damaged")
    units = np.frombuffer(rules, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
    is_value = units >> 31 == 1
    # From unit i a byte b leads to i ^ offset ^ b.
    blocks = np.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6)) | 255
    inside = np.where(is_value, (units & 0x7FFFFFFF) < len(rules) - 4 - size, blocks < len(units))
    if not inside.all():
        raise ValueError(f"its rules for rewriting text (precompiled_charsmap) lead outside at {int(inside.argmin())}")
