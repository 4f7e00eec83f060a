"""Every tokenizer file -> one value, `Vocabulary`, and that value -> every tokenizer file. Knows no encoder.

    from nanollama.vocabulary import read
    vocabulary = read("Meta-Llama-3.1-8B/tokenizer.model")
    vocabulary.kind, len(vocabulary.tokens), vocabulary.tokens[vocabulary.bos_id]
    # ('bpe', 128256, b'<|begin_of_text|>')

value.py holds the value, read.py and from_json.py the readers, beside.py what lies beside the file, write.py and
to_json.py the writers, spoken.py the pre-tokenizers that files know by name.
"""

from nanollama.vocabulary.read import read
from nanollama.vocabulary.value import TokenizerError, Vocabulary

__all__ = ["TokenizerError", "Vocabulary", "read"]
