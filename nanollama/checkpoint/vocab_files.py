"""Old names of nanollama.vocabulary's writers, for programs that import them from here."""

from nanollama.vocabulary.to_json import merges, printable, tokenizer_json
from nanollama.vocabulary.write import llama2c, ranks, sentencepiece

__all__ = ["llama2c", "merges", "printable", "ranks", "sentencepiece", "tokenizer_json"]
