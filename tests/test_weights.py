"""`pytest -m weights`: what only a trained checkpoint can show, the one that $NANOLLAMA_CKPT names; else it is skipped.

    NANOLLAMA_CKPT=Meta-Llama-3.1-8B pytest -m weights

Seeded weights compute right without meaning anything: here text has to be likely, an answer has to be true and end, and
outliers of trained states have to fit into the gates. Any Llama will do; what is one release's own asks for it.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from nanollama.generation.llama import Llama, Sampling
from nanollama.generation.repl import Chat
from nanollama.generation.score import score
from parity.check import main

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        "NANOLLAMA_CKPT" not in os.environ, reason="needs a trained checkpoint: set NANOLLAMA_CKPT to it"
    ),
]

# Herman Melville, Moby-Dick (1851): known to all models, and long enough for its mean to be steady.
TEXT = (
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself "
    "growing grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself "
    "involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet; then, I account "
    "it high time to get to sea as soon as I can."
)
NATS_BYTE = 0.9  # of a trained model, a byte of it, at most; one whose q and k are permuted wrongly has 2 and more
# Greedy texts of the real Llama 3.1 8B base model, from Meta's code, as the nano Llama 3.1 project published them.
COMPLETIONS = {
    "Clearly, the meaning of life is": " to be found in the pursuit of happiness. But what is happiness? Is it the "
    "same as pleasure? Is it the same as contentment? Is it the",
    "Simply put, the theory of relativity states that": " the laws of physics are the same for all non-accelerating "
    "observers, and the speed of light in a vacuum is the same for all observers, regardless",
    "The repo llm.c on GitHub is": " a collection of code snippets and examples for using the Large Language Model "
    "(LLM) in various applications. The repo is maintained by a community of developers and researchers",
}


def ckpt() -> str:
    return os.environ["NANOLLAMA_CKPT"]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.load(ckpt(), compile="off")


def nats_a_byte(llama: Llama, text: str) -> float:
    ids = llama.encode(text)
    return -sum(token.logprob for token in score(llama.model, ids)) / len(text.encode())


def test_it_passes_the_check_and_its_result_can_be_sent(tmp_path: Path) -> None:
    result, report = tmp_path / "result.json", tmp_path / "report.json"
    code = main(["--ckpt", ckpt(), "--max_new_tokens", "16", "--json", str(report), "--result", str(result)])
    assert code == 0, json.loads(report.read_text())["why"]
    found = json.loads(result.read_text())
    assert found["verdict"] == "pass" and str(Path(ckpt()).resolve().parent) not in result.read_text()


def test_text_is_likely(llama: Llama) -> None:
    assert nats_a_byte(llama, TEXT) < NATS_BYTE


def test_the_same_words_in_another_order_are_less_likely(llama: Llama) -> None:
    assert nats_a_byte(llama, " ".join(reversed(TEXT.split()))) > nats_a_byte(llama, TEXT) + 0.3


@pytest.mark.parametrize(("scheme", "costs"), [("int8", 0.01), ("int4", 0.1)])
def test_integers_cost_little(llama: Llama, scheme: str, costs: float) -> None:
    """Outliers in weights are what seeded ones do not have. costs: nats a byte."""
    rounded = Llama.load(ckpt(), quantize=scheme, compile="off")
    assert abs(nats_a_byte(rounded, TEXT) - nats_a_byte(llama, TEXT)) < costs


def test_a_plain_question_is_answered_and_the_answer_ends(llama: Llama) -> None:
    if llama.tokenizer is None or not llama.tokenizer.chat_template:
        pytest.skip("the checkpoint has no chat template: it is no model to talk to")
    chat = Chat(llama, Sampling(max_new_tokens=200))
    assert "Paris" in "".join(chat.answer("What is the capital of France?"))
    assert chat.notices == []


def test_the_server_says_of_text_what_the_model_says(llama: Llama) -> None:
    pytest.importorskip("starlette", reason="the server is in the extra serve")
    from serving import ask, service_of

    asked = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1}
    told = ask(service_of(llama), "/v1/completions", asked).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert -sum(told[1:]) / len(TEXT.encode()) == pytest.approx(nats_a_byte(llama, TEXT), abs=1e-6)


def is_8b_base(llama: Llama) -> bool:
    shape = (llama.config.dim, llama.config.n_layers, llama.config.vocab_size)
    return shape == (4096, 32, 128_256) and llama.config.rope_scaling is not None


def test_the_8b_completes_as_published(llama: Llama) -> None:
    """Teacher-forced on the published text: where the two attention paths' rounding leaves one best token, it is it."""
    if not is_8b_base(llama) or (llama.tokenizer and llama.tokenizer.chat_template):
        pytest.skip("it is not Llama 3.1 8B, the base model: texts of others were not published")
    from parity.candidates.nano.model import exact, fast

    models = [load(ckpt(), torch.bfloat16, "cpu") for load in (exact, fast)]
    for prompt, wanted in COMPLETIONS.items():
        start, ids = len(models[0].encode(prompt)), models[0].encode(prompt + wanted)
        with torch.inference_mode():
            a, b = (model(torch.tensor([ids]))[0, start - 1 : -1] for model in models)
        top = a.topk(2).values
        decided = top[:, 0] - top[:, 1] > 4 * (a - b).abs().amax(-1)
        published = torch.tensor(ids[start:])
        assert len(published) == 32 and decided.float().mean() >= 0.5
        assert torch.equal(a.argmax(-1)[decided], published[decided])
