"""G2: operations on a reference's own inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mutant_evidence import base, judge
from parity.candidates.nano.model import Nano
from parity.contract import Status
from parity.measure.tolerances import BOUNDS
from parity.mutants.edits.edit import edited, override
from parity.mutants.edits.forward import NOTHING
from parity.run.teacher_forcing import cut, op_inputs, op_names


def results_of(load: Any) -> dict[str, Any]:
    _, results = judge("gqa", load)
    return {r.gate: r for r in results if r.check == "ops"}


def test_operations_rebuild_the_taps_bit_for_bit() -> None:
    nano = Nano(base("gqa").case.checkpoint, torch.float32, "cpu", "exact")
    tokens = torch.arange(11)[None]
    with torch.no_grad():
        taps = nano.taps(tokens) | {"logits": nano(tokens)}
        for name in op_names(nano.cfg.n_layers):
            inputs = {tap: taps[tap] for tap in op_inputs(name, nano.cfg.n_layers)}
            assert torch.equal(nano.ops(name, inputs), taps[name]), name


def test_right_operations_pass_and_report_their_rounding_style() -> None:
    found = results_of(edited(NOTHING))
    assert found["G2"].status is Status.PASS
    assert found["style"].status is Status.PASS and 0 <= found["style"].value <= 1


def test_wrong_operation_is_named() -> None:
    def wrong(nano: Nano) -> None:
        true = nano.ops
        override(nano, "ops", lambda name, x: true(name, x) * (1.001 if name.endswith("ffn_mix") else 1))

    found = results_of(edited(wrong))
    assert found["G2"].status is Status.FAIL
    assert found["G2"].where.startswith("layers.0.ffn_mix")


def test_candidate_without_ops_is_not_covered() -> None:
    def load(*args: Any) -> Any:
        nano = Nano(*args, "exact")
        return lambda tokens: nano(tokens)

    _, results = judge("gqa", load)
    found = [r for r in results if r.check == "ops"]
    assert [r.status for r in found] == [Status.SKIP]
    assert "no ops()" in found[0].reason and not found[0].required


def test_operation_that_is_not_implemented_is_left_out() -> None:
    def partial(nano: Nano) -> None:
        true = nano.ops

        def ops(name: str, inputs: Any) -> Any:
            if "attn" in name:
                raise NotImplementedError
            return true(name, inputs)

        override(nano, "ops", ops)

    assert results_of(edited(partial))["G2"].status is Status.PASS


def test_cut_trace_is_the_beginning_of_the_trace(tmp_path: Path) -> None:
    trace = base("gqa").references["meta"]
    short = cut(trace, ["fp32"], tmp_path / "cut")
    longest = max(range(len(trace.sequences)), key=lambda i: len(trace.sequences[i]))
    n = len(short.sequences[1])
    assert torch.equal(short.get("fp32", 1, "layers.1.out"), trace.get("fp32", longest, "layers.1.out")[:n])


@pytest.mark.parametrize("name", ["layers.0.attn_norm", "layers.1.ffn_norm", "final_norm", "logits"])
def test_every_operation_knows_its_inputs(name: str) -> None:
    expected = {
        "layers.0.attn_norm": ["embed"],
        "layers.1.ffn_norm": ["layers.0.out", "layers.1.attn_out"],
        "final_norm": ["layers.1.out"],
        "logits": ["final_norm"],
    }
    assert op_inputs(name, 2) == expected[name]
    assert BOUNDS["G2"].value == 2.0
