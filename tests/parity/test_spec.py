"""docs/spec/llama-conformance-1.md says the numbers of the code: bounds, constants, measured noise, test vectors."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from parity.contract import UNIT
from parity.kit.family import RECIPES
from parity.measure import tolerances
from parity.measure.rope_table import allowed
from parity.run.request import ROPE_POSITIONS
from parity.run.training import HYPER
from reference.oracle import math as oracle
from reference.protocol import tap_names

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs" / "spec" / "llama-conformance-1.md").read_text(encoding="utf-8")
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192.0}


def table(heading: str) -> dict[str, list[str]]:
    """Rows by their first cell of the table whose header begins so."""
    lines = TEXT.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rows = dict[str, list[str]]()
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            return rows
        first, *rest = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        rows[first] = rest
    return rows


def power(text: str) -> float:
    """2^-24, or a plain number."""
    base, _, exponent = text.partition("^")
    return float(base) ** float(exponent) if exponent else float(text)


GATES = table("| gate | what")


def test_every_bound_of_the_code_is_in_the_table_and_equal() -> None:
    bounds = {name: bound.value for name, bound in tolerances.BOUNDS.items()}
    said = {name: float(row[2]) for name, row in GATES.items()}
    assert {name: said[name] for name in bounds} == bounds
    assert said == bounds | {"G0": 0.0, "G7": bounds["G3.logits"]}


MEASURED = {
    "G1": "rope G1 max |difference|",
    "G2": "ops G2 rho, op on given inputs",
    "G3.logits": "logits G3 rho",
    "G3.taps": "taps G3 rho",
    "G5.mean": "kl G5 KL mean",
    "G5.p99": "kl G5 KL p99",
    "G5.max": "kl G5 KL max",
    "G6": "argmax G6 tokens that differ",
}


@pytest.mark.parametrize(("dtype", "column"), [("fp32", 3), ("bf16", 4)])
def test_measured_noise_is_what_the_results_hold(dtype: str, column: int) -> None:
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "random_shapes.json").read_text())
    largest, bounds = results["largest"], {}
    assert f"{results['draws']} random shapes" in TEXT and f"{results['results']:,} results" in TEXT
    assert results["alarms"] == []
    for gate, metric in MEASURED.items():
        if gate != "G1":
            bounds[gate] = largest[f"{metric} {dtype}"]["value"]
    if dtype == "fp32":
        bounds["G1"] = largest[MEASURED["G1"]]["value"]
    bounds["G4"] = max(largest[f"{part} G4 rho {dtype}"]["value"] for part in ("taps", "logits"))
    bounds["G7"] = max(entry["value"] for name, entry in largest.items() if " G7 rho" in name and name.endswith(dtype))
    said = {gate: GATES[gate][column] for gate in bounds}
    assert said == {gate: "0" if value == 0 else f"{value:.2f}" for gate, value in bounds.items()}


def test_constants_are_the_codes() -> None:
    for name, (value,) in table("| constant").items():
        assert getattr(tolerances, name) == float(value), name
    assert {name: power(row[0]) for name, row in table("| run dtype").items()} == UNIT
    ((lr, rest),) = table("| lr").items()
    b1, b2, eps, decay = map(power, rest)
    assert {"lr": power(lr), "betas": [b1, b2], "eps": eps, "weight_decay": decay} == HYPER
    assert "0 to 63, 511, 1023, 4095, 8191, 8192, 131071" in TEXT
    assert (*range(64), 511, 1023, 4095, 8191, 8192, 131071) == ROPE_POSITIONS


def test_taps_are_named_in_the_order_of_the_code() -> None:
    said = re.findall(r"`(\w+)`", TEXT.split("1.3.")[1].split("## 2.")[0])
    names = [name.removeprefix("layers.0.") for name in tap_names(1)]
    assert said == names


def config(factor: float | None) -> dict[str, object]:
    return {"head_dim": 128, "rope_theta": 500_000.0, "rope_scaling": factor and {"factor": factor, **SCALING}}


@pytest.mark.parametrize(("column", "factor"), [(0, None), (1, 8.0), (2, 32.0)])
def test_rope_vectors_are_the_oracles(column: int, factor: float | None) -> None:
    exact = oracle.rope_frequencies(config(factor))
    for j, row in table("| j |").items():
        assert f"{float(exact[int(j)]):.9g}" == row[column]


def test_the_bands_and_the_allowance_are_as_told() -> None:
    plain, scaled = (oracle.rope_frequencies(config(factor)) for factor in (None, 8.0))
    kept = (plain == scaled).nonzero().flatten().tolist()
    divided = (plain / 8 == scaled).nonzero().flatten().tolist()
    assert (kept, divided) == (list(range(29)), list(range(35, 64)))
    limit = allowed(config(8.0), [1000])[0]
    j = 30
    assert limit[0] == 1
    assert float(limit[j]) == pytest.approx(1 + 1000 * float(scaled[j]) * (tolerances.TABLE_ULP + j + 0.5), rel=1e-6)


def test_small_vectors() -> None:
    x, w = torch.tensor([3.0, -4.0]).double(), torch.tensor([1.0, 2.0]).double()
    assert [f"{v:.9g}" for v in oracle.rms_norm(x, w, 0.5).tolist()] == ["0.832050294", "-2.21880078"]
    cos, sin = oracle.rope_table(config(None), torch.tensor([1]))
    pair = torch.tensor([1.0, 0.0]).double().repeat(64).reshape(1, 1, 128)
    turned = oracle.rotate(pair, cos, sin).flatten()[:2].tolist()
    assert turned == pytest.approx([0.540302306, 0.841470985], abs=1e-7)
    one = torch.ones(1).double()
    assert f"{float(oracle.silu_mul(one, one)):.9g}" == "0.731058579"
    for number in ("0.832050294", "-2.21880078", "0.540302306", "0.841470985", "0.731058579"):
        assert number in TEXT
    assert math.isclose(math.cos(1), 0.540302306, rel_tol=1e-8)


def test_sections_are_numbered_without_gaps_and_links_lead_somewhere() -> None:
    sections = [int(n) for n in re.findall(r"^## (\d+)\. ", TEXT, re.M)]
    assert sections == list(range(1, len(sections) + 1))
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (REPOSITORY / "docs" / "spec" / target).resolve().is_file(), target
    assert len(RECIPES) == 6 and "makes six" in TEXT
