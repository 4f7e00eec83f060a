"""`python -m nanollama generate` with integer weights, drafters and the compiled step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanollama import __main__ as commands
from nanollama.checkpoint import write_meta
from nanollama.model import ModelConfig, Transformer
from nanollama.options import Drawing, ModelOptions


def write_model(path: Path, vocab_size: int = 61, seed: int = 0) -> str:
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab_size, hidden_dim=48)
    torch.manual_seed(seed)
    write_meta(path, config, Transformer(config).state_dict())
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("[1, 2, 3, 1, 2]\n[7]\n")
    return file


def answers(capsys: pytest.CaptureFixture[str], checkpoint: str, prompts: Path, **flags: Any) -> dict[str, Any]:
    options, logprobs = ModelOptions(**flags), "quantize" in flags
    commands.generate(checkpoint, prompts=prompts, drawing=Drawing(12), json=True, logprobs=logprobs, model=options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_drafted_answers_are_the_plain_ones(
    checkpoint: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = answers(capsys, checkpoint, prompts)["answers"]
    assert answers(capsys, checkpoint, prompts, lookup=True)["answers"] == plain
    assert answers(capsys, checkpoint, prompts, draft=write_model(tmp_path / "small", seed=1))["answers"] == plain


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_models_answer_and_say_what_they_took(
    checkpoint: str, prompts: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    found = answers(capsys, checkpoint, prompts, quantize=scheme)
    assert [len(answer["tokens"]) for answer in found["answers"]] == [12, 12]
    assert found["speed"]["prefill_tokens"] == 6
    assert found["speed"]["decode_tokens"] == 22
    assert found["speed"]["peak_memory_bytes"] > 2**20
    assert found["speed"]["decode_tokens_per_s"] > 0


def test_compile_auto_leaves_short_answers_to_the_model(
    checkpoint: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path))
    answers(capsys, checkpoint, prompts)
    assert not (tmp_path / "compiled").exists()


def test_unusable_drafters_are_refused(checkpoint: str, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--draft and --lookup are two ways"):
        commands.generate(checkpoint, prompts=prompts, model=ModelOptions(draft=checkpoint, lookup=True))
    other = write_model(tmp_path / "other", vocab_size=62)
    with pytest.raises(ValueError, match=r"^the draft model has 62 tokens and the model 61: give one with the same"):
        commands.generate(checkpoint, prompts=prompts, model=ModelOptions(draft=other))
