"""The server: what it answers is what the model says, in OpenAI's shapes."""

from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the server is in the extra serve")
pytest.importorskip("uvicorn", reason="the server is in the extra serve")

from nanollama.chat import encode_chat
from nanollama.generation.llama import Llama, Sampling
from nanollama.serve.app import Service
from servers import small_checkpoint
from serving import ask, chunks, service_of

IDS = [256, 84, 104, 101, 32, 115, 101, 97]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama.load(small_checkpoint(tmp_path_factory.mktemp("ckpt") / "meta"), dtype="fp32", compile="off")


@pytest.fixture(scope="module")
def service(llama: Llama) -> Service:
    return service_of(llama)


def choice(service: Service, path: str = "/v1/completions", **asked: Any) -> dict[str, Any]:
    response = ask(service, path, {"model": "tiny", **asked})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def exact(llama: Llama, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) after each of ids, in one pass without a cache."""
    with torch.inference_mode():
        return llama.model(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_the_model_is_listed_with_what_it_holds(service: Service) -> None:
    (entry,) = ask(service, "/v1/models").json()["data"]
    assert (entry["id"], entry["object"]) == ("tiny", "model")
    assert entry["max_model_len"] == service.reader.context_tokens
    assert ask(service, "/v1/models/tiny").json() == entry
    assert ask(service, "/v1/models/other").status_code == 404


def test_a_completion_is_what_the_model_generates(service: Service, llama: Llama) -> None:
    wanted = list(llama.generate([IDS], Sampling(max_new_tokens=9)))
    response = ask(service, "/v1/completions", {"prompt": IDS, "max_tokens": 9, "return_token_ids": True}).json()
    assert response["object"] == "text_completion" and response["model"] == "tiny"
    assert response["usage"] == {"prompt_tokens": 8, "completion_tokens": 9, "total_tokens": 17}
    (found,) = response["choices"]
    assert found["token_ids"] == [event.token for event in wanted]
    assert found["text"] == "".join(event.text for event in wanted)
    assert found["finish_reason"] == "length" and found["logprobs"] is None


def test_text_begins_as_the_tokenizer_begins_it_and_ids_stay(service: Service) -> None:
    by_text = choice(service, prompt="The sea", max_tokens=3, return_token_ids=True)
    assert by_text["prompt_token_ids"] == IDS
    assert by_text["token_ids"] == choice(service, prompt=IDS, max_tokens=3, return_token_ids=True)["token_ids"]
    assert choice(service, prompt=IDS[1:], max_tokens=1, return_token_ids=True)["prompt_token_ids"] == IDS[1:]


def test_several_prompts_get_the_answers_that_they_get_alone(service: Service) -> None:
    prompts = [IDS, IDS[:3], [256, 7, 9]]
    common = {"max_tokens": 5, "return_token_ids": True, "logprobs": 2}
    together = ask(service, "/v1/completions", {"prompt": prompts, **common}).json()
    assert [c["index"] for c in together["choices"]] == [0, 1, 2]
    for ids, found in zip(prompts, together["choices"], strict=True):
        assert found["logprobs"] == choice(service, prompt=ids, **common)["logprobs"]
    assert together["usage"] == {"prompt_tokens": 14, "completion_tokens": 15, "total_tokens": 29}


@pytest.mark.parametrize("temperature", [0, 0.5, 3])
def test_log_probabilities_are_the_models_own_at_any_temperature(
    service: Service, llama: Llama, temperature: float
) -> None:
    drawn = {"temperature": temperature, "seed": 3, "top_k": 40, "ignore_eos": True}
    names = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    found = choice(service, prompt=IDS, max_tokens=6, logprobs=3, **drawn, **names)
    table, ids = exact(llama, [*IDS, *found["token_ids"]]), found["token_ids"]
    for i, (token, row) in enumerate(zip(ids, found["logprobs"]["top_logprobs"], strict=True)):
        after = table[len(IDS) - 1 + i]
        best = after.topk(3).indices.tolist()
        assert set(row) == {f"token_id:{t}" for t in (*best, token)}
        for name, value in row.items():
            assert value == pytest.approx(float(after[int(name.removeprefix("token_id:"))]), abs=2e-5)
        assert found["logprobs"]["token_logprobs"][i] == row[f"token_id:{token}"]


def test_given_tokens_are_scored_each_after_those_before_it(service: Service, llama: Llama) -> None:
    table = exact(llama, IDS)
    found = choice(service, prompt=IDS, max_tokens=0, echo=True, logprobs=2, prompt_logprobs=3)
    assert found["logprobs"]["token_logprobs"][0] is None and found["logprobs"]["top_logprobs"][0] is None
    assert found["prompt_logprobs"][0] is None
    assert len(found["prompt_logprobs"]) == len(found["logprobs"]["tokens"]) == len(IDS)
    for i, token in enumerate(IDS[1:], start=1):
        own = float(table[i - 1, token])
        assert found["logprobs"]["token_logprobs"][i] == pytest.approx(own, abs=2e-5)
        ranked = found["prompt_logprobs"][i]
        assert ranked[str(token)]["logprob"] == pytest.approx(own, abs=2e-5)
        assert ranked[str(token)]["rank"] == int((table[i - 1] > table[i - 1, token]).sum()) + 1
        assert {int(t) for t in ranked} == {*table[i - 1].topk(3).indices.tolist(), token}
    assert found["finish_reason"] == "length"


def test_an_echo_is_the_prompt_and_the_answer(service: Service) -> None:
    answer = choice(service, prompt="The sea", max_tokens=4)["text"]
    found = choice(service, prompt="The sea", max_tokens=4, echo=True, logprobs=0)
    assert found["text"] == "The sea" + answer
    lists = found["logprobs"]
    assert lists["tokens"][1:8] == list("The sea") and lists["top_logprobs"] is None
    assert lists["text_offset"][:8] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert len(lists["tokens"]) == len(lists["token_logprobs"]) == len(lists["text_offset"]) == 12


def test_bytes_that_are_no_character_are_named_as_bytes(service: Service) -> None:
    found = choice(service, prompt=[256, 0xE2, 0x80, 65], max_tokens=0, echo=True, logprobs=0)
    assert found["logprobs"]["tokens"] == ["<|begin_of_text|>", "bytes:\\xe2", "bytes:\\x80", "A"]


def test_a_stop_text_ends_an_answer_and_is_not_shown(service: Service) -> None:
    whole = choice(service, prompt=IDS, max_tokens=16, ignore_eos=True)["text"]
    stop = next(c for c in whole[1:] if c.isascii() and c not in whole[0])
    found = choice(service, prompt=IDS, max_tokens=16, ignore_eos=True, stop=["never!", stop])
    assert found["text"] == whole[: whole.index(stop)] and found["finish_reason"] == "stop"


def test_a_seed_repeats_an_answer_and_none_does_not(service: Service) -> None:
    drawn = {"prompt": IDS, "temperature": 1.5, "max_tokens": 12, "return_token_ids": True}
    same = [choice(service, **drawn, seed=11)["token_ids"] for _ in range(2)]
    free = [choice(service, **drawn)["token_ids"] for _ in range(3)]
    assert same[0] == same[1] and len({tuple(ids) for ids in free}) == 3


# --- Streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"stop": "t"}, {"echo": True, "logprobs": 1}])
def test_a_stream_says_what_the_whole_answer_says(service: Service, more: dict[str, Any]) -> None:
    asked = {"prompt": IDS, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True, **more}
    whole = ask(service, "/v1/completions", asked).json()
    response = ask(service, "/v1/completions", {**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last = chunks(response)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1 and all(part["usage"] is None for part in parts)
    told = [part["choices"][0] for part in parts]
    wanted = whole["choices"][0]
    assert "".join(c["text"] for c in told) == wanted["text"]
    assert [t for c in told for t in c["token_ids"]] == wanted["token_ids"]
    assert [c["finish_reason"] for c in told if c["finish_reason"]] == [wanted["finish_reason"]]
    if "logprobs" in more:
        for key, values in wanted["logprobs"].items():
            assert [v for c in told for v in c["logprobs"][key]] == values, key


# --- Chats -----------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|eot_id|>"}]


def test_a_chat_is_sent_as_chat_renders_it(service: Service, llama: Llama) -> None:
    assert llama.tokenizer is not None
    ids = encode_chat(MESSAGES, llama.tokenizer, add_generation_prompt=True).ids
    wanted = list(llama.generate([ids], Sampling(max_new_tokens=6, top_logprobs=2)))
    asked = {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    response = ask(service, "/v1/chat/completions", asked).json()
    assert response["object"] == "chat.completion"
    (found,) = response["choices"]
    assert found["prompt_token_ids"] == ids and found["token_ids"] == [event.token for event in wanted]
    assert found["message"] == {"role": "assistant", "content": "".join(event.text for event in wanted)}
    for entry, event in zip(found["logprobs"]["content"], wanted, strict=True):
        assert (entry["id"], entry["logprob"]) == (event.token, pytest.approx(event.logprob))
        assert [top["id"] for top in entry["top_logprobs"]] == [token for token, _ in event.top]
    developer = [{"role": "developer", "content": "Be brief."}, MESSAGES[1]]
    again = choice(service, "/v1/chat/completions", **{**asked, "messages": developer})
    assert again["prompt_token_ids"] == ids


def test_a_streamed_chat_begins_with_its_role(service: Service) -> None:
    asked = {"messages": MESSAGES, "max_completion_tokens": 6}
    whole = choice(service, "/v1/chat/completions", **asked)
    first, *rest = chunks(ask(service, "/v1/chat/completions", {**asked, "stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(part["object"] == "chat.completion.chunk" for part in rest)
    assert "".join(part["choices"][0]["delta"]["content"] for part in rest) == whole["message"]["content"]


def test_a_chats_prompt_is_scored_beside_its_choices(service: Service) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    found = ask(service, "/v1/chat/completions", asked).json()
    ids = found["choices"][0]["prompt_token_ids"]
    assert [list(row) for row in found["prompt_logprobs"][1:]] == [[str(token)] for token in ids[1:]]


def test_a_model_of_ids_alone_needs_no_tokenizer(llama: Llama) -> None:
    bare = service_of(Llama(llama.model))
    asked = {"prompt": IDS, "max_tokens": 3, "logprobs": 1, "return_token_ids": True}
    found = choice(bare, **asked)
    assert found["logprobs"]["tokens"] == [f"token_id:{token}" for token in found["token_ids"]]
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": MESSAGES})):
        response = ask(bare, f"/v1/{path}", body)
        assert response.status_code == 400 and "no tokenizer" in response.json()["error"]["message"]
