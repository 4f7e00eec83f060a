"""Write token shards without training, to look at them or to train on another machine.

$ python -m finetune.prepare --data stories.txt --vocab_size 512 --out shards
shards: train 11,400 documents, 2,689,739 tokens; val 600 documents, 142,213 tokens
$ python -m finetune.text --data shards
"""

import os
from pathlib import Path
from typing import Literal

from finetune.data.left_out import NAME as LEFT_OUT
from finetune.data.left_out import read_left_out
from finetune.errors import UserError
from finetune.prepare.cache import cache_folder, open_prepared, path_source, prepare_tokenizer, write_folder
from finetune.prepare.corpus import Format
from nanollama.cli import run


def main(
    data: Path,  # a .txt, .md, .jsonl, .csv, .tsv or .parquet file, or a folder of them
    *,
    out: Path,  # a folder that does not exist yet
    tokenizer: Path | None = None,  # a tokenizer file; else one is trained on the data
    vocab_size: int = 32_000,  # words of the tokenizer that is trained
    field: str = "text",  # the field or column of rows that holds the document
    separator: str = "<|endoftext|>",  # between the documents of a .txt or .md file
    on_bad: Literal["stop", "skip"] = "stop",  # what becomes of documents that cannot be read
    workers: int = 0,  # processes that tokenize; 0: one per core
) -> None:
    """Tokenize text into shards for `--data`."""
    if out.exists():
        raise UserError(f"--out {out}: exists already: choose another name")
    source = path_source(data, Format.typed(separator, field, on_bad), print)
    if isinstance(source, Path):
        raise UserError(f"--data {data}: holds shards already")
    tokenizer = prepare_tokenizer(source, tokenizer, vocab_size, cache_folder(None) / "tokenizers", print)
    write_folder(source, tokenizer, out, workers or os.cpu_count() or 1, print)
    read_left_out(out).report("documents", on_bad, print, out / LEFT_OUT)
    prepared = open_prepared(source.name, out, tokenizer)
    if source.title != source.name:
        print(f"data: {source.title}")
    stores = (("train", prepared.train.lengths), ("val", prepared.val.lengths))
    print(f"{out}: " + "; ".join(f"{name} {len(n):,} documents, {n.sum():,} tokens" for name, n in stores))


if __name__ == "__main__":
    run(main)
