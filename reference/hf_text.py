"""Token ids by transformers: the folder's tokenizer.json, else its own conversion of Meta's tokenizer files.

from reference.hf_text import HfText
HfText(checkpoint, None).encode("Hello", bos=True)    # [128000, 9906]
"""

from pathlib import Path
from typing import Any

from reference.files import Checkpoint
from reference.meta_text import is_tiktoken, tool_call
from reference.protocol import Dialog
from reference.weights import Unusable

# The special tokens of Llama 3.1 in the order of their ids; the reserved ones fill up to 256.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
]
LLAMA3_SPECIAL += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
LLAMA3_SPECIAL += ["<|eot_id|>", "<|python_tag|>", "<|image|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "</s>")


class HfText:
    def __init__(self, checkpoint: Checkpoint, tokenizer: str | None):
        path = Path(tokenizer) if tokenizer else checkpoint.find("tokenizer.json", "tokenizer.model")
        if path is None:
            raise Unusable("no tokenizer.json or tokenizer.model lies with the checkpoint; transformers needs one")
        try:
            self.model = open_tokenizer(path)
        except Exception as error:  # each library has errors of its own for a broken file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            raise Unusable(f"{path}: transformers cannot read this tokenizer ({reason})") from None
        vocabulary = self.model.get_vocab()
        self.bos_id = vocabulary.get("<|begin_of_text|>", vocabulary.get("<s>"))
        self.stop_ids = frozenset(vocabulary[token] for token in STOP_TOKENS if token in vocabulary)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The text alone, its special tokens' names as plain text, and BOS by hand: files differ in adding it."""
        ids = self.model.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [self.bos_id] * bos + ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, clean_up_tokenization_spaces=False)

    def dialog(self, messages: Dialog) -> list[int] | None:
        """By the chat template that the folder brings; None where it brings none."""
        if not self.model.chat_template:
            return None
        template = [_openai_message(message) for message in messages]
        return self.model.apply_chat_template(template, add_generation_prompt=True, return_dict=False)


def open_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if path.suffix == ".json":
        folder = path.parent
        has_config = (folder / "tokenizer_config.json").exists()
        return (
            AutoTokenizer.from_pretrained(folder) if has_config else PreTrainedTokenizerFast(tokenizer_file=str(path))
        )
    with path.open("rb") as file:
        start = file.read(4096)
    if not is_tiktoken(start):
        return _from_sentencepiece(path)
    converted = TikTokenConverter(str(path), extra_special_tokens=LLAMA3_SPECIAL).converted()
    return PreTrainedTokenizerFast(tokenizer_object=converted, bos_token="<|begin_of_text|>")


def _from_sentencepiece(path: Path) -> Any:
    """transformers' tokenizer of the same vocabulary: its own reader of .model files needs one more package."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces)}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, scores))
    # The class swallows a space at the beginning of a text; Meta's published tokenizer.json and sentencepiece do not.
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _openai_message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {"content": "", **{key: value for key, value in message.items() if key in ("role", "content")}}
    calls = [tool_call(call) for call in message.get("tool_calls") or []]
    if calls:
        functions = [{"name": call["tool_name"], "arguments": call["arguments"]} for call in calls]
        kept["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return kept
