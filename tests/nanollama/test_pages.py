"""Large pages for weights: the same numbers in one place, and a refusal where memory is short."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_cases import LLAMA31, make_weights
from nanollama.checkpoint import write_hf
from nanollama.generation import llama as generate
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import Transformer
from nanollama.speed import pages
from nanollama.speed.quantize import load_quantized

CONFIG = replace(LLAMA31, vocab_size=4099, max_seq_len=256)  # odd, so that tensors end inside of cache lines
linux = pytest.mark.skipif(pages.available_bytes() == 0, reason="the system says nothing of its memory")


def model_of(scheme: str | None, dtype: torch.dtype, tied: bool) -> Transformer:
    config = replace(CONFIG, tied=tied)
    model = Transformer.from_weights(config, make_weights(config), dtype=dtype)
    return load_quantized(config, model.state_dict(), scheme) if scheme else model


@linux
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(None, torch.float32), (None, torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.bfloat16)],
)
def test_settled_weights_are_the_same_numbers_in_one_place(scheme: str | None, dtype: torch.dtype, tied: bool) -> None:
    model = model_of(scheme, dtype, tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        wanted = model(tokens)
        assert pages.settle_(model)
        found = model(tokens)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(wanted, found)
    places = sorted((t.data_ptr(), t.nbytes) for t in {t.data_ptr(): t for t in after.values()}.values())
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(places))
    assert places[-1][0] + places[-1][1] - places[0][0] < sum(size + 64 for _, size in places)
    assert all(start % pages.ALIGNMENT_BYTES == 0 for start, _ in places)


def test_weights_stay_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(None, torch.float32, tied=True)
    at = model.norm.weight.data_ptr()
    room = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(pages, "available_bytes", lambda: 2 * room)  # half of it is less than they and a page
    assert not pages.settle_(model)
    assert model.norm.weight.data_ptr() == at


@linux
def test_the_first_long_answer_settles_the_weights_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "hf", CONFIG, make_weights(CONFIG))
    settled: list[bool] = []

    def settle_(model: Transformer) -> bool:
        settled.append(pages.settle_(model))
        return settled[-1]

    monkeypatch.setattr(generate, "settle_", settle_)
    made: list[int] = []
    monkeypatch.setattr(
        generate, "compile_step", lambda model, rows, say: made.append(rows) or generate.eager_step(model)
    )
    compiled, eager = (Llama.load(tmp_path / "hf", compile=compile) for compile in ("on", "off"))
    long = generate.SETTLE_TOKENS + 1
    for tokens, times in ((8, 0), (long, 1), (8, 1), (long, 1)):
        sampling = Sampling(max_new_tokens=tokens)
        answers = [[e.token for e in llama.generate([[1, 2, 3]], sampling)] for llama in (compiled, eager)]
        assert answers[0] == answers[1]
        assert settled == [True] * times
    assert made == [1, 1]  # the second one for the weights in their new place
