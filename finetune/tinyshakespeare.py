"""Train on tinyshakespeare: one document, the last tenth held out.

python -m finetune.tinyshakespeare --data tinyshakespeare.txt --max_steps 300
"""

from pathlib import Path

from finetune import interrupts

if __name__ == "__main__":
    interrupts.announce_()

from finetune.config import TrainConfig
from finetune.prepare.cache import Say, path_source
from finetune.prepare.corpus import Format, Source
from finetune.prepare.download import tinyshakespeare
from finetune.run import Entry, run_entry


def find(config: TrainConfig, cache: Path, say: Say) -> Source | Path:
    """`--data PATH`, else the download."""
    path = tinyshakespeare(cache) if config.data == "auto" else Path(config.data)
    return path_source(path, Format.typed(config.separator, config.field, config.on_bad), say)


# Hardly more words than bytes and the text's characters, nearly as in char-rnn: against 512 words, 300 steps come to
# 2.50 bits per byte instead of 2.51, and the bigram model to 3.26 instead of 2.86.
ENTRY = Entry(
    "tinyshakespeare",
    find,
    {"prompt": "ROMEO:"},
    suggested={"vocab_size": 325, "seq_len": 128, "batch_size": 32},
    onward=(("train it on", "finetune.text --data NOTES.txt --method lora"),),
)

if __name__ == "__main__":
    run_entry(ENTRY)
