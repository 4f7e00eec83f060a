"""nanollama's own server is the right server: it passes the check of servers, and with a planted mistake it fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the server is in the extra serve")
pytest.importorskip("uvicorn", reason="the server is in the extra serve")

from mutant_evidence import base, judge
from nanollama.generation.llama import Llama
from nanollama.generation.logprobs import most_probable
from nanollama.generation.score import Scored
from nanollama.model import Transformer
from nanollama.serve import answer
from parity.candidates.server.endpoint import endpoint_loader
from parity.check import main
from parity.contract import Result
from parity.mutants import evaluate as mutants
from servers import short_prompts, small_checkpoint
from serving import running, service_of


def judged() -> list[Result]:
    """By what it lists of given tokens, and by its tokens."""
    llama = Llama.load(base("gqa").case.checkpoint, dtype="fp32", compile="off")
    with running(service_of(llama, body_bytes=1 << 22)) as url:
        _, results = judge("gqa", endpoint_loader(url.removesuffix("/v1")))
    return results


def test_it_passes_by_log_probabilities_and_tokens() -> None:
    results = judged()
    assert not mutants.failed(results)
    for check in ("logits", "kl", "argmax", "greedy"):
        assert "pass" in {r.status.value for r in results if r.check == check}, check


def scores(model: Transformer, ids: list[int], top: int, temperature: float, shift: int) -> Iterator[Scored]:
    """Of a server that divides logits by a temperature, or tells what was said of the token before."""
    with torch.inference_mode():
        table = (model(torch.tensor([ids]))[0].double() / temperature).log_softmax(-1)
    for i, token in enumerate(ids[1:]):
        row = table[max(0, i - shift)]
        yield Scored(float(row[token]), int((row > row[token]).sum()) + 1, most_probable(row[None], top)[0])


@pytest.mark.parametrize(
    ("temperature", "shift", "fails"), [(1.0, 0, set()), (1.01, 0, {"logits", "kl"}), (1.0, 1, {"logits", "kl"})]
)
def test_a_planted_mistake_in_what_it_lists_is_found(
    monkeypatch: pytest.MonkeyPatch, temperature: float, shift: int, fails: set[str]
) -> None:
    monkeypatch.setattr(answer, "score", lambda model, ids, top: scores(model, ids, top, temperature, shift))
    results = judged()
    assert {r.check for r in mutants.failed(results)} == fails
    assert {r.status.value for r in results if r.check == "greedy"} == {"pass"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_command_passes_in_the_servers_dtype(dtype: str, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "meta")
    out = tmp_path / "report.json"
    prompts = short_prompts(tmp_path / "prompts.jsonl")
    flags = ["--references", "meta", "--max_new_tokens", "4", "--prompts", prompts, "--json", str(out)]
    flags += ["--checks", "logits,argmax,greedy"]
    with running(service_of(Llama.load(checkpoint, dtype=dtype, compile="off"))) as url:
        code = main(["--ckpt", str(checkpoint), "--candidate", url, "--dtype", dtype, *flags])
    results: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    assert code == (0 if dtype == "fp32" else 3)  # 3: a verdict of fp32 was not asked for
    assert [r for r in results if r["status"] in ("fail", "error")] == []
    for check in ("logits", "argmax", "greedy"):
        assert "pass" in {r["status"] for r in results if r["check"] == check}, check
