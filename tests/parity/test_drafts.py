"""Greedy text of a candidate without a cache: drafted by the whole pass, and asked for wherever it may be another."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity.candidates.crash import Wrong
from parity.candidates.interface import Interface
from parity.contract import Case
from parity.run.whole import WholeRun
from parity.trace import TraceWriter

VOCAB = 32
SEQUENCES, PROMPTS = [[3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]], [2, 4]


def counting(tokens: Tensor) -> Tensor:
    """The next number follows every number."""
    return torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()


def texts(model: Callable[[Tensor], Tensor], folder: Path) -> tuple[list[list[int]], list[int]]:
    """The texts after both prompts, and the lengths that the model was asked for after its forward passes."""
    asked = list[int]()

    class Candidate:
        def __call__(self, tokens: Tensor) -> Tensor:
            asked.append(tokens.shape[1])
            return model(tokens)

    case = Case("", ["fp32"], prompts=SEQUENCES, prompt_lengths=PROMPTS, vocab_size=VOCAB)
    run = WholeRun(Interface(Candidate()), case, "fp32", TraceWriter(folder), lambda stage, done: None)
    run._forward()
    asked.clear()
    run._greedy([0, 1])
    return run.out.generated, asked


def test_every_length_of_the_shortest_sequence_and_both_ends_of_another_are_asked(tmp_path: Path) -> None:
    found, asked = texts(counting, tmp_path)
    assert found == [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12]]
    assert asked == [2, 3, 4, 5, 4, 11]


def test_a_text_ends_where_the_model_leaves_the_one_asked_for(tmp_path: Path) -> None:
    def skips(tokens: Tensor) -> Tensor:
        return torch.where((tokens == 7)[..., None], counting(tokens + 1), counting(tokens))

    found, asked = texts(skips, tmp_path)
    assert found == [[5, 6, 7, 9], [5, 6, 7, 9]]
    assert asked == [2, 3, 4, 5, 4, 7]


@pytest.mark.parametrize(("length", "found"), [(3, [[5, 7], [5, 6, 7, 8, 9, 10, 11, 12]]), (11, None)])
def test_a_model_that_is_wrong_at_one_length_alone_is_seen(
    length: int, found: list[list[int]] | None, tmp_path: Path
) -> None:
    def moody(tokens: Tensor) -> Tensor:
        return counting(tokens + (tokens.shape[1] == length))

    assert texts(moody, tmp_path)[0] == (found or [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 13]])


def test_nan_in_a_prefix_alone_is_no_text(tmp_path: Path) -> None:
    def breaks(tokens: Tensor) -> Tensor:
        return counting(tokens) / float(tokens.shape[1] != 4)

    with pytest.raises(Wrong, match="NaN"):
        texts(breaks, tmp_path)
