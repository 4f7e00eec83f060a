"""Train on text of your own: a .txt file, a .jsonl file with a field, a folder of them, or a folder of token shards.

python -m finetune.text --data notes/ --ckpt Llama-3.2-1B
"""

from pathlib import Path

from finetune import interrupts

if __name__ == "__main__":
    interrupts.announce_()

from finetune.config import TrainConfig
from finetune.errors import UserError
from finetune.prepare.cache import Say, path_source
from finetune.prepare.corpus import Format, Source
from finetune.run import Entry, run_entry


def find(config: TrainConfig, cache: Path, say: Say) -> Source | Path:
    """What `--data` names, which has to be given."""
    if config.data == "auto":
        raise UserError("--data is missing: name a .txt or .jsonl file, a folder of them, or a folder of token shards")
    if config.on_bad != "stop":
        raise UserError("--on_bad is finetune.chat's: a text that cannot be read always stops the run")
    return path_source(Path(config.data), Format.typed(config.separator, config.field), say)


ENTRY = Entry("text", find, {}, onward=(("teach it to chat", "finetune.chat --data DIALOGS.jsonl"),))

if __name__ == "__main__":
    run_entry(ENTRY)
