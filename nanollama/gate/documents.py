"""JSON and text files of strangers, within limits: a regular file, of a size that its kind has, strict JSON.

    from nanollama.gate.documents import read_json
    read_json(Path("config.json"))["hidden_size"]    # 4096

Strict: no key twice, no NaN or Infinity, no number beyond 64 bits, no object within 24 others.
"""

import json
from pathlib import Path
from typing import Any

from nanollama import gate
from nanollama.gate import CheckpointError

# Bytes. The largest published: a tokenizer.json of 35 MB, an index of 405B's weights of 100 KB, a template of 20 KB.
LIMITS = {"tokenizer": 1 << 27, "index": 1 << 24, "config": 1 << 20, "text": 1 << 22}
MAX_DEPTH = 24
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.bin", "vocab.json", "merges.txt")

WITHOUT_LIMIT = frozenset(("model_max_length",))  # transformers writes 1e30 as a whole number where there is none


def limit_of(path: Path) -> int:
    """Bytes that a file of this name may have."""
    if path.name in TOKENIZERS:
        return LIMITS["tokenizer"]
    if path.name.endswith(".index.json"):
        return LIMITS["index"]
    # tokenizer_config.json lists the special tokens, each with its flags, and holds the template.
    is_config = path.suffix == ".json" and not path.name.startswith(("tokenizer", "special", "added", "chat"))
    return LIMITS["config" if is_config else "text"]


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises CheckpointError, and OSError where it is gone."""
    limit = limit_of(path) if limit is None else limit
    gate.require_file(path)
    gate.require_inside(path)
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(path, f"has more than {limit:,} bytes, which no file of this kind has: it is not read")
    return data


def read_text(path: Path, limit: int | None = None) -> str:
    """A text in UTF-8. Raises CheckpointError, and OSError where it is gone."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"byte {error.start} is not UTF-8: save it as UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror}): check the path and its permissions") from None
    return parse(data, path)


def parse(data: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in these bytes. Raises CheckpointError that begins with `where`."""
    if not data.strip():
        raise CheckpointError(where, "is not JSON (it is empty): download it again")
    try:
        found = strict_json(data)
    except ValueError as error:
        mend = "; it is cut: download it again" if _is_cut(error) else ": mend it, or get it from its publisher"
        raise CheckpointError(where, f"is not JSON ({gate.reason(error)}){mend}") from None
    if not isinstance(found, dict):
        raise CheckpointError(where, f"holds a JSON {type(found).__name__}, expected an object {{...}}")
    return found


def strict_json(data: bytes) -> Any:
    """The value in these bytes. Raises ValueError; JSON and Unicode errors are such."""
    try:
        found = json.loads(
            data, object_pairs_hook=_pairs, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_number
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    _check_depth(found)
    return found


def _is_cut(error: ValueError) -> bool:
    """Whether it goes wrong where it ends."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(error.doc) - 1 or error.msg.startswith("Unterminated")


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    for key, value in items:
        if type(value) is int and not -(2**63) <= value < 2**64 and key not in WITHOUT_LIMIT:
            raise ValueError(f"{key[:60]} is {gate.shown(value)}, a number of more than 64 bits")
    if len(found) < len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {gate.shown(twice)} stands there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > 4000:  # beyond which Python reads none
        raise ValueError(f"the number {digits[:24]}... has more than 64 bits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text[:1000])
    if value in (float("inf"), float("-inf")) or len(text) > 1000:
        raise ValueError(f"the number {text[:24]} is beyond 64 bits")
    return value


def _check_depth(found: Any) -> None:
    """Layer by layer, for the recursion of those who read it."""
    layer = [found]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in layer if isinstance(item, (dict, list))]
        layer = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not layer:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
