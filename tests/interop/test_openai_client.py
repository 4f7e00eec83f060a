"""OpenAI's own client against nanollama's server: it reads every answer, stream and refusal."""

from collections.abc import Iterator

import pytest

pytest.importorskip("openai", reason="OpenAI's client is in the extra interop")
pytest.importorskip("starlette", reason="the server is in the extra serve")

import openai

from nanollama.generation.llama import Llama, Sampling
from nanollama.serve.app import Service
from servers import small_checkpoint
from serving import running, service_of

IDS = [256, 84, 104, 101, 32, 115, 101, 97]
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = small_checkpoint(tmp_path_factory.mktemp("ckpt") / "meta")
    return service_of(Llama.load(folder, dtype="fp32", compile="off"), key="sk-right", hosts=None, context=512)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator["openai.OpenAI"]:
    with running(service) as url, openai.OpenAI(base_url=url, api_key="sk-right", max_retries=0) as found:
        yield found


def test_it_lists_completes_and_streams(client: "openai.OpenAI", service: Service) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    wanted = "".join(e.text for e in service.reader.llama.generate([IDS], Sampling(max_new_tokens=8)))
    asked = {"model": "tiny", "prompt": "The sea", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=3, echo=True)
    assert whole.choices[0].text == "The sea" + wanted and whole.usage.total_tokens == 16
    assert len(whole.choices[0].logprobs.token_logprobs) == 16
    assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == wanted


def test_it_chats(client: "openai.OpenAI") -> None:
    asked = {"model": "tiny", "messages": HI, "max_completion_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    message = whole.choices[0].message
    assert message.role == "assistant" and len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    *parts, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].delta.content for part in parts) == message.content
    assert last.usage == whole.usage and parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_refusals_are_the_clients_own_errors(client: "openai.OpenAI", service: Service) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, n=3)
    assert caught.value.param == "n" and "this server takes 1 alone" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * (service.reader.context_tokens + 1), max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
