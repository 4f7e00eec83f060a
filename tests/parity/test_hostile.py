"""Each gate against hostile answers: none passes, none ends in a traceback, and what was finished before is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hostile_cases import ANSWERS, TABLES, Called, Model, Server, Trainer, judge, spoiled
from parity.contract import Result, Status

BAD = (Status.FAIL, Status.ERROR)
# Gate -> (the method that feeds it, the check, what its results' metric begins with)
GATES = {
    "logits": ("forward", "logits", ""),
    "taps": ("taps", "taps", ""),
    "ops": ("ops", "ops", ""),
    "cache": ("decode", "cache", ""),
    "prefill": ("prefill", "cache", ""),
    "packed": ("packed", "metamorphic", ""),
    "compiled": ("compiled", "metamorphic", ""),
    "tokens": ("encode", "tokens", ""),
    "corpus": ("encode_plain", "tokens", ""),
    "chat": ("encode_chat", "chat", ""),
    "config": ("config", "config", ""),
    "weights": ("weights", "weights", ""),
    "rope": ("rope", "rope", ""),
    "loss": ("loss_and_grads", "training", ""),
    "document mask": ("packed", "training", "document mask"),
    "accumulation": ("accumulated", "training", "accumulation"),
    "target mask": ("labels", "training", "target mask"),
    "optimizer step": ("adamw", "training", "optimizer step"),
    "ten losses": ("losses", "training", "ten losses"),
    "adapter merge": ("merged", "training", "adapter merge"),
}
ONCE = {"compiled", "tokens", "corpus", "chat", "config", "weights", "rope", "loss", "document mask", "target mask",
        "optimizer step", "ten losses", "adapter merge"}  # fmt: skip
TABLE = [(g, a) for g in GATES for a in ANSWERS if not (g in ONCE and a == "raises at the second call")]
TABLE.remove(("chat", "None"))  # what the interface has for a dialog that cannot be rendered


def of(results: list[Result], check: str, metric: str = "") -> list[Result]:
    return [r for r in results if r.check == check and (r.metric or "").startswith(metric)]


def loader(method: str, kind: str, in_trainer: bool) -> Any:
    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Called:
        model = Called(checkpoint, dtype, device)
        trainer = Trainer(model)
        target: Any = trainer if in_trainer else model
        setattr(target, method, spoiled(kind, getattr(target, method)))
        model.trainer = lambda: trainer  # type: ignore[method-assign]
        return model

    return load


def test_the_right_model_passes_every_gate(tmp_path: Path) -> None:
    results, verdict = judge(Model, tmp_path)
    assert [r for r in results if r.status in BAD] == [] and verdict == "pass"
    passed = {r.check for r in results if r.status is Status.PASS}
    assert passed == {check for _, check, _ in GATES.values()} | {"kl", "argmax", "greedy"}


@pytest.mark.parametrize(("gate", "kind"), TABLE, ids=lambda x: x.replace(" ", "-"))
def test_a_hostile_answer_passes_no_gate(gate: str, kind: str, tmp_path: Path) -> None:
    method, check, metric = GATES[gate]
    results, verdict = judge(loader(method, kind, bool(metric)), tmp_path)
    assert verdict == "fail"
    bad = [r for r in of(results, check, metric) if r.status in BAD]
    assert bad and all(r.reason or r.where or r.value is not None for r in bad)
    assert not any("the check failed" in (r.reason or "") for r in results)  # a gate that stumbles judges nothing
    if kind.startswith("raises"):
        (said, *_) = (r for r in bad if r.status is Status.ERROR)
        assert "raised Boom: out of registers" in str(said.reason) and "second line" not in str(said.reason)
        assert str(said.where).startswith("hostile_cases.py:")
    if check not in ("logits",):
        assert {r.status for r in of(results, "logits")} == {Status.PASS}  # what the others found is kept


def test_no_dialog_rendered_is_not_covered(tmp_path: Path) -> None:
    results, _ = judge(loader("encode_chat", "None", False), tmp_path)
    (skip,) = of(results, "chat")
    assert skip.status is Status.SKIP and "returned None for every one" in str(skip.reason)


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_hostile_server_passes_no_gate(kind: str, tmp_path: Path) -> None:
    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Server:
        server = Server()
        server.next_tokens = spoiled(kind, server.next_tokens)  # type: ignore[method-assign]
        return server

    results, verdict = judge(load, tmp_path)
    assert verdict == "fail", [r for r in results if r.check in ("argmax", "greedy")]


def right_listing(ids: list[int]) -> dict[int, dict[int, float]]:
    """Every token's log-probability at every position."""
    rows = TABLES["logits"][torch.tensor(ids)].double().log_softmax(-1)
    return {position: dict(enumerate(row.tolist())) for position, row in enumerate(rows)}


LISTINGS: dict[str, Any] = {
    "None": lambda ids: None,
    "a list": lambda ids: [0.0],
    "rows of numbers": lambda ids: {0: -1.0},
    "a position beyond": lambda ids: {len(ids): {0: -1.0}},
    "an id beyond": lambda ids: {0: {10**6: -1.0}},
    "words": lambda ids: {0: {0: "likely"}},
    "NaN": lambda ids: right_listing(ids) | {0: {0: float("nan")}},
    "inf": lambda ids: right_listing(ids) | {0: {0: -float("inf")}},
    "off": lambda ids: {p: {i: x - 1e-3 for i, x in row.items()} for p, row in right_listing(ids).items()},
    "raises": lambda ids: {}[0],
}


@pytest.mark.parametrize("kind", ["right", *LISTINGS])
def test_hostile_log_probabilities_pass_no_gate(kind: str, tmp_path: Path) -> None:
    class Listing(Server):
        def log_probs(self, ids: list[int], positions: list[int]) -> Any:
            return LISTINGS.get(kind, right_listing)(ids)

    results, verdict = judge(Listing, tmp_path)
    found = {r.status for r in of(results, "logits")}
    assert (verdict, found) == ("pass", {Status.PASS}) if kind == "right" else verdict == "fail" and found & set(BAD)
    assert {r.status for r in of(results, "argmax")} == {Status.PASS}  # what the others found is kept


def test_a_right_server_passes_by_its_tokens(tmp_path: Path) -> None:
    results, verdict = judge(Server, tmp_path, ("fp32", "bf16"))
    assert verdict == "pass"
    assert {(r.check, r.dtype) for r in results if r.status is Status.PASS} == {
        (check, dtype) for check in ("argmax", "greedy") for dtype in ("fp32", "bf16")
    }


def test_greedy_with_nothing_generated_does_not_pass(tmp_path: Path) -> None:
    class Silent(Server):
        def next_tokens(self, ids: list[int], n: int) -> list[int]:
            return super().next_tokens(ids, n) if n == 1 else []

    results, verdict = judge(Silent, tmp_path)
    assert verdict == "fail"
    (said,) = (r for r in of(results, "greedy") if r.status is Status.FAIL)
    assert "returned no token" in str(said.reason)


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), SystemExit(3)])
def test_a_crash_in_one_dtype_keeps_the_finished_ones(error: BaseException, tmp_path: Path) -> None:
    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Model:
        if dtype == torch.bfloat16:
            raise error
        return Model()

    results, verdict = judge(load, tmp_path, ("fp32", "bf16"))
    assert verdict == "fail"
    assert {r.status for r in of(results, "logits") if r.dtype == "fp32"} == {Status.PASS}
    (crash,) = (r for r in results if r.status is Status.ERROR)
    assert (crash.check, crash.dtype) == ("logits", "bf16")
    assert f"load(checkpoint, bf16, cpu) raised {type(error).__name__}" in str(crash.reason)
    assert str(crash.where).startswith("test_hostile.py:")


# --- What a candidate says that it cannot do -------------------------------------------------------------------------

NOT_TODAY = {
    "forward": "logits", "taps": "taps", "ops": "ops", "decode": "cache", "prefill": "cache", "packed": "metamorphic",
    "compiled": "metamorphic", "encode": "tokens", "encode_chat": "chat", "config": "config", "weights": "weights",
    "rope": "rope", "loss_and_grads": "training", "trainer": "training",
}  # fmt: skip


@pytest.mark.parametrize("method", NOT_TODAY)
def test_not_implemented_is_not_covered_with_its_reason(method: str, tmp_path: Path) -> None:
    def refuse(*args: Any) -> Any:
        raise NotImplementedError("not today\nreally")

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Called:
        model = Called(checkpoint, dtype, device)
        setattr(model, method, refuse)
        return model

    results, verdict = judge(load, tmp_path)
    assert verdict == ("limited" if method == "forward" else "pass")
    skips = [r.reason for r in of(results, NOT_TODAY[method]) if r.status is Status.SKIP]
    assert any("not today" in str(reason) for reason in skips) and not any("really" in str(r) for r in skips)


def test_a_dtype_that_load_declines_is_not_covered(tmp_path: Path) -> None:
    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Model:
        if dtype == torch.bfloat16:
            raise NotImplementedError("no bf16 kernels")
        return Model()

    results, verdict = judge(load, tmp_path, ("fp32", "bf16"))
    assert verdict == "pass"
    (skip,) = (r for r in of(results, "logits") if r.status is Status.SKIP)
    assert skip.dtype == "bf16" and "no bf16 kernels" in str(skip.reason)


def test_without_fp32_the_verdict_is_limited(tmp_path: Path) -> None:
    class Low(Model):
        dtypes = ("bf16",)

    results, verdict = judge(Low, tmp_path, ("fp32", "bf16"))
    assert verdict == "limited"
    (skip,) = (r for r in of(results, "logits") if r.status is Status.SKIP)
    assert skip.dtype == "fp32" and "dtypes are bf16" in str(skip.reason)


def test_one_row_at_a_time_leaves_the_batch_uncovered(tmp_path: Path) -> None:
    class One(Model):
        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            if tokens.shape[0] > 1:
                raise NotImplementedError("one row at a time")
            return super().__call__(tokens)

    results, verdict = judge(One, tmp_path)
    assert verdict == "pass"
    assert "not covered: one row at a time" in {r.reason for r in of(results, "metamorphic", "row in a batch")}


def test_the_last_tokens_logits_alone_are_asked_prefix_by_prefix(tmp_path: Path) -> None:
    class Last(Model):
        last_only = True

        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().__call__(tokens)[:, -1:]

        def packed(self, tokens: torch.Tensor, doc_ids: torch.Tensor) -> torch.Tensor:
            return self.tables["logits"][tokens]

        def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
            return self(tokens)

        compiled = None

    results, verdict = judge(Last, tmp_path)
    assert verdict == "pass", [r for r in results if r.status in BAD]
    Last.last_only = False
    results, verdict = judge(Last, tmp_path / "undeclared")
    assert verdict == "fail"
    assert any("set last_only = True" in str(r.reason) for r in of(results, "logits"))
