"""Train on text of your own: .txt, .md, rows with a field (.jsonl, .csv, .tsv, .parquet), a folder of such files, a
data set of the hub, or a folder of token shards.

python -m finetune.text --data notes/ --ckpt Llama-3.2-1B
"""

from pathlib import Path

from finetune import interrupts

if __name__ == "__main__":
    interrupts.announce_()

from finetune.config import TrainConfig
from finetune.data.rows import is_hub_id
from finetune.errors import UserError
from finetune.prepare.cache import Say, hub_source, path_source
from finetune.prepare.corpus import Format, Source
from finetune.run import Entry, run_entry


def find(config: TrainConfig, cache: Path, say: Say) -> Source | Path:
    """What `--data` names, which has to be given."""
    if config.data == "auto":
        raise UserError(
            "--data is missing: name a .txt, .md, .jsonl, .csv or .parquet file, a folder of them or of token shards, "
            "or a data set of the hub (owner/name)"
        )
    form, path = Format.typed(config.separator, config.field, config.on_bad), Path(config.data)
    if not path.exists() and is_hub_id(config.data):
        return hub_source(config.data, cache, form)
    return path_source(path, form, say)


ENTRY = Entry("text", find, {}, onward=(("teach it to chat", "finetune.chat --data DIALOGS.jsonl"),))

if __name__ == "__main__":
    run_entry(ENTRY)
