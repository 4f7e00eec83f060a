"""Which precision a server's log-probabilities speak of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mutant_evidence import base, folder
from parity.candidates.server.endpoint import endpoint_loader
from parity.check import main
from parity.measure.evidence import Evidence, Pair
from parity.measure.precision import few_tokens, remark, remarks
from parity.mutants.evaluate import evaluate
from parity.trace import Trace
from ports import plain_port
from servers import Manner, server, small_checkpoint

PAIR = Pair("meta", "fp32", None)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To integers with one scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


def port_of(checkpoint: str, bits: int | None) -> Any:
    port = plain_port.load(checkpoint, torch.float32, "cpu")
    if bits is not None:
        linear = [name for name, w in port.w.items() if w.dim() == 2 and name != "tok_embeddings.weight"]
        port.w |= {name: rounded(port.w[name], bits) for name in linear}
    return port


def served(bits: int | None, scale: float = 1.0) -> Evidence:
    """The evidence of a server with such weights."""
    port = port_of(base("gqa").case.checkpoint, bits)
    with server(lambda tokens: port(tokens) * scale, Manner(lists="prompt_logprobs")) as found:
        return evaluate(base("gqa"), endpoint_loader(found.url), folder() / "served")[0]


def in_precisions(sequences: list[list[int]], dtype: str) -> dict[str, tuple[Trace, str]]:
    """As the runner gives them, by ports in this process."""
    found = {}
    for name, bits in (("int8", 8), ("int4", 4)):
        load = lambda checkpoint, dtype, device, bits=bits: port_of(checkpoint, bits)
        found[name] = evaluate(base("gqa"), load, folder() / name)[0].candidates[None], dtype
    return found


@pytest.mark.parametrize(("bits", "name"), [(8, "int8"), (4, "int4")])
def test_a_server_with_integer_weights_is_named(bits: int, name: str) -> None:
    said = remark(served(bits), PAIR, in_precisions)
    assert said.startswith(f"the server probably computes in {name} weights:")
    assert "(correlation 1.00)" in said.split(",")[1]


def test_an_error_of_another_kind_is_given_no_name() -> None:
    assert remark(served(None, scale=3.0), PAIR, in_precisions).startswith("no precision explains")


def test_a_server_that_passes_is_not_asked_further() -> None:
    def never(sequences: list[list[int]], dtype: str) -> dict[str, tuple[Trace, str]]:
        raise AssertionError("nothing failed")

    assert remarks(served(None), ["fp32"], never) == []


def test_few_tokens_are_enough() -> None:
    ev = served(None)
    found = few_tokens(ev, PAIR)
    assert 0 < sum(map(len, found)) <= 300
    assert all(ids == whole[: len(ids)] for ids, whole in zip(found, ev.oracle.sequences, strict=False))


def test_a_report_names_the_precision(tmp_path: Path) -> None:
    """References and oracle in every precision, by the runner."""
    checkpoint, out = small_checkpoint(tmp_path / "meta"), tmp_path / "report.json"
    with server(port_of(str(checkpoint), 8), Manner(lists="prompt_logprobs")) as found:
        common = ("--references", "meta", "--dtype", "fp32", "--max_new_tokens", "4", "--checks", "logits")
        assert main(["--ckpt", str(checkpoint), "--candidate", found.url, *common, "--json", str(out)]) == 1
    (note,) = (n for n in json.loads(out.read_text())["notices"] if "probably computes" in n)
    assert "computes in int8 weights" in note and "correlation 1.00" in note
