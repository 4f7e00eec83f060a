"""How byte-level BPE cuts a text before it merges: the patterns that GGUF knows by name, and those of a tokenizer.json.

Another pattern gives other ids, so a name that is not here is refused and never guessed at (llama.cpp#7476).

    python -c "from nanollama.vocabulary.spoken import pattern_of; print(pattern_of('smollm'))"

Sources: llama.cpp's llama-vocab.cpp for the names, the tokenizer.json of each model for the patterns.
"""

from typing import Any, NamedTuple

from nanollama.gate.tokenizers import DIGIT, GPT2, LLAMA3, QWEN2, TEKKEN
from nanollama.vocabulary.value import TokenizerError


class Pre(NamedTuple):
    """patterns: applied one after the other. whole: a word that is a token is taken as it is, before any merge."""

    patterns: tuple[str, ...]
    whole: bool = False


KNOWN = {
    "llama-bpe": Pre((LLAMA3,), whole=True),
    "gpt-2": Pre((GPT2,)),
    "smollm": Pre((DIGIT, GPT2)),
    "qwen2": Pre((QWEN2,)),
    "tekken": Pre((TEKKEN,), whole=True),
    "smaug-bpe": Pre((LLAMA3,)),
}
ALIASES = dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe")
ALIASES |= dict.fromkeys(("phi-2", "jais", "mpt", "olmo", "trillion", "gigachat", "jina-es", "jina-de"), "gpt-2")
ALIASES |= {"dbrx": "smaug-bpe"}
ALIASES |= dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm")
ALIASES |= dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez"), "qwen2")


def pattern_of(name: Any) -> Pre:
    """What a GGUF's `tokenizer.ggml.pre` means. Raises TokenizerError for a name that is not known."""
    known = KNOWN.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if known is None:
        what = "is missing" if name is None else f"is {name!r:.40}"
        raise TokenizerError(
            f"its pre-tokenizer (tokenizer.ggml.pre) {what}: known are {', '.join(KNOWN)}; "
            "give the model's own tokenizer.json with --tokenizer"
        )
    return known


def name_of(content: dict[str, Any]) -> str | None:
    """GGUF's name for what a byte-level tokenizer.json does before it merges; None where it has none."""
    patterns = _patterns(content.get("pre_tokenizer"))
    whole = bool(content["model"].get("ignore_merges"))
    return next((name for name, pre in KNOWN.items() if list(pre.patterns) == patterns and pre.whole == whole), None)


def _patterns(part: Any) -> list[str] | None:
    """The regular expressions that a pre-tokenizer applies in turn; None where it does anything else."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "Sequence":
        inner = [_patterns(p) for p in part.get("pretokenizers") or []]
        return None if None in inner else [pattern for found in inner for pattern in found or ()]
    if part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    if part.get("type") == "Digits" and part.get("individual_digits"):
        return [DIGIT]
    if part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part.get("pattern")
        return [pattern["Regex"]] if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str) else None
    return None


def pre_tokenizer(name: str) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json for one of GGUF's names. Raises TokenizerError."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pattern_of(name).patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, level]}
