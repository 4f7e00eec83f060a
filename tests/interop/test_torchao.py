"""QLoRA on torchao's 4-bit base: what it holds, what is trained, whole runs that resume bit by bit.

python -m pytest tests/interop/test_torchao.py
"""

import signal
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune.build import fresh_weights
from finetune.lora import NF4Linear, add_lora_, lora_parameters, merged_model, quantize_base_
from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from finetune.text import ENTRY
from nanollama.checkpoint import open_checkpoint, write_meta
from nanollama.checkpoint.adapter import LINEARS
from nanollama.model import ModelConfig, Transformer
from nanollama.tokenizer import open_tokenizer
from small_runs import exit_code, stopped_at

pytest.importorskip("torchao", reason="torchao is in the extra interop: pip install 'llama-parity[interop]'")
# torchao registers an Enum in a way that torch is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*register_constant.*")
SHAPE = ModelConfig(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=300, hidden_dim=512, max_seq_len=128, tied=True
)
TOKENS = torch.arange(2, 32).unsqueeze(0)
NF4_STEP = 0.16  # half the widest gap between two of the 16 numbers, in units of a block's largest


def small_model() -> Transformer:
    return Transformer.from_weights(SHAPE, fresh_weights(SHAPE, torch.Generator().manual_seed(1)))


def test_four_bits_are_the_nearest_of_sixteen_and_a_quarter_of_the_memory() -> None:
    weight = small_model().layers[0].feed_forward.w1.weight.detach()
    layer = NF4Linear(weight)
    off = (layer.weight - weight).abs().view(-1, 64)
    largest = weight.abs().view(-1, 64).amax(1, keepdim=True)
    assert (off <= (NF4_STEP + 0.02) * largest).all()  # 0.02: the scales are rounded too
    assert 0.02 < off.mean() / weight.abs().mean() < 0.15
    parts, _ = layer.nf4.__tensor_flatten__()
    held = sum(getattr(layer.nf4, part).nbytes for part in parts)
    assert held < weight.numel() * 0.75 and layer.state_dict() == {}


def test_adapters_learn_on_a_4_bit_base_and_merge() -> None:
    model = small_model()
    with torch.inference_mode():
        plain = model(TOKENS)
    quantize_base_(model)
    add_lora_(model, 4, 8.0, LINEARS, 0.0, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = cross_entropy(model(TOKENS)[0, :-1], TOKENS[0, 1:])
        loss.backward()
        assert all(p.grad is not None for p in lora_parameters(model).values())
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    with torch.inference_mode():
        unmerged = model(TOKENS)
        merged = merged_model(model)(TOKENS)
    assert torch.allclose(merged, unmerged, atol=1e-5 * float(unmerged.abs().max()))
    assert not torch.allclose(plain, unmerged, atol=1e-3 * float(plain.abs().max()))


def test_a_matrix_whose_scales_do_not_fill_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="use --method lora"):
        NF4Linear(torch.zeros(16, 256))


# --- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, texts = tmp_path_factory.mktemp("qlora"), stories(40)
    (folder / "stories.txt").write_text("<|endoftext|>".join(texts))
    train_tokenizer(texts, SHAPE.vocab_size, folder / "t.model")
    assert open_tokenizer(folder / "t.model").vocab_size == SHAPE.vocab_size
    weights = fresh_weights(SHAPE, torch.Generator().manual_seed(0))
    write_meta(folder / "base", SHAPE, weights, tokenizer=folder / "t.model")
    return folder


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    """The exit code of a run of 6 steps, in this process."""
    line = ["--data", str(home / "stories.txt"), "--ckpt", str(home / "base"), "--cache", str(home / "cache")]
    small = "--method qlora --seq_len 64 --batch_size 2 --max_steps 6 --lr 0.01 --threads 1"
    argv = [*line, *small.split(), "--out", str(out), *flags]
    return exit_code(ENTRY, *argv)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_a_run_learns_and_resumes_bit_by_bit(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(home, tmp_path / "straight") == 0
    with stopped_at(3):
        assert run(home, tmp_path / "stopped") == 128 + signal.SIGTERM
    assert run(home, tmp_path / "stopped", "--resume") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight") and len(losses(tmp_path / "straight")) == 6
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]
    straight, stopped = (open_checkpoint(tmp_path / name / "final").weights for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    assert (tmp_path / "straight" / "adapter" / "adapter_model.safetensors").is_file()
