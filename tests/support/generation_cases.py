"""A small model whose next token is rarely close, and its answers compared, for the tests of generation."""

from collections.abc import Iterable, Sequence

import pytest
import torch

from nanollama.generation.llama import Event
from nanollama.model import ModelConfig, Transformer

VOCAB = 61


def small_model(vocab_size: int = VOCAB, seed: int = 0, **changes: int) -> Transformer:
    """Two layers, GQA ratio 2, and weights large enough that the next token is rarely close."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 400}
    model = Transformer(ModelConfig(vocab_size=vocab_size, **{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 3 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def of_row(events: Iterable[Event], prompt: int, answer: int = 0) -> list[Event]:
    return [event for event in events if (event.prompt, event.answer) == (prompt, answer)]


def tokens(events: Iterable[Event]) -> list[int]:
    return [event.token for event in events]


def assert_same_answer(got: Sequence[Event], wanted: Sequence[Event]) -> None:
    assert tokens(got) == tokens(wanted)
    assert [event.finish for event in got] == [event.finish for event in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def prompt_ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
