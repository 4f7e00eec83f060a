"""The interface is one table: what is asked, what the docs say, and what only looks like it."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hostile_cases import Model, judge
from parity.candidates import answers
from parity.candidates.crash import Crashed, Wrong
from parity.candidates.interface import (
    ATTRIBUTES,
    METHODS,
    TRAINER,
    Interface,
    attribute_table,
    declared_dtypes,
    load_candidate,
    method_table,
)
from parity.candidates.nano.model import Nano
from parity.candidates.nano.training import NanoTrainer
from parity.candidates.python import load_attribute
from parity.checks import CHECKS
from parity.contract import Status, UsageError

DOCS = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()


@pytest.mark.parametrize("table", [method_table(METHODS), method_table(TRAINER), attribute_table()])
def test_the_docs_hold_the_table(table: str) -> None:
    assert f"\n{table}\n" in DOCS, "print it: python -m parity.candidates.interface"


def test_every_row_feeds_a_check_and_says_what_its_absence_means() -> None:
    assert {m.check for m in (*METHODS, *TRAINER)} <= set(CHECKS)
    assert all(m.why_missing and m.returns for m in (*METHODS, *TRAINER))
    assert len({m.name for m in METHODS}) == len(METHODS) and len({a.name for a in ATTRIBUTES}) == len(ATTRIBUTES)


def test_nanollama_has_the_whole_interface_but_its_alternatives() -> None:
    nano = Nano.__new__(Nano)
    found = Interface(nano)
    assert found.ignored == {} and {m.name for m in METHODS} - found.has == {"next_tokens", "log_probs"}
    assert Interface(NanoTrainer(nano), TRAINER).has == {m.name for m in TRAINER}


class Stranger:
    """Every name of the interface with another meaning."""

    compiled = True
    dtypes = ("fp8",)
    max_positions = "many"
    notices = None

    def __init__(self) -> None:
        self.config = {"dim": 8}
        self.packed = torch.nn.Linear(2, 2)
        self.encode_plain = Stranger

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")

    rope = taps = weights = lambda self, x, cos, sin: pytest.fail("called")

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        raise AssertionError("called")

    def decode(self, *, ids: list[int]) -> str:
        raise AssertionError("called")

    @property
    def loss_and_grads(self) -> None:
        raise AttributeError("no gradients")


def test_what_has_another_signature_is_ignored_and_said_so_once() -> None:
    found = Interface(Stranger())
    assert found.has == {"__call__"}
    assert len(found.notices) == len(found.ignored) == 11
    said = {notice.split(" is ignored: ")[0].split()[-1]: notice for notice in found.notices}
    assert said["rope"].endswith("it takes (x, cos, sin), the interface has rope(positions)")
    assert said["compiled"].endswith("it is a bool, the interface has compiled(tokens)")
    assert said["max_positions"].endswith("it is a str, the interface has an int")


def test_a_helper_of_the_same_name_is_never_called(tmp_path: Path) -> None:
    class Helped(Model):
        def rope(self, x: Any, cos: Any, sin: Any) -> Any:  # type: ignore[override]
            raise AssertionError("called")

        config = "tiny"  # type: ignore[assignment]

    results, verdict = judge(Helped, tmp_path)
    assert verdict == "pass"
    skipped = {r.check: r.reason for r in results if r.status is Status.SKIP}
    assert skipped["rope"] == "not covered: the candidate has no rope()"
    assert skipped["config"] == "not covered: the candidate has no config()"


@pytest.mark.parametrize(
    ("method", "fits"),
    [
        (lambda tokens: None, True),
        (lambda input_ids: None, True),
        (lambda tokens, layers=None: None, True),
        (lambda *args: None, True),
        (lambda *args, **kwargs: None, True),
        (functools.partial(lambda scale, tokens: None, 2), True),
        (torch.no_grad()(lambda tokens: None), True),
        (lambda: None, False),
        (lambda tokens, layers: None, False),
        (lambda tokens, *, layers: None, False),
        (lambda angle: None, False),
        (torch.nn.Identity(), False),
        ({"q": 1}, False),
    ],
)
def test_a_signature_counts_by_position_and_name(method: Any, fits: bool) -> None:
    target = Stranger()
    target.taps = method  # type: ignore[assignment]
    assert ("taps" in Interface(target).has) == fits


def test_dtypes_are_names_or_torchs_own() -> None:
    class One:
        dtypes = (torch.float32, "bf16")

    assert declared_dtypes(One) == ["fp32", "bf16"] and declared_dtypes(Stranger) is None


# --- The user's file -------------------------------------------------------------------------------------------------

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Config:
    layers: list[int] = field(default_factory=list)
    eps: float | None = None

def load(checkpoint, dtype, device):
    config = Config()
    def model(tokens):
        return helper(tokens)
    return model

def helper(tokens):
    raise ValueError(f"no kernel\\nfor {tokens.shape}")

def two(checkpoint, dtype):
    return None

def nothing(checkpoint, dtype, device):
    return 7
"""


@pytest.mark.parametrize("name", ["my_port", "json", "a-b.c"])
def test_a_file_with_annotations_and_a_dataclass_is_imported(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(DATACLASS)
    load = load_attribute(f"{tmp_path / name}.py:load")
    with pytest.raises(Crashed) as caught:
        load_candidate(load, "-", "fp32", "cpu").ask("__call__", torch.zeros(1, 3))
    assert caught.value.reason == "model(tokens) raised ValueError: no kernel"
    assert caught.value.where == f"{name}.py:17"


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("laod", "has no callable 'laod'; did you mean load?"),
        ("two", "takes (checkpoint, dtype): expected a function of (checkpoint, dtype, device)"),
    ],
)
def test_a_typo_is_refused_with_what_was_meant(attribute: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "typo_port.py").write_text(DATACLASS)
    with pytest.raises(UsageError) as caught:
        load_attribute(f"{tmp_path / 'typo_port.py'}:{attribute}")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_fails_when_imported_says_where(tmp_path: Path) -> None:
    (tmp_path / "early_port.py").write_text("import sys\n\nraise OSError('no weights\\nhere')\n")
    with pytest.raises(UsageError, match=r"OSError: no weights \(early_port.py:3\)$"):
        load_attribute(f"{tmp_path / 'early_port.py'}:load")


def test_what_cannot_be_called_is_no_candidate(tmp_path: Path) -> None:
    (tmp_path / "seven_port.py").write_text(DATACLASS)
    load = load_attribute(f"{tmp_path / 'seven_port.py'}:nothing")
    with pytest.raises(Crashed, match="returned an int, which cannot be called"):
        load_candidate(load, "-", "fp32", "cpu")


class Layered:
    """Says that it is run layer by layer, and has nothing to be run so by."""

    streamed = True

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 3)


def test_what_says_streamed_and_has_no_stream_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(Crashed, match=r"returned a Layered, which has no stream\(sequences, positions\)"):
        load_candidate(lambda checkpoint, dtype, device: Layered(), "-", "fp32", "cpu")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_an_array_is_an_answer(dtype: Any) -> None:
    given = np.arange(12, dtype=dtype).reshape(1, 3, 4)
    given.flags.writeable = False  # as JAX's are
    assert torch.equal(
        answers.logits(given, "model(tokens)", 1, 3, 4).double(), torch.arange(12.0).view(1, 3, 4).double()
    )


@pytest.mark.parametrize("given", [np.zeros((1, 3, 4), dtype=int), np.full((1, 3, 4), None), np.array("x"), [[1.0]]])
def test_an_array_of_no_floats_is_none(given: Any) -> None:
    with pytest.raises(Wrong, match=r"model\(tokens\) returned (ndarray|list): expected logits \(1, 3, 4\)"):
        answers.logits(given, "model(tokens)", 1, 3, 4)
