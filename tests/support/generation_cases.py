"""Prompts of tiny.model and its answers compared, for the tests of generation."""

from collections.abc import Iterable, Sequence

import pytest
import torch

from nanollama.generation.llama import Event

VOCAB = 61


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
