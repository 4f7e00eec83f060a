"""From raw text to files for every engine: own tokenizer, training, exports, and the same greedy text from each.

python -m pytest tests/finetune/test_from_scratch.py -m "slow or not slow"
"""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config import TrainConfig
from finetune.run import run
from finetune.tinyshakespeare import ENTRY
from nanollama.checkpoint import convert, open_checkpoint
from nanollama.cli import run_config
from nanollama.generation.llama import Llama, Sampling

RECIPES = Path(__file__).resolve().parents[2] / "runs"
EXPORTS = {"bin/model.bin": "llama2c", "model.gguf": "gguf", "hf": "hf"}


def greedy_text(path: Path, tokens: int = 60) -> str:
    llama = Llama.load(path)
    return "".join(event.text for event in llama.generate(["ROMEO:"], Sampling(max_new_tokens=tokens)))


@pytest.mark.parametrize(
    ("letters", "steps", "seq_len"),
    [(60_000, 10, 64), pytest.param(None, 300, 512, marks=pytest.mark.slow)],
    ids=["excerpt", "whole"],
)
def test_tinyshakespeare_reaches_every_format(
    tmp_path: Path,
    test_data: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    letters: int | None,
    steps: int,
    seq_len: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "tinyshakespeare.txt"
    text.write_text(test_data("tinyshakespeare.txt").read_text()[:letters])
    config = TrainConfig(
        **ENTRY.defaults, data=str(text), vocab_size=512, init="260K", max_steps=steps, seq_len=seq_len, batch_size=4,
        eval_every=steps, save_every=steps, threads=1, device="cpu", workers=1, cache=str(tmp_path / "cache"),
        out=str(tmp_path / "run"),
    )  # fmt: skip
    assert run(ENTRY, config) == 0
    trained = tmp_path / "run" / "final"
    opened = open_checkpoint(trained)
    assert (opened.config.vocab_size, opened.config.tied, opened.config.dim) == (512, True, 64)
    expected = greedy_text(trained)
    assert len(expected) > 20
    for name, format in EXPORTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        export = convert(trained, tmp_path / name, format)
        assert export.tokenizer is not None  # in the file or beside it: the test names none
        assert replace(export.config, max_seq_len=1) == replace(opened.config, max_seq_len=1)
        assert greedy_text(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    "recipe", ["stories.sh 260K", "stories.sh 15M", "stories.sh 42M", "stories.sh 110M", "thai_news.sh"]
)
def test_recipes_name_flags_that_exist(recipe: str, tmp_path: Path) -> None:
    """Each script runs with the commands replaced by ones that note their arguments, which are then parsed."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\0" --command "$@" >> "$LOG"\n')
        (tmp_path / name).chmod(0o755)
    script, *shape = recipe.split()
    log = tmp_path / "log"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "TOKENIZER": "t.model", "GPUS": "4"}
    subprocess.run(["bash", str(RECIPES / script), *shape], env=environment, check=True, stdout=subprocess.DEVNULL)
    training, *others = (part.split("\0")[:-1] for part in log.read_text().split("--command\0")[1:])
    flags = training[next(i for i, word in enumerate(training) if word.startswith("finetune.")) + 1 :]
    found: list[TrainConfig] = []
    with pytest.raises(SystemExit):
        run_config(TrainConfig, found.append, flags)
    (config,) = found
    assert config.init == (shape[0] if shape else "260K")
    if shape:
        assert config.batch_size * config.accumulate * 4 == {"15M": 512}.get(shape[0], 128)
    assert "convert" in others[0]
