"""Generation from files whose tensors differ in dtype, the steps that are chosen for it, and pages that are let go."""

from pathlib import Path

import pytest
import torch

from checkpoint_cases import LLAMA31, make_weights
from generation_cases import small_model
from nanollama.checkpoint import write_gguf
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import KVCache
from nanollama.speed import step as steps
from nanollama.speed.quantize import release
from nanollama.speed.step import StepChooser


def test_a_gguf_with_fp32_norms_beside_bf16_matrices_generates(tmp_path: Path) -> None:
    weights = make_weights(LLAMA31, torch.float32)
    weights["norm.weight"] += 2**-20  # which bf16 does not hold
    write_gguf(tmp_path / "x.gguf", LLAMA31, weights, dtype="bf16")
    llama = Llama.load(tmp_path / "x.gguf", compile="off")
    assert {p.dtype for p in llama.model.parameters()} == {torch.bfloat16}
    assert len(list(llama.generate([[1, 2, 3]], Sampling(max_new_tokens=4)))) == 4


@pytest.mark.parametrize(
    ("mode", "pays", "tokens", "compiled"),
    [
        ("off", True, 100, []),
        ("auto", False, 100, []),
        ("auto", True, 100, [3]),
        ("auto", True, 0, []),
        ("on", False, 1, [3]),
    ],
)
def test_a_step_is_compiled_where_it_pays_and_once(
    monkeypatch: pytest.MonkeyPatch, mode: str, pays: bool, tokens: int, compiled: list[int]
) -> None:
    made: list[int] = []

    def compile_step(model: torch.nn.Module, rows: int, say: object) -> object:
        made.append(rows)
        return "compiled"

    monkeypatch.setattr(steps, "worth_compiling", lambda *_: pays)
    monkeypatch.setattr(steps, "compile_step", compile_step)
    chooser = StepChooser(small_model(), mode)  # type: ignore[arg-type]
    chosen = [chooser.choose(3, tokens) for _ in range(2)]
    assert made == compiled
    assert chosen == (["compiled"] * 2 if compiled else [chooser.eager] * 2)


def test_the_eager_step_is_the_model() -> None:
    model = small_model()
    cache = KVCache(model.config, 2, 8, dtype=torch.float32, device="cpu")
    tokens = torch.tensor([[5, 6], [7, 8]])
    with torch.inference_mode():
        step = StepChooser(model).choose(2, 100)
        found = [step(tokens[:, i], torch.full((2,), i), cache) for i in range(2)]
        wanted = model(tokens)
    torch.testing.assert_close(torch.stack(found, 1), wanted, rtol=1e-4, atol=1e-4)


def test_released_pages_hold_what_they_held(tmp_path: Path) -> None:
    numbers = torch.arange(2**16, dtype=torch.float32)
    (tmp_path / "x").write_bytes(numbers.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "x"), shared=False, size=2**16, dtype=torch.float32)
    for tensor in (mapped, numbers):
        assert tensor.double().sum() == 2**16 * (2**16 - 1) / 2
        release(tensor[100:])  # inside of a page
        release(tensor[:10])  # less than a page
    wanted = torch.arange(2**16).float()
    assert torch.equal(mapped, wanted) and torch.equal(numbers, wanted)
