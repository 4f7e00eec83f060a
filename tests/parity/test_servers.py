"""Candidates that are servers: what they are asked, what is judged of their answers, what is said of the rest."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mutant_evidence import base, judge
from nanollama.tokenizer import open_tokenizer
from nanollama.tokenizer.base import Tokenizer
from parity import machine
from parity.candidates.crash import Unasked
from parity.candidates.server.endpoint import Endpoint, endpoint_loader, server_name
from parity.candidates.server.spelling import Spelling
from parity.check import main
from parity.contract import Result, UsageError
from parity.mutants import evaluate as mutants
from ports import plain_port
from servers import Manner, Server, server, small_checkpoint

IDS = [256, 84, 104, 101, 32, 115, 101, 97]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("ckpt") / "meta")


@pytest.fixture(scope="module")
def port(checkpoint: Path) -> Callable[[Tensor], Tensor]:
    return plain_port.load(str(checkpoint), torch.float32, "cpu")


@pytest.fixture(scope="module")
def spoken(checkpoint: Path) -> Tokenizer:
    return open_tokenizer(checkpoint / "tokenizer.model")


def bases(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return getattr(plain_port, name)(base("gqa").case.checkpoint, dtype, "cpu")


def met(server: Server, checkpoint: Path, **options: str) -> Endpoint:
    return endpoint_loader(server_name(server.url, **options))(str(checkpoint), torch.float32, "")


def statuses(results: list[Result], check: str) -> set[str]:
    return {r.status.value for r in results if r.check == check}


# --- Judged by log-probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", ["prompt_logprobs", "echo", "content"])
def test_listed_log_probabilities_of_a_right_server_pass(lists: str) -> None:
    names = {"echo": "text", "content": "content"}.get(lists, "token_ids")
    with server(bases("load"), Manner(lists=lists, names=names, text_of=lambda i: f"token_id:{i}")) as found:
        _, results = judge("gqa", endpoint_loader(found.url))
    assert not mutants.failed(results)
    for check in ("logits", "argmax", "greedy"):
        assert "pass" in statuses(results, check), check
    # Of what is generated, too few positions are asked for statistics of KL.
    assert ("pass" in statuses(results, "kl")) == (lists != "content")


def test_a_server_whose_tokens_are_right_fails_by_its_log_probabilities() -> None:
    right = bases("load")

    def logits(tokens: Tensor) -> Tensor:
        return right(tokens) * 1.001  # the same order

    with server(logits, Manner(lists="prompt_logprobs")) as found:
        _, results = judge("gqa", endpoint_loader(found.url))
    assert statuses(results, "argmax") == statuses(results, "greedy") == {"pass"}
    assert {r.check for r in mutants.failed(results)} == {"logits", "kl"}


def test_a_log_probability_that_is_no_number_passes_no_gate() -> None:
    with server(bases("load"), Manner(lists="content", names="content")) as found:
        endpoint = endpoint_loader(found.url)
        loaded = endpoint(base("gqa").case.checkpoint, torch.float32, "cpu")
        asked = loaded.log_probs

        def broken(ids: list[int], positions: list[int]) -> dict[int, dict[int, float]]:
            return {p: {i: -float("inf") for i in row} for p, row in asked(ids, positions).items()}

        loaded.log_probs = broken  # type: ignore[method-assign]
        _, results = judge("gqa", endpoint)
    assert "fail" in statuses(results, "logits")


def test_a_server_without_log_probabilities_is_judged_by_tokens_and_it_is_said() -> None:
    with server(bases("load")) as found:
        _, results = judge("gqa", endpoint_loader(found.url))
    assert not mutants.failed(results)
    (said,) = (r.reason for r in results if r.check == "logits")
    assert said is not None and "lists no log-probabilities" in said


# --- Sampling --------------------------------------------------------------------------------------------------------


def test_a_default_repeat_penalty_is_switched_off_and_would_fail() -> None:
    with server(bases("load"), Manner(penalty=1.5)) as found:
        _, results = judge("gqa", endpoint_loader(found.url))
    assert not mutants.failed(results)
    deaf = Manner(penalty=1.5, refuses=("repeat_penalty", "repetition_penalty"))
    with server(bases("load"), deaf) as found:
        ev, results = judge("gqa", endpoint_loader(found.url))
    assert {r.check for r in mutants.failed(results)} >= {"argmax"}
    (note,) = (n for n in ev.candidates[None].meta["notices"] if "refuses" in n)
    assert note == "the server refuses repeat_penalty, repetition_penalty: sent without"


def test_every_refused_key_is_left_out_and_the_rest_is_sent(checkpoint: Path, port: Any) -> None:
    with server(port, Manner(refuses=("min_p", "echo", "seed"))) as found:
        endpoint = met(found, checkpoint)
        endpoint.next_tokens(IDS, 2)
    assert endpoint.left_out == ["min_p", "seed"]
    assert found.bodies[-1]["presence_penalty"] == 0 and "min_p" not in found.bodies[-1]


# --- Models and keys -------------------------------------------------------------------------------------------------


def run(checkpoint: Path, *flags: str) -> int:
    common = ("--references", "meta", "--dtype", "fp32", "--max_new_tokens", "4", "--checks", "logits,argmax,greedy")
    return main(["--ckpt", str(checkpoint), *common, *flags])


def test_of_two_models_one_is_to_be_named(
    checkpoint: Path, port: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with server(port, Manner(models=("big", "small"))) as found:
        assert run(checkpoint, "--candidate", found.url) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "serves 2 models, big, small: name one with --model" in line
        assert run(checkpoint, "--candidate", found.url, "--model", "medium") == 2
        assert "has no model 'medium': it serves big, small" in capsys.readouterr().err
        assert run(checkpoint, "--candidate", found.url, "--model", "small") == 0
        assert "the server's model is small" in capsys.readouterr().out
    assert {body["model"] for body in found.bodies} == {"small"}


def test_a_key_is_sent_and_never_shown(
    checkpoint: Path, port: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    with server(port, Manner(key="right-key")) as found:
        asked = ("--candidate", found.url, "--json", str(report))
        assert run(checkpoint, *asked) == 2
        assert "wants a key: --api_key" in capsys.readouterr().err
        monkeypatch.setenv("A_KEY", "wrong-key")
        assert run(checkpoint, *asked, "--api_key", "A_KEY") == 2
        said = capsys.readouterr().err
        assert "refuses the key" in said and "wrong-key" not in said
        monkeypatch.setenv("A_KEY", "right-key")
        assert run(checkpoint, *asked, "--api_key", "A_KEY") == 0
    said = capsys.readouterr()
    assert "right-key" not in said.out + said.err + report.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--candidate", "http://127.0.0.1:9/v1", "--api_key", "sk-abc"), "expected the name of an environment"),
        (("--candidate", "http://127.0.0.1:9/v1", "--api_key", "NO_SUCH_VARIABLE_17"), "expected the name of an env"),
        (("--candidate", "http://me:secret@127.0.0.1:9/v1"), "a password in an address would be shown"),
        (("--candidate", "nanollama", "--model", "x"), "--model is a server's"),
    ],
)
def test_a_key_or_model_that_cannot_be_meant_is_refused(
    flags: tuple[str, ...], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and "sk-abc" not in line and "secret" not in line


# --- Text in place of ids --------------------------------------------------------------------------------------------


def speaking(spoken: Tokenizer, checkpoint: Path, **more: Any) -> Manner:
    shown = Spelling(checkpoint / "tokenizer.model", 512)._shown
    return Manner(names="text", speaks=spoken, text_of=shown, **more)


@pytest.mark.parametrize("counts_only", [False, True])
@pytest.mark.parametrize("lists", [None, "echo"])
def test_a_server_that_refuses_ids_is_asked_by_text(
    lists: str | None, counts_only: bool, checkpoint: Path, port: Any, spoken: Tokenizer
) -> None:
    with (
        server(port) as plain,
        server(port, speaking(spoken, checkpoint, lists=lists, counts_only=counts_only)) as found,
    ):
        wanted, endpoint = met(plain, checkpoint), met(found, checkpoint)
        for n in range(2, len(IDS)):
            try:
                assert endpoint.next_tokens(IDS[:n], 1) == wanted.next_tokens(IDS[:n], 1)
            except Unasked:  # bytes that are no text
                assert wanted.next_tokens(IDS[:n], 1)[0] in range(128, 256)
        listed = endpoint.log_probs(IDS, list(range(len(IDS))))
    assert ("as many as" in endpoint.notices[0]) == counts_only and "text whose ids" in endpoint.notices[0]
    assert (len(listed) >= len(IDS) - 1) == (lists == "echo")
    exact = port(torch.tensor([IDS]))[0].log_softmax(-1)
    for position, row in listed.items():
        for token, value in row.items():
            assert value == pytest.approx(float(exact[position, token]), abs=1e-4)


def test_ids_that_are_no_text_are_not_asked(checkpoint: Path, port: Any, spoken: Tokenizer) -> None:
    with server(port, speaking(spoken, checkpoint)) as found:
        endpoint = met(found, checkpoint)
        with pytest.raises(Unasked, match="not those of a text"):
            endpoint.next_tokens([256, 84, 200], 1)


@pytest.mark.parametrize("lists", [None, "echo"])
def test_without_a_tokenizer_text_names_no_token(lists: str | None) -> None:
    manner = Manner(names="text", lists=lists, text_of=lambda i: "?")
    with server(bases("load"), manner) as found, pytest.raises(UsageError, match="its answers name no token ids"):
        met(found, Path(base("gqa").case.checkpoint))


def test_another_tokenizer_is_refused(checkpoint: Path, port: Any, spoken: Tokenizer) -> None:
    class Other(Tokenizer):
        def encode(self, text: str, **more: Any) -> list[int]:
            return [*super().encode(text, **more), 7]

    other = Other(spoken.vocabulary, spoken._encoder)
    with server(port, speaking(other, checkpoint)) as found, pytest.raises(UsageError, match="is not the checkpoint's"):
        met(found, checkpoint)
    counting = speaking(other, checkpoint, counts_only=True)
    with server(port, counting) as found, pytest.raises(UsageError, match=r"makes 21 tokens of a text of 20"):
        met(found, checkpoint)


# --- Context ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tells", ["400", "models", "props"])
def test_no_more_is_asked_than_a_server_holds(tells: str) -> None:
    with server(bases("load"), Manner(context=40, tells=tells, lists="prompt_logprobs")) as found:
        ev, results = judge("gqa", endpoint_loader(found.url))
    assert not mutants.failed(results)
    assert "pass" in statuses(results, "logits") and "pass" in statuses(results, "argmax")
    assert "the server holds 40 positions" in ev.candidates[None].meta["notices"]
    over = [b for b in found.bodies if len(b["prompt"]) + b["max_tokens"] > 40]
    assert len(over) == (1 if tells == "400" else 0)


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 512 tokens. However, you requested 741 tokens (740 in the prompt)",
        "the request exceeds the available context size (512 tokens), try increasing it",
        "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 740 `inputs` tokens and 1 `max_new_tokens`",
        "The input (740 tokens) is longer than the model's context length (512 tokens).",
        '{"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 740, "n_ctx": 512}}',
    ],
)
def test_servers_say_in_their_own_words_what_they_hold(words: str) -> None:
    from parity.candidates.server.completions import holds
    from parity.candidates.server.transport import Refused

    assert holds(Refused("", 400, words)) == 512
    assert holds(Refused("", 400, re.sub(r"\D*512.*", "", words))) is None


# --- Dtypes ----------------------------------------------------------------------------------------------------------


def test_both_dtypes_of_a_large_checkpoint_are_judged(
    checkpoint: Path, port: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SMALL_BYTES", 0)
    out = tmp_path / "report.json"
    with server(port, Manner(lists="prompt_logprobs")) as found:
        code = run(checkpoint, "--candidate", found.url, "--dtype", "fp32,bf16", "--json", str(out))
    results = json.loads(out.read_text())["results"]
    assert code == 0
    for check in ("logits", "argmax"):
        assert {r["dtype"] for r in results if r["check"] == check and r["status"] == "pass"} == {"fp32", "bf16"}
