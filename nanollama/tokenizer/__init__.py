"""Text <-> token ids for every Llama: one interface, one module per kind of file.

| kind    | file                                                     | module      |
| ------- | -------------------------------------------------------- | ----------- |
| llama3  | Meta's tokenizer.model of Llama 3, 3.1, 3.2, 3.3         | llama3.py   |
| llama2  | sentencepiece's .model: Llama 2 and own vocabularies     | spm.py      |
| llama2c | llama2.c's tokenizer.bin                                 | llama2c.py  |
| hf      | Hugging Face's tokenizer.json, where it is all there is  | hf.py       |

    from nanollama.tokenizer import open_tokenizer
    tokenizer = open_tokenizer("Meta-Llama-3.1-8B/tokenizer.model")
    tokenizer.decode(tokenizer.encode("Once upon a time", bos=False))
"""

from pathlib import Path

from nanollama.tokenizer.base import AllowedSpecial, Stream, Tokenizer, TokenizerError, read_bytes

__all__ = ["AllowedSpecial", "Stream", "Tokenizer", "TokenizerError", "open_tokenizer"]


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer file of any kind by what is in it, whatever its name; raises TokenizerError."""
    # The kinds' modules import their libraries (tiktoken, sentencepiece, tokenizers): each only where it is needed.
    path = Path(path)
    data = read_bytes(path)
    if not data.strip():
        raise TokenizerError(f"tokenizer {path}: the file is empty")
    from nanollama.tokenizer.llama2c import load as load_bin
    from nanollama.tokenizer.llama2c import looks_like_bin

    if looks_like_bin(data):  # first: a longest token of 123 bytes makes the file start with "{"
        return load_bin(data, path)
    if data.lstrip()[:1] in (b"{", b"["):
        from nanollama.tokenizer.hf import load as load_json

        return load_json(data, path)
    from nanollama.tokenizer.llama3 import load as load_ranks
    from nanollama.tokenizer.llama3 import looks_like_ranks

    if looks_like_ranks(data):
        return load_ranks(data, path)
    from nanollama.tokenizer.spm import load as load_model
    from nanollama.tokenizer.spm import looks_like_model

    if looks_like_model(data):
        return load_model(data, path)
    raise TokenizerError(
        f"tokenizer {path}: starts with {data[:8]!r}, which is neither a Llama 3 rank file, a sentencepiece model, "
        "a llama2.c tokenizer.bin nor a tokenizer.json; a cut or a wrong file?"
    )
