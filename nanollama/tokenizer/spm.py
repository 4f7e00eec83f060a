"""Llama 2's tokenizer and own vocabularies: a sentencepiece .model, encoded by the sentencepiece package.

llama2.c's tokenizer.bin, and the vocabulary of such a model in a GGUF, are written as one first. The package is C++ and
trusts its file, so nanollama.vocabulary reads and checks it before; decoding is ours, so that a stream of ids and a list
of ids give the same text.

    python -c "from nanollama.tokenizer import open_tokenizer; print(open_tokenizer('tokenizer.model').encode('Hi', bos=True))"
    [1, 6324]
"""  # noqa: E501

import sentencepiece

from nanollama.tokenizer.base import Encoder, by_parts
from nanollama.vocabulary import TokenizerError, Vocabulary
from nanollama.vocabulary.write import sentencepiece as written


def encoder(vocabulary: Vocabulary) -> Encoder:
    """Raises TokenizerError where the package refuses the model."""
    data = vocabulary.data if vocabulary.format == "sentencepiece" else written(vocabulary)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise TokenizerError(f"not a usable sentencepiece model: {' '.join(str(error).split())[:200]}") from None
    return by_parts(processor.encode, vocabulary.special_ids)
