"""The tokenizer in a .gguf's header as transformers reads it, where that reading follows the header.

python -c "from reference.files.gguf import open_gguf; print(open_gguf(__import__('pathlib').Path('x.gguf')))"
"""

from pathlib import Path
from typing import Any

from nanollama.gate.gguf import check
from reference.files.weights import Unusable, through_gate

# Values of tokenizer.ggml.pre (llama.cpp's names) for which a split of text is the right one.
GPT2_SPLIT = ("gpt-2", "gpt2", "phi-2")
THREE_DIGITS: tuple[str, ...] = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "llama4",
    "dbrx",
    "smaug-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
)
THREE_DIGITS += ("gpt-4o", "lfm2", "midm-2.0", "jina-v5-nano", "kanana2", "talkie", "minimax-m2", "tekken")


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def open_gguf(path: Path) -> Any:
    """Raises Unusable where transformers splits text in a way that the header does not ask for."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import read_gguf_metadata

    through_gate(check, path)
    options = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **options)
    header, _ = read_gguf_metadata(str(path))
    if header.get("tokenizer.ggml.model") == "gpt2":
        asked = header.get("tokenizer.ggml.pre")
        wrong = ignored(str(tokenizer.backend_tokenizer.pre_tokenizer), asked)
        if wrong is not None:
            raise Unusable(
                f"transformers cannot be the reference of this vocabulary: it splits text as {wrong} does, "
                f"though the header's tokenizer.ggml.pre is {asked!r}"
            )
    return tokenizer


def ignored(split: str, asked: object) -> str | None:
    """Whose split transformers took whatever the header says; None where the header asks for it."""
    if "use_regex=True" in split and asked not in GPT2_SPLIT:
        return "GPT-2"
    return "Llama 3" if "{1,3}" in split and asked not in THREE_DIGITS else None
