"""Train on TinyStories, or on the bundled sample where there is no network.

python -m finetune.tinystories                        # on a CPU: 260K parameters, minutes
python -m finetune.tinystories --init 15M --dtype bf16 --compile
"""

from pathlib import Path

from finetune import interrupts

if __name__ == "__main__":
    interrupts.announce_()

from finetune.config import PRESETS, TrainConfig
from finetune.prepare.cache import Say, auto_source, path_source, sample_source, tinystories_source
from finetune.prepare.corpus import Format, Source
from finetune.run import Entry, run_entry

# A run that reads less than this needs no more than the 19 MB of the validation file.
SMALL_RUN_TOKENS = 10_000_000


def find(config: TrainConfig, cache: Path, say: Say) -> Source | Path:
    """The data that `--data` names."""
    if config.data == "sample":
        return sample_source(cache)
    if config.data == "tinystories":
        return tinystories_source(small=False)
    if config.data != "auto":
        return path_source(Path(config.data), Format.typed(config.separator, config.field, config.on_bad), say)
    tokens = config.max_steps * config.batch_size * config.accumulate * config.seq_len
    return auto_source(cache, small=0 < tokens < SMALL_RUN_TOKENS, say=say)


ENTRY = Entry(
    "tinystories",
    find,
    {},
    onward=(("train it on", "finetune.text --data NOTES.txt --method lora"),),
    larger=tuple(f"--init {name}" for name in list(PRESETS)[1:]),
)

if __name__ == "__main__":
    run_entry(ENTRY)
