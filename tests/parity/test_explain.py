"""Planted mistakes are named from logits alone, and at the first wrong tap; what is right or unheard of never is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistaken_ports import PLANTED, UNKNOWN
from parity.explain.ask import chosen_rows
from parity.explain.causes import View, signature
from parity.explain.explained import Explained, of_size
from parity.mutants.edits.edit import Edit, edited
from parity.mutants.edits.forward import NOTHING
from parity.mutants.family import FAMILY
from parity.synth.checkpoint import write_meta
from reference.files import open_folder
from reference.mistakes.explain import Question, asked, explain
from reference.mistakes.table import Mistake
from reference.oracle.forward import Oracle, forward

TOKENS = torch.randint(0, 512, (120,), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = torch.linspace(0, len(TOKENS) - 1, 48).long()


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which no second is left once a mistake explains the error."""
    monkeypatch.setattr("reference.mistakes.explain.EARLY_S", 0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gqa")
    write_meta(folder, FAMILY["gqa"].shape, 0, "bf16", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


class Remembered(Question):
    """The oracle's mistakes are the same whoever is asked about: each is computed once."""

    def answer(self, mistake: Mistake) -> Tensor | None:
        return remembered(self.tap, mistake.name, lambda: super(Remembered, self).answer(mistake))

    def truth(self) -> Tensor:
        found = remembered(self.tap, "truth", super().truth)
        assert found is not None
        return found


KNOWN: dict[tuple[str, str], Tensor | None] = {}


def remembered(tap: str, name: str, compute: Callable[[], Tensor | None]) -> Tensor | None:
    if (tap, name) not in KNOWN:
        KNOWN[tap, name] = compute()
    return KNOWN[tap, name]


@torch.inference_mode()
def said(
    checkpoint: Path, edit: Edit, tap: str, dtype: torch.dtype = torch.float32, attention: str = "exact"
) -> Explained:
    candidate = edited(edit, attention)(str(checkpoint), dtype, "cpu")
    tokens = torch.tensor([TOKENS])
    value = (candidate(tokens) if tap == "logits" else candidate.taps(tokens)[tap])[0]
    rows = ROWS if tap == "logits" else torch.arange(len(TOKENS))
    question = asked(open_folder(checkpoint), TOKENS, "fp32", tap, value[rows], rows)
    found = explain(Remembered(**vars(question)), 60.0)
    sizes = {name: (size["rms"], "that of a forward pass", size["alike"]) for name, size in found["sizes"].items()}
    return Explained(tap, "fp32", None, found["found"], of_size(found["error"], sizes), 120, 0, found["of"])


@dataclass
class Held:
    """Taps of one sequence, as causes.py reads them."""

    taps: dict[str, Tensor]
    meta: dict[str, Any]
    sequences: list[list[int]]

    def has(self, dtype: str, sequence: int, tap: str) -> bool:
        return tap in self.taps

    def get(self, dtype: str, sequence: int, tap: str) -> Tensor:
        return self.taps[tap]


def view(checkpoint: Path, taps: dict[str, Tensor]) -> View:
    """A candidate's taps (1, T, ...) beside the oracle's."""
    right, oracle = Oracle(open_folder(checkpoint), [TOKENS], None), dict[str, Tensor]()
    normed = forward(right, oracle.__setitem__)
    oracle["logits"] = torch.cat([block for _, _, block in right.logit_blocks(normed)], -1)
    meta = {"config": right.config}
    mine = Held({name: tap[0] for name, tap in taps.items()}, meta, [TOKENS])
    return View(mine, Held(oracle, meta, [TOKENS]), mine, "fp32", 0, None)


@pytest.mark.parametrize(("edit", "words"), [c[1:3] for c in PLANTED if c[2]], ids=[c[0] for c in PLANTED if c[2]])
def test_a_planted_mistake_is_named_from_logits_alone(edit: Edit, words: str, checkpoint: Path) -> None:
    found = said(checkpoint, edit, "logits")
    assert found.name is not None, str(found)
    assert words in found.name


@pytest.mark.parametrize("edit", [NOTHING, *(c[1] for c in UNKNOWN)], ids=["right", *(c[0] for c in UNKNOWN)])
def test_what_is_right_or_unheard_of_has_no_name(edit: Edit, checkpoint: Path) -> None:
    found = said(checkpoint, edit, "logits")
    assert found.name is None, str(found)
    assert str(found).startswith("unexplained: of ")


@torch.inference_mode()
@pytest.mark.parametrize(("edit", "tap", "words"), [(c[1], *c[3:]) for c in PLANTED], ids=[c[0] for c in PLANTED])
def test_a_planted_mistake_is_named_at_its_tap(edit: Edit, tap: str, words: str, checkpoint: Path) -> None:
    candidate = edited(edit)(str(checkpoint), torch.float32, "cpu")
    taps = candidate.taps(torch.tensor([TOKENS]))
    named = signature(view(checkpoint, taps), tap)
    if named is None:
        found = said(checkpoint, edit, tap)
        assert found.name is not None, str(found)
        named = found.name
    assert words in named


@pytest.mark.parametrize("attention", ["exact", "fast"])
def test_a_lower_precision_than_claimed_is_told(attention: str, checkpoint: Path) -> None:
    found = said(checkpoint, NOTHING, "logits", torch.bfloat16, attention)
    assert str(found).startswith("it computes in bf16"), str(found)


@pytest.mark.parametrize(
    ("error", "alike", "told"), [(0.9, 0.5, "bf16"), (0.9, 0.1, None), (3.0, 0.9, None), (0.2, 0.9, None)]
)
def test_a_size_alone_tells_no_precision(error: float, alike: float, told: str | None) -> None:
    found = of_size(error, {"bf16": (1.0, "the references'", alike), "fp16": (1e-3, "the references'", 0.9)})
    assert (found and found[0]) == told


def test_what_explains_less_than_nine_tenths_has_no_name() -> None:
    best = [("A", 0.899), ("B", 0.5), ("C", 0.2), ("D", 0.1)]
    found = Explained("logits", "fp32", None, best, None, 120, 160, 160)
    assert found.name is None and not found.told
    assert str(found).endswith("the nearest are A (89.90%), B (50.00%), C (20.00%)")
    assert found.as_json()["best"][0] == {"mistake": "A", "share": 0.899}
    tied = Explained("logits", "fp32", None, [("A", 0.95), ("B", 0.95), ("C", 0.9)], None, 120, 160, 160)
    assert tied.name == "A, or B" and "the next explains 90.00%: C" in str(tied)


def test_half_of_the_rows_lie_behind_the_first_wrong_one() -> None:
    rows = chosen_rows(320, 256)
    assert rows[0] == 0 and rows[-1] == 319 and int((rows >= 256).sum()) >= 32 and len(rows) <= 64
