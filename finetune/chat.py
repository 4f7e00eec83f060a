"""Teach a checkpoint to chat: JSONL of messages, loss on what the assistant says and on its end of turn.

python -m finetune.chat --data dialogs.jsonl --ckpt Llama-3.2-1B --method lora
python -m nanollama chat Llama-3.2-1B --adapter out/RUN/adapter

The format is Llama 3's, or Llama 2's [INST] where the tokenizer is Llama 2's.
"""

from pathlib import Path

from finetune.config import TrainConfig
from finetune.dialogs import read_dialogs
from finetune.entry import Entry, run_entry
from finetune.prepare.cache import Prepared, Say
from finetune.prepare.shards import Vocabulary
from nanollama.tokenizer import open_tokenizer


def find(config: TrainConfig, cache: Path, say: Say) -> Path:
    """The file that `--data` names, which has to be given."""
    if config.data == "auto":
        raise ValueError("--data is missing: name a .jsonl file of dialogues")
    if not Path(config.data).is_file():
        raise ValueError(f"--data {config.data}: no such file: name a .jsonl file of dialogues")
    if not config.ckpt:
        raise ValueError("--ckpt is missing: name the checkpoint that learns to chat")
    return Path(config.data)


def make(config: TrainConfig, tokenizer: Path, say: Say) -> Prepared:
    """The dialogues as documents. Raises ValueError that names the line."""
    path, vocabulary = Path(config.data), Vocabulary.of(tokenizer)
    train, val = read_dialogs(path, open_tokenizer(tokenizer), config.seq_len)
    if len(val.lengths) == len(train.lengths):
        say(f"data: only {len(train.lengths)} dialogues: none is held out, validation is on the same")
    return Prepared(path.stem, tokenizer, vocabulary, train, val)


ENTRY = Entry("chat", find, {"chat_rows": "auto", "prompt": "Hello!"}, make=make, talks=True)

if __name__ == "__main__":
    run_entry(ENTRY)
