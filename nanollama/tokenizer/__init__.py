"""Text <-> token ids for every Llama: one class, one encoder for each kind of file, which is run as it stands.

| file                                                      | encoder                 | module    |
| --------------------------------------------------------- | ----------------------- | --------- |
| Meta's tokenizer.model of Llama 3, 3.1, 3.2, 3.3          | tiktoken                | llama3.py |
| sentencepiece's .model (Llama 2, own), llama2.c's .bin    | sentencepiece           | spm.py    |
| Hugging Face's tokenizer.json; byte-level BPE in a .gguf  | tokenizers              | hf.py     |

    from nanollama.tokenizer import open_tokenizer
    tokenizer = open_tokenizer("Meta-Llama-3.1-8B/tokenizer.model")
    tokenizer.decode(tokenizer.encode("Once upon a time", bos=False))
"""

from pathlib import Path

from nanollama.tokenizer.base import AllowedSpecial, Tokenizer
from nanollama.vocabulary import TokenizerError, Vocabulary, read

__all__ = ["AllowedSpecial", "Tokenizer", "TokenizerError", "from_vocabulary", "open_tokenizer"]


def open_tokenizer(path: str | Path, rows: int = 0) -> Tokenizer:
    """Opens a tokenizer file of any kind (a .gguf, too) by what is in it; raises TokenizerError.

    rows: of the model's embedding, where it has more than the file has tokens: those ids decode to nothing.
    """
    try:
        return from_vocabulary(read(path), rows)
    except TokenizerError as error:
        where = f"tokenizer {path}: "
        raise TokenizerError(where + str(error).removeprefix(where)) from None


def from_vocabulary(vocabulary: Vocabulary, rows: int = 0) -> Tokenizer:
    """The tokenizer of a vocabulary; raises TokenizerError where the library that encodes refuses it."""
    # The encoders import their libraries: each only where it is needed.
    if vocabulary.content is not None or (vocabulary.kind == "bpe" and vocabulary.merges is not None):
        from nanollama.tokenizer.hf import encoder
    elif vocabulary.kind == "bpe":
        from nanollama.tokenizer.llama3 import encoder
    else:
        from nanollama.tokenizer.spm import encoder
    return Tokenizer(vocabulary, encoder(vocabulary), rows)
