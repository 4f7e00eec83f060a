"""What a client can get wrong is a 4xx with one line that says what; the server answers the next one as ever."""

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server is in the extra serve")
pytest.importorskip("uvicorn", reason="the server is in the extra serve")

from nanollama.generation.llama import Llama
from nanollama.serve.app import Service
from servers import small_checkpoint
from serving import ask, service_of

IDS = [256, 84, 104, 101]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = small_checkpoint(tmp_path_factory.mktemp("ckpt") / "meta")
    return service_of(Llama.load(folder, dtype="fp32", compile="off"), context=64)


def said(response: Any, status: int = 400) -> str:
    """The message of a refusal in OpenAI's shape, which is one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 400
    return error["message"]


BODIES = {
    "empty": (b"", "is not JSON"),
    "half a JSON": (b'{"prompt": ', "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff\xfe\xfa"}', "is not JSON"),
    "a list": (b"[1, 2]", "expected a JSON object"),
    "a number": (b"17", "expected a JSON object"),
    "nested lists": (b"[" * 5000 + b"]" * 5000, "nested more than 24 deep"),
    "nested deeper than Python goes": (b'{"prompt":' + b"[" * 30000, "nested more than 24 deep"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "stands there twice"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
    "a number beyond all": (b'{"prompt": "a", "temperature": 1e999}', "beyond 64 bits"),
    "a number of 4000 digits": (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "more than 64 bits"),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_body_that_is_no_request_is_refused(service: Service, path: str, name: str) -> None:
    body, words = BODIES[name]
    assert words in said(ask(service, path, body))


# Of a completion: what is sent, the field that the refusal names, some of its words.
FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "expected text"),
    ({"prompt": None}, "prompt", "expected text"),
    ({"prompt": []}, "prompt", "expected text"),
    ({"prompt": 17}, "prompt", "expected text"),
    ({"prompt": {"a": 1}}, "prompt", "expected text"),
    ({"prompt": [1, "a"]}, "prompt", "prompt 0 is 1"),
    ({"prompt": [True, False]}, "prompt", "prompt 0 is True"),
    ({"prompt": [1.5]}, "prompt", "prompt 0 is 1.5"),
    ({"prompt": [[1, 2], []]}, "prompt", "prompt 1 is empty"),
    ({"prompt": [[[1]]]}, "prompt", "prompt 0 is [[1]]"),
    ({"prompt": [1, 512]}, "prompt", "token id 512: expected 0 to 511"),
    ({"prompt": [1, -1]}, "prompt", "token id -1"),
    ({"prompt": [2**62]}, "prompt", "token id 4611686018427387904"),
    ({"prompt": [2**70]}, "prompt", "token id 1180591620717411303424"),
    ({"prompt": ["a"] * 257}, "prompt", "holds 257 prompts"),
    ({"prompt": [7] * 65}, "prompt", "maximum context length is 64 tokens; you asked for 65"),
    ({"prompt": [7] * 60, "max_tokens": 6}, "prompt", "66 (60 in the prompt, 6 for the answer)"),
    ({"prompt": "a" * 60, "max_tokens": 2**31}, "prompt", "maximum context length"),
    ({"prompt": "a" * 40_000}, "prompt", "40,000 characters are more than"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "expected a whole number from 0"),
    ({"prompt": "a", "max_tokens": 2.0}, "max_tokens", "2.0: expected a whole number"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "True: expected a whole number"),
    ({"prompt": "a", "max_tokens": "8"}, "max_tokens", "'8': expected a whole number"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "expected a number from 0 to 100"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "'hot'"),
    ({"prompt": "a", "temperature": 1e-30}, "temperature", "1e-30"),
    ({"prompt": "a", "top_p": 1.1}, "top_p", "from 0 to 1"),
    ({"prompt": "a", "repetition_penalty": 1e-9}, "repetition_penalty", "from 0.01 to 100"),
    ({"prompt": "a", "top_k": 1.0}, "top_k", "whole number"),
    ({"prompt": "a", "seed": 2**63}, "seed", "whole number"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "True"),
    ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 20"),
    ({"prompt": "a", "stop": ""}, "stop", "expected a text of 1"),
    ({"prompt": "a", "stop": ["x", 1]}, "stop", "expected a text of 1"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "list of up to 16"),
    ({"prompt": "a", "stop": "x" * 257}, "stop", "256 characters"),
    ({"prompt": "a", "stream": "yes"}, "stream", "expected true or false"),
    ({"prompt": "a", "stream_options": {}}, "stream_options", "stream true beside it"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "x", "unsupported: x"),
    ({"prompt": "a", "echo": 1}, "echo", "expected true or false"),
    ({"prompt": "a", "n": 2}, "n", "n is 2: this server takes 1 alone"),
    ({"prompt": "a", "best_of": 3}, "best_of", "takes 1 alone"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty", "takes 0 alone"),
    ({"prompt": "a", "logit_bias": {"50256": -100}}, "logit_bias", "takes {} alone"),
    ({"prompt": "a", "guided_json": {}}, "guided_json", "unsupported: guided_json"),
    ({"prompt": "a", "temprature": None}, "temprature", "unsupported: temprature"),
    ({"prompt": "a", "mirostat": 0, "n": 3}, None, "unsupported: mirostat, n"),
    ({"prompt": "a", "messages": HI}, "messages", "unsupported: messages"),
    ({"prompt": "a", "\ud800\n\x1b": 1}, None, "unsupported: \\ud800"),
]


@pytest.mark.parametrize(("asked", "param", "words"), FIELDS, ids=lambda x: str(x)[:40])
def test_a_field_that_is_wrong_is_named(service: Service, asked: dict[str, Any], param: str | None, words: str) -> None:
    response = ask(service, TEXT, asked)
    assert words in said(response)
    if param is not None:
        assert response.json()["error"]["param"] == param


CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "expected a list of messages"),
    ({"messages": "Hi"}, "messages", "expected a list of messages"),
    ({"messages": []}, "messages", "expected a list of messages"),
    ({"messages": ["Hi"]}, "messages", "message 0"),
    ({"messages": [{"role": "pope", "content": "Hi"}]}, "messages", "message 0: role 'pope'"),
    ({"messages": [{"role": "user"}]}, "messages", "message 0: content is NoneType"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "content part"),
    ({"messages": [{"role": "user", "content": "a" * 999}]}, "messages", "maximum context length is 64"),
    ({"messages": [{"role": "user", "content": "a" * 50_000}]}, "messages", "characters are more than"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens", "from 1"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs", "without logprobs"),
    ({"messages": HI, "logprobs": 3}, "logprobs", "expected true or false"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools", "takes [] alone"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format", "alone; leave it out"),
    ({"messages": HI, "echo": True}, "echo", "unsupported: echo"),
]


@pytest.mark.parametrize(("asked", "param", "words"), CHATS, ids=lambda x: str(x)[:40])
def test_a_chat_that_is_wrong_is_told_where(service: Service, asked: dict[str, Any], param: str, words: str) -> None:
    response = ask(service, CHAT, asked)
    assert words in said(response) and response.json()["error"]["param"] == param


def test_a_body_beyond_the_limit_is_not_kept(service: Service) -> None:
    assert "more than 65,536 bytes" in said(ask(service, TEXT, b'"' + b"a" * 70_000), 413)


def test_values_that_change_nothing_and_notes_are_let_pass(service: Service) -> None:
    off = {
        "n": 1,
        "best_of": None,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "suffix": None,
        "user": "me",
        "top_k": -1,
    }
    assert ask(service, TEXT, {"prompt": IDS, "max_tokens": 2, "top_p": 0, "stop": None, **off}).status_code == 200
    chat = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {"a": 1},
    }
    assert ask(service, CHAT, {"messages": HI, "max_tokens": 2, **chat}).status_code == 200


def test_another_model_another_path_and_another_method_are_refused(service: Service) -> None:
    response = ask(service, TEXT, {"model": "gpt-9\n", "prompt": "a"})
    assert "this server has tiny" in said(response, 404) and response.json()["error"]["code"] == "model_not_found"
    assert said(ask(service, "/v2/completions", {}), 404) == "Not Found"
    assert said(ask(service, TEXT), 405) == "Method Not Allowed"


def test_a_page_of_another_site_gets_nothing(service: Service) -> None:
    """It can send text/plain without being asked, and its own name can be made to lead here."""
    body = json.dumps({"prompt": "a"}).encode()
    sent = ask(service, TEXT, body, headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in said(sent, 415)
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "evil.example:8000", ""):
        assert "this server answers to 127.0.0.1" in said(ask(service, "/v1/models", headers={"Host": host}), 403)
    assert ask(service, "/v1/models", headers={"Host": "localhost:9"}).status_code == 200


def test_without_its_key_nothing_is_answered(service: Service) -> None:
    closed = service_of(service.reader.llama, key="sk-right", hosts=None)
    for headers in (
        {},
        {"Authorization": "Bearer sk-wrong"},
        {"Authorization": "sk-right"},
        {"Authorization": "Bearer "},
    ):
        for path in ("/v1/models", "/health", "/v1/nothing"):
            response = ask(closed, path, headers=headers)
            if path != "/v1/nothing":
                assert "Authorization: Bearer KEY" in said(response, 401)
            assert "sk-right" not in response.text
    right = {"Authorization": "Bearer sk-right"}
    assert ask(closed, TEXT, {"prompt": IDS, "max_tokens": 1}, headers=right).status_code == 200


def test_what_fails_here_is_a_500_and_the_next_answer_comes(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret place")

    with monkeypatch.context() as patch:
        patch.setattr(type(service.reader.llama), "generate", broken)
        response = ask(service, TEXT, {"prompt": IDS, "max_tokens": 2})
        streamed = ask(service, TEXT, {"prompt": IDS, "max_tokens": 2, "stream": True})
    assert said(response, 500) == "the server failed (RuntimeError); its own output says more"
    assert '"type": "server_error"' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
    assert capsys.readouterr().err.count("RuntimeError: a secret place") == 2
    assert ask(service, TEXT, {"prompt": IDS, "max_tokens": 2}).status_code == 200
