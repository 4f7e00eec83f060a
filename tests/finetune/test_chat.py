"""finetune.chat: masks and refusals, and a tiny base that learns eight dialogues until the chat answers and stops."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.build import CHAT_TOKENS, chat_rows, fresh_weights, reset_rows_
from finetune.chat import ENTRY
from finetune.data.dialogs import read_dialogs
from finetune.data.packing import Packer
from finetune.loss import IGNORE
from finetune.run import run_entry
from nanollama.chat import encode_chat
from nanollama.checkpoint import open_checkpoint, write_meta
from nanollama.generation.llama import Llama, Sampling
from nanollama.generation.repl import Chat
from nanollama.model import ModelConfig, Transformer
from nanollama.tokenizer import Tokenizer, open_tokenizer
from terminals import Terminal

ANSWERS = ("red", "two llamas", "in Lima", "Monday", "a green hat", "seven", "nobody", "far away")


def dialog(i: int) -> dict[str, list[dict[str, str]]]:
    first = {"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": ANSWERS[i]}
    second = {"role": "user", "content": "why"}, {"role": "assistant", "content": f"because {i}"}
    return {"messages": [*first, *second]}


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, llama3_tokenizer_path: Path) -> Path:
    """Eight dialogues, and a base whose rows of the chat words are zero, as in Llama 3 8B."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "dialogs.jsonl").write_text("".join(json.dumps(dialog(i)) + "\n" for i in range(8)))
    tokenizer = open_tokenizer(llama3_tokenizer_path)
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, hidden_dim=64, max_seq_len=256
    )
    weights = fresh_weights(config, torch.Generator().manual_seed(0))
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name][[tokenizer.special_ids[word] for word in CHAT_TOKENS]] = 0
    write_meta(folder / "base", config, weights, tokenizer=llama3_tokenizer_path)
    # An adapter leaves the head as it is: a trained one is sharp enough to be sure of a word, a fresh one is not.
    weights["output.weight"] *= 8
    write_meta(folder / "sharp", config, weights, tokenizer=llama3_tokenizer_path)
    return folder


def run(home: Path, base: str, out: Path, *flags: str) -> None:
    """A run to its end, in this process."""
    argv = ["chat", "--data", str(home / "dialogs.jsonl"), "--ckpt", str(home / base), "--out", str(out), *flags]
    small = "--seq_len 64 --batch_size 4 --threads 1 --schedule constant --weight_decay 0 --eval_every 1000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, *small.split()])
        with pytest.raises(SystemExit) as caught:
            run_entry(ENTRY)
    assert caught.value.code == 0


def assert_answers(llama: Llama) -> None:
    """Both turns of every dialogue, each ended by the model itself."""
    for i in range(8):
        chat = Chat(llama, Sampling(max_new_tokens=20))
        assert "".join(chat.answer(f"question {i}")) == ANSWERS[i]
        assert "".join(chat.answer("why")) == f"because {i}"
        assert chat.notices == []


def assert_talks(ckpt: Path) -> None:
    """`nanollama chat` as a person at a terminal meets it: both turns, each followed by its prompt."""
    if sys.platform == "win32":
        return  # it has no pseudo-terminals of this kind
    terminal = Terminal("chat", str(ckpt), "--temperature", "0")
    try:
        terminal.wait_for("> ")
        for question, answer in (("question 3", ANSWERS[3]), ("why", "because 3")):
            terminal.type(f"{question}\n")
            terminal.wait_for(f"{question}\r\n")  # what was typed
            assert terminal.wait_for("> ").startswith(answer)
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()


def test_a_base_learns_to_answer_and_to_stop(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(home, "base", home / "full", "--lr", "0.01", "--max_steps", "60")
    assert "start from the mean of the trained ones" in capfd.readouterr().out
    assert_answers(Llama.load(home / "full" / "final"))
    assert_talks(home / "full" / "final")


def test_an_adapter_learns_it_with_the_rows_of_the_chat_words(home: Path) -> None:
    run(home, "sharp", home / "lora", "--method", "lora", "--lora_rank", "16", "--lr", "0.02", "--max_steps", "100")
    merged = Llama.load(home / "lora" / "final")
    assert_answers(merged)
    added = Llama.load(home / "sharp", adapter=home / "lora" / "adapter")
    for name, weight in merged.model.state_dict().items():
        assert torch.allclose(added.model.state_dict()[name], weight, atol=1e-6), name
    base = open_checkpoint(home / "sharp").weights["tok_embeddings.weight"]
    moved = (merged.model.tok_embeddings.weight != base).any(dim=1).nonzero().flatten().tolist()
    assert merged.tokenizer is not None
    assert moved == sorted(merged.tokenizer.special_ids[word] for word in CHAT_TOKENS)


def test_only_the_assistant_and_its_end_of_turn_are_labels(home: Path, tokenizer: Tokenizer) -> None:
    train, val = read_dialogs(home / "dialogs.jsonl", tokenizer, 64)
    assert len(train.lengths) == len(val.lengths) == 8
    packer = Packer(train, 64)
    batch = packer.batch(packer.in_order(8))
    expected = []
    for i in range(8):
        chat = encode_chat(dialog(i)["messages"], tokenizer, add_generation_prompt=False)
        expected += [token for token, said in zip(chat.ids, chat.loss_mask, strict=True) if said]
    labels = batch.labels[batch.labels != IGNORE]
    assert sorted(labels.tolist()) == sorted(expected)
    assert batch.valid == len(expected)
    assert int((labels == tokenizer.special_ids["<|eot_id|>"]).sum()) == 16
    assert np.array_equal(train.tokens(3, 0, 5), train.ids[train.starts[3] :][:5])


def test_each_twentieth_dialogue_is_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(dialog(i % 8)) + "\n\n" for i in range(41)))
    train, val = read_dialogs(tmp_path / "d.jsonl", tokenizer, 64)
    assert (len(train.lengths), len(val.lengths)) == (39, 2)
    expected = encode_chat(dialog(19 % 8)["messages"], tokenizer, add_generation_prompt=False).ids
    assert val.tokens(0, 0, int(val.lengths[0])).tolist() == expected


def test_llama_2_dialogues_are_one_document_each(tmp_path: Path, test_data) -> None:  # type: ignore[no-untyped-def]
    tokenizer = open_tokenizer(test_data("llama2_tokenizer.model"))
    (tmp_path / "d.jsonl").write_text(json.dumps(dialog(1)) + "\n")
    train, _ = read_dialogs(tmp_path / "d.jsonl", tokenizer, 100)
    assert len(train.lengths) == 1
    assert int((train.ids == tokenizer.bos_id).sum()) == 2  # one for each turn
    assert "two llamas" in tokenizer.decode(train.ids[train.said].tolist())
    assert "question" not in tokenizer.decode(train.ids[train.said].tolist())


GOOD = json.dumps(dialog(0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "none of the 1 messages is the assistant's"),
        ('{"messages": [{"role": "narrator", "content": "Hi"}]}', "message 0: role 'narrator'"),
        (GOOD.replace("question", "word " * 70), "tokens do not fit --seq_len 64"),
        ("{no", "not JSON"),
        ('{"text": "Hi"}', 'expected an object with a list of "messages"'),
        ('{"messages": []}', 'expected an object with a list of "messages"'),
        ("[1]", 'expected an object with a list of "messages"'),
    ],
)
def test_an_unusable_dialogue_is_refused_with_its_line(
    tmp_path: Path, tokenizer: Tokenizer, line: str, message: str
) -> None:
    (tmp_path / "d.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"d\.jsonl line 3: ") as caught:
        read_dialogs(tmp_path / "d.jsonl", tokenizer, 64)
    assert message in str(caught.value)


def test_a_file_without_dialogues_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no dialogue"):
        read_dialogs(tmp_path / "d.jsonl", tokenizer, 64)


def test_untrained_rows_are_found_and_become_the_mean(home: Path, tokenizer: Tokenizer) -> None:
    opened = open_checkpoint(home / "base")
    model = Transformer.from_weights(opened.config, {name: w.clone() for name, w in opened.weights.items()})
    words = tuple(sorted(tokenizer.special_ids[word] for word in CHAT_TOKENS))
    assert chat_rows(model, tokenizer, "auto") == words
    assert chat_rows(model, tokenizer, "keep") == ()
    reset_rows_(model, words, list(range(128_000)))
    assert torch.allclose(model.head()[words[0]], model.head()[:128_000].mean(dim=0))
    with torch.no_grad():
        for matrix in (model.tok_embeddings.weight, model.head()):
            matrix[list(words)] = torch.randn(len(words), 32, generator=torch.Generator().manual_seed(3))
    assert chat_rows(model, tokenizer, "auto") == ()
    assert chat_rows(model, tokenizer, "reinit") == words
