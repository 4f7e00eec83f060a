"""Planted mistakes are named from logits alone, and at the first wrong tap; what is right or unheard of never is."""

from pathlib import Path

import pytest
import torch

from mistaken_ports import PLANTED, UNKNOWN
from parity.candidates.mutants.edit import Edit, edited
from parity.candidates.mutants.forward import NOTHING
from parity.explained import Explained, of_size
from parity.family import FAMILY
from parity.synth import write_meta
from reference.explain import asked, explain
from reference.files import open_folder

TOKENS = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = torch.linspace(0, 199, 64).long()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    write_meta(folder, FAMILY["gqa"].shape, 0, "bf16", 1)
    return folder


@torch.inference_mode()
def said(checkpoint: Path, edit: Edit, tap: str, dtype: torch.dtype = torch.float32) -> Explained:
    candidate = edited(edit)(str(checkpoint), dtype, "cpu")
    tokens = torch.tensor([TOKENS])
    value = (candidate(tokens) if tap == "logits" else candidate.taps(tokens)[tap])[0]
    rows = ROWS if tap == "logits" else torch.arange(len(TOKENS))
    found = explain(asked(open_folder(checkpoint), TOKENS, "fp32", tap, value[rows], rows), 60.0)
    sizes = {name: (size["rms"], "that of a forward pass", size["alike"]) for name, size in found["sizes"].items()}
    return Explained(tap, "fp32", None, found["found"], of_size(found["error"], sizes), 200, 0, found["of"])


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
