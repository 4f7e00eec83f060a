"""Flags become a request, and with what the checkpoint is a plan: what is decided before anything runs."""

from pathlib import Path

import pytest

from checkpoint_cases import LLAMA31, make_weights, write
from parity.candidates.nano.checkpoint import describe
from parity.contract import UsageError
from parity.run.request import Request, choose_witnesses, order_dtypes, plan, split_list, why_untrained


def test_a_comma_list_keeps_its_order_and_says_each_item_once() -> None:
    assert split_list("--dtype", "bf16, fp32,bf16", ("fp32", "bf16")) == ("bf16", "fp32")


@pytest.mark.parametrize(("text", "said"), [("fp64", "'fp64' is unknown: expected fp32"), (" ,", "is empty")])
def test_a_list_of_nothing_known_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        split_list("--dtype", text, ("fp32",))


@pytest.mark.parametrize(
    ("request_", "large", "parameters", "said"),
    [
        (Request(checks=("logits",)), False, 1, "it was not asked for"),
        (Request(checks=("training",)), True, 1, "small checkpoints"),
        (Request(checks=("training",), dtypes=("bf16",)), False, 1, "in fp32"),
        (Request(checks=("training",)), False, 34_000_000, "34 million parameters"),
        (Request(checks=("training",), named=True), False, 34_000_000, ""),
        (Request(checks=("training",)), False, 4_000_000, ""),
    ],
)
def test_training_is_left_out_with_the_reason(request_: Request, large: bool, parameters: int, said: str) -> None:
    found = why_untrained(request_, large, parameters)
    assert said in found and bool(said) == bool(found)


def test_what_is_stored_runs_first_of_a_large_checkpoint() -> None:
    assert order_dtypes(("fp32", "bf16"), "bf16") == ["bf16", "fp32"]


def test_transformers_is_a_witness_where_only_it_opens_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    asked = Request(references=("meta",), checks=("tokens",))
    assert choose_witnesses(asked, tmp_path) == ("hf",)
    assert choose_witnesses(Request(checks=("tokens",)), tmp_path) == ()  # both judge already


def test_a_plan_keeps_to_the_positions_that_the_candidate_holds(tmp_path: Path) -> None:
    described = describe(str(write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))), None)
    asked = Request("my_port.py:load", checks=("logits", "ops"), max_new_tokens=32)
    made = plan(asked, described, tmp_path, max_positions=40)
    case = made.case
    assert case.context == 40 and max(case.rope_positions) == 39 and case.max_new_tokens == 20
    assert case.prompts is not None and max(map(len, case.prompts)) == 20
    assert made.candidate == "my_port.py:load" and made.ops and not made.large and case.training is None
    assert any("40 positions are all that there is" in notice for notice in made.notices)
