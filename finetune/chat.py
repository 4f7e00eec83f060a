"""Teach a checkpoint to chat: dialogues of any usual shape, loss on what the assistant says and on its end of turn.

python -m finetune.chat --data dialogs.jsonl --ckpt Llama-3.2-1B --method lora
python -m nanollama chat Llama-3.2-1B --adapter out/RUN/adapter

The format is the checkpoint's own chat template; without one Llama 3's, or Llama 2's [INST] where the tokenizer is
Llama 2's. The run says which.
"""

from pathlib import Path

from finetune import interrupts

if __name__ == "__main__":
    interrupts.announce_()

from finetune.config import TrainConfig
from finetune.data.dialogs import read_dialogs
from finetune.data.files import Say
from finetune.data.rows import is_hub_id
from finetune.errors import UserError
from finetune.prepare.cache import Prepared
from finetune.prepare.shards import Vocabulary
from finetune.run import Entry, run_entry
from nanollama.chat import template_source
from nanollama.tokenizer import open_tokenizer

KINDS = "a .jsonl, .json, .csv or .parquet file of dialogues, a folder of them, or a data set of the hub (owner/name)"


def find(config: TrainConfig, cache: Path, say: Say) -> Path:
    """What `--data` names, which has to be given."""
    if config.data == "auto":
        raise UserError(f"--data is missing: name {KINDS}")
    if not Path(config.data).exists() and not is_hub_id(config.data):
        raise UserError(f"--data {config.data}: no such file or folder: name {KINDS}")
    if not config.ckpt:
        raise UserError("--ckpt is missing: name the checkpoint that learns to chat")
    return Path(config.data)


def make(config: TrainConfig, tokenizer: Path, say: Say) -> Prepared:
    """The dialogues as documents. Raises UserError that names the line."""
    path, vocabulary = Path(config.data), Vocabulary.of(tokenizer)
    opened, out = open_tokenizer(tokenizer), Path(config.out) if config.out else None
    say(f"chat format: {template_source(opened)}")
    apart, bad = config.val_data is not None, config.on_bad
    train, val = read_dialogs(path, opened, config.seq_len, on_bad=bad, say=say, out=out, hold_out=not apart)
    if config.val_data:
        _, val = read_dialogs(Path(config.val_data), opened, config.seq_len, on_bad=bad, say=say, hold_out=False)
    elif len(val.lengths) == len(train.lengths):
        say(f"data: only {len(train.lengths)} dialogues: none is held out, validation is on the same")
    return Prepared(path.stem, tokenizer, vocabulary, train, val)


ENTRY = Entry("chat", find, {"chat_rows": "auto", "prompt": "Hello!"}, make=make, talks=True)

if __name__ == "__main__":
    run_entry(ENTRY)
