"""finetune.evaluate: windows, bits per byte of the text alone, a table of checkpoints, and tasks of lm-eval."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.packing import Packer
from finetune.evaluate import hold_out
from finetune.prepare.stories import stories
from finetune.scoring import evaluate_checkpoints, score_text, spans
from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.hf import write_hf
from nanollama.cli import execute
from nanollama.generation.llama import Llama
from nanollama.tokenizer import open_tokenizer
from small_runs import base, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three untrained checkpoints with a tokenizer, and a text that none has seen."""
    folder, texts = tmp_path_factory.mktemp("scoring"), stories(30)
    words = tokenizer(folder, texts)
    for seed in range(3):
        opened = open_checkpoint(base(folder / f"m{seed}", words, 96, seed=seed, embedding=3))
        write_hf(folder / f"hf{seed}", opened.config, opened.weights, tokenizer=words)
    (folder / "text.txt").write_text("<|endoftext|>".join(texts[:3]))
    return folder


@given(length=st.integers(0, 60), window=st.integers(2, 20), data=st.data())
def test_windows_count_every_token_but_the_first_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    counted: list[int] = []
    for begin, end, first in spans(length, window, stride):
        assert end - begin <= window and first > begin
        assert first == 1 or first - begin >= window - stride
        counted += range(first, end)
    assert counted == list(range(1, length))


def test_perplexity_is_that_of_the_usual_loop_over_transformers(home: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = (home / "text.txt").read_text().split("<|endoftext|>")[0]
    llama = Llama.load(home / "m0", dtype="fp32")
    assert llama.tokenizer is not None
    found = score_text("m0", llama, [text], 64, 16, 3)
    theirs = AutoModelForCausalLM.from_pretrained(home / "hf0", dtype=torch.float32)
    ids = torch.tensor([llama.tokenizer.encode(text, bos=True)])
    nats, counted, before = 0.0, 0, 1
    for begin in range(0, ids.shape[1], 16):  # as in the documentation of transformers
        end = min(begin + 64, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            loss = theirs(ids[:, begin:end], labels=labels).loss
        nats, counted, before = nats + float(loss) * (end - before), counted + end - before, end
        if end == ids.shape[1]:
            break
    assert found.tokens == counted == ids.shape[1] - 1
    assert found.perplexity == pytest.approx(math.exp(nats / counted), rel=1e-5)
    assert found.bytes == len(text.encode())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


class Once:
    """One document: BOS, a text, the end of a turn."""

    def __init__(self, ids: list[int], bos_id: int) -> None:
        self.ids, self.bos_id = np.array(ids), bos_id
        self.lengths = np.array([len(ids)])

    def tokens(self, document: int, start: int, stop: int) -> Any:
        return self.ids[start:stop]


def test_names_of_special_tokens_are_no_bytes_of_text(llama3_tokenizer_path: Path) -> None:
    tokenizer = open_tokenizer(llama3_tokenizer_path)
    assert tokenizer.bos_id is not None
    text = "Four llamas went home, tired."
    ids = [*tokenizer.encode(text, bos=True), tokenizer.special_ids["<|eot_id|>"], tokenizer.eos_id]
    assert hold_out(Packer(Once(ids, tokenizer.bos_id), 64), tokenizer, 100).text_bytes == len(text.encode())


def evaluated(*flags: str) -> int:
    return execute(evaluate_checkpoints, list(flags), prog="python -m finetune.evaluate")


def test_several_checkpoints_stand_in_one_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(home / f"m{i}") for i in range(2)]
    flags = [flag for name in names for flag in ("--ckpt", name)]
    assert evaluated(*flags, "--data", str(home / "text.txt"), "--json", str(home / "found.json")) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["checkpoint", "parameters", "tokens"]
    assert [row.split()[0] for row in rows] == names
    found = json.loads((home / "found.json").read_text())["texts"]
    assert [f"{entry['bits_per_byte']:.4f}" for entry in found] == [row.split()[4] for row in rows]
    size = len((home / "text.txt").read_bytes().replace(b"<|endoftext|>", b""))
    assert [entry["bytes"] for entry in found] == [size, size]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--data is missing: name a text to predict, or --tasks"),
        ("--data HOME/text.txt --window 200", "--window 200: HOME/m0 was made for at most 96 tokens"),
        ("--data HOME/text.txt --window 8 --stride 8", "--stride 8: expected less than the window's 8 tokens"),
        ("--data HOME/none.txt", "none.txt: no such file"),
        ("--tasks HOME/none.yaml", "none.yaml: no such file"),
    ],
)
def test_unusable_flags_are_one_line(home: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--tasks" in flags:
        pytest.importorskip("lm_eval", reason="pip install 'llama-parity[eval]'")
    assert evaluated("--ckpt", str(home / "m0"), *flags.replace("HOME", str(home)).split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message.replace("HOME", str(home)) in said


TASK = """task: which_ending
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
output_type: multiple_choice
test_split: test
doc_to_text: "{{start}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{right}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """task: how_likely
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{start}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and its packages
def test_tasks_of_lm_eval_score_as_on_the_transformers_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'llama-parity[eval]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    texts = [text for text in stories(60)[30:] if len(text) > 120]
    rows = [
        {"start": t[:60], "endings": [t[60:90], texts[i - 1][60:90], " and so on"], "right": 0}
        for i, t in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = []
    for name, text in (("which_ending", TASK), ("how_likely", ROLLING)):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(text.replace("FILE", str(tmp_path / "rows.jsonl")))
    flags = [flag for i in range(3) for flag in ("--ckpt", str(home / f"m{i}"))]
    line = ["--tasks", ",".join(map(str, files)), "--dtype", "fp32", "--json", str(tmp_path / "found.json")]
    assert evaluated(*flags, *line) == 0
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]
    manager, seen = TaskManager(include_path=str(tmp_path)), set()
    for i in range(3):
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=str(home / f"hf{i}"), dtype="float32", device="cpu", batch_size=4),
            tasks=["which_ending", "how_likely"],
            task_manager=manager,
            bootstrap_iters=0,
        )["results"]
        mine = found[str(home / f"m{i}")]
        for metric in ("acc", "acc_norm"):
            assert mine[f"which_ending {metric}"] == theirs["which_ending"][f"{metric},none"]
        assert mine["how_likely bits_per_byte"] == pytest.approx(theirs["how_likely"]["bits_per_byte,none"], rel=1e-5)
        seen.add(mine["how_likely bits_per_byte"])
    assert len(seen) == 3
