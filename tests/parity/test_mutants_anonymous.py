"""The same mutants as candidates that nobody named: `file.py:load` with logits and taps alone, no registry, no ops."""

from pathlib import Path

import pytest

from mutant_evidence import judge
from parity.candidates.python import load_attribute
from parity.explain.localise import first_divergence
from parity.mutants import evaluate as mutants
from parity.mutants.edits import MUTANTS, Mutant

FORWARD = [m for m in MUTANTS if m.member == "gqa" and m.tap.startswith(("layers", "final_norm", "logits"))]
FORWARD = [m for m in FORWARD if "@" not in m.tap and "fp32" in m.dtypes]
SOURCE = """
from parity.mutants.edits import MUTANTS


class Port:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, tokens):
        return self.inner(tokens)

    def taps(self, tokens):
        return self.inner.taps(tokens)


def load(checkpoint, dtype, device):
    return Port(MUTANTS[{index}].load(checkpoint, dtype, device))
"""


@pytest.mark.parametrize("mutant", FORWARD, ids=lambda m: m.number)
def test_anonymous_mutant_is_killed_and_found_at_the_same_tap(mutant: Mutant, tmp_path: Path) -> None:
    (tmp_path / "my_port.py").write_text(SOURCE.format(index=MUTANTS.index(mutant)))
    ev, results = judge("gqa", load_attribute(f"{tmp_path / 'my_port.py'}:load"))
    assert mutants.killer(results) == ("logits" if mutant.tap == "logits" else "taps")
    found = first_divergence(ev)
    assert found is not None
    assert found["tap"] == mutant.tap
    assert not any(
        char.isdigit() and mutant.number == word for word in found["probable_cause"].split() for char in word
    )


def test_bare_callable_is_judged_by_its_logits(tmp_path: Path) -> None:
    mutant = next(m for m in MUTANTS if m.number == "15")

    def load(*args: object) -> object:
        inner = mutant.load(*args)
        return lambda tokens: inner(tokens)

    ev, results = judge("gqa", load)
    assert mutants.killer(results) == "logits"
    found = first_divergence(ev)
    assert found is not None and found["tap"] == "logits"
    assert "no taps()" in found["probable_cause"]
