"""Runs of the finetuner that take a second: a base with its tokenizer, a command in this process, a stop amid it."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from finetune.build import fresh_weights
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from finetune.run import Entry, run_entry
from finetune.text import ENTRY as TEXT
from finetune.train import Loop
from nanollama.checkpoint import write_meta
from nanollama.model import ModelConfig
from nanollama.tokenizer import open_tokenizer


def tokenizer(folder: Path, texts: Sequence[str]) -> Path:
    """FOLDER/t.model, of about 300 words, trained on these texts."""
    train_tokenizer(list(texts), 300, folder / "t.model")
    return folder / "t.model"


def shape(words: Path, context: int, **changes: Any) -> ModelConfig:
    """Two tied layers of width 32 for this tokenizer and so many positions."""
    dims = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "tied": True}
    return ModelConfig(vocab_size=open_tokenizer(words).vocab_size, max_seq_len=context, **{**dims, **changes})


def base(folder: Path, words: Path, context: int, *, seed: int = 0, embedding: float = 1, **changes: Any) -> Path:
    """An untrained checkpoint with that tokenizer; embedding: the factor by which its embedding is larger."""
    config = shape(words, context, **changes)
    weights = fresh_weights(config, torch.Generator().manual_seed(seed))
    weights["tok_embeddings.weight"] *= embedding
    write_meta(folder, config, weights, tokenizer=words)
    return folder


def stories_home(folder: Path, layers: int = 2) -> Path:
    """Forty stories and the shape of a model of width 32, for `stories_run`."""
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories(40)))
    dims = {"dim": 32, "n_layers": layers, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    (folder / "shape.json").write_text(json.dumps(dims))
    return folder


def stories_run(home: Path, out: Path, small: str, *flags: str, data: str = "stories.txt") -> int | str | None:
    """The exit code of a run from scratch on them; small: its own flags, in one string."""
    files = ["--data", str(home / data), "--init", str(home / "shape.json"), "--cache", str(home / "cache")]
    same = "--vocab_size 300 --seq_len 64 --batch_size 2 --lr 0.01 --threads 1"
    return exit_code(TEXT, *files, *same.split(), *small.split(), "--out", str(out), *flags)


def exit_code(entry: Entry, *flags: str) -> int | str | None:
    """Of `python -m finetune.ENTRY FLAGS`, in this process."""
    with patch.object(sys, "argv", [entry.name, *flags]), pytest.raises(SystemExit) as caught:
        run_entry(entry)
    return caught.value.code


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """SIGTERM comes within that step: the run ends behind it, with its state saved."""
    whole = Loop.step

    def interrupted(loop: Loop, stop: int) -> Any:
        if loop.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            stop = signal.SIGTERM
        return whole(loop, stop)

    with patch.object(Loop, "step", interrupted):
        yield
