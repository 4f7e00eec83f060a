"""The terminal chat: by its parts, and as a person meets it, through a pseudo-terminal.

The model is a real Transformer whose weights make it say one text: attention and feed-forward add nothing, and the head
of each token is the embedding of the token before it.
"""

import io
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nanollama.chat import encode_chat
from nanollama.checkpoint import write_meta
from nanollama.generation.llama import Llama, Sampling
from nanollama.generation.repl import Chat, obey, read_message, run_repl
from nanollama.model import ModelConfig, Transformer
from nanollama.tokenizer import Tokenizer, open_tokenizer
from terminals import Terminal

ANSWER = " ภาษาไทย 🦙🙂 done"
END = "<|eot_id|>"


def parrot(tokenizer: Tokenizer, text: str, end: str | None, context: int = 4096) -> Transformer:
    """A model that answers every chat with `text`, then `end`, or with `text` for ever."""
    before = tokenizer.encode("\n\n", bos=False)[-1:]  # what the answer follows
    ids = tokenizer.encode(text, bos=False)
    chain = before + ids + ([tokenizer.special_ids[end]] if end else ids[:1])
    assert len(set(chain[:-1])) == len(chain) - 1, "a token that comes twice would have two followers"
    config = ModelConfig(
        dim=64, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=tokenizer.vocab_size, hidden_dim=8, max_seq_len=context
    )
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        generator = torch.Generator().manual_seed(0)
        assert model.output is not None
        for token, follower in pairwise(chain):
            model.tok_embeddings.weight[token] = torch.randn(64, generator=generator)
            model.output.weight[follower] += model.tok_embeddings.weight[token]
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(llama3_tokenizer_path)


@pytest.fixture
def chat(tokenizer: Tokenizer) -> Chat:
    return Chat(Llama(parrot(tokenizer, ANSWER, END), tokenizer), Sampling(max_new_tokens=50))


def test_an_answer_is_remembered(chat: Chat) -> None:
    assert "".join(chat.answer("Hi")) == ANSWER
    assert "".join(chat.answer("Again")) == ANSWER
    assert chat.notices == []
    said = [(turn["role"], turn["content"]) for turn in chat.turns]
    assert said == [("user", "Hi"), ("assistant", ANSWER), ("user", "Again"), ("assistant", ANSWER)]


def test_a_stopped_answer_is_remembered_as_far_as_it_was_shown(chat: Chat) -> None:
    pieces = chat.answer("Hi")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert [turn["content"] for turn in chat.turns] == ["Hi", shown]


def test_the_limit_of_an_answer_is_said(tokenizer: Tokenizer) -> None:
    chat = Chat(Llama(parrot(tokenizer, " tick tock", None), tokenizer), Sampling(max_new_tokens=6))
    assert "".join(chat.answer("Hi")) == " tick tock tick tock"
    assert chat.notices == ["cut after 6 tokens, which is --max_new_tokens"]


def test_the_oldest_turns_make_room_and_it_is_said(tokenizer: Tokenizer) -> None:
    llama = Llama(parrot(tokenizer, " yes", END, context=60), tokenizer)
    chat = Chat(llama, Sampling(max_new_tokens=15), system="Be brief.")
    notices: list[str] = []
    for i in range(4):
        assert "".join(chat.answer(f"question {i}")) == " yes"
        notices += chat.notices
    assert notices == ["the context of 60 tokens is full: forgot the 1 oldest turn(s)"] * len(notices)
    assert 1 <= len(notices) <= 3
    assert chat.turns[-2]["content"] == "question 3"
    assert len(chat.turns) < 8
    messages = [{"role": "system", "content": "Be brief."}, *chat.turns]
    assert len(encode_chat(messages, tokenizer, add_generation_prompt=False).ids) <= 60


def test_a_message_that_cannot_fit_is_refused_and_forgotten(tokenizer: Tokenizer) -> None:
    chat = Chat(Llama(parrot(tokenizer, " yes", END, context=60), tokenizer), Sampling())
    assert "".join(chat.answer("short")) == " yes"
    with pytest.raises(ValueError, match="makes 71 tokens; with 15 for an answer they do not fit the context of 60"):
        list(chat.answer("a " * 60))
    assert [turn["content"] for turn in chat.turns] == ["short", " yes"]


def test_commands_do_what_they_say(chat: Chat) -> None:
    assert obey(chat, "/history") == "(nothing was said yet)"
    list(chat.answer("Hi"))
    assert obey(chat, "/history") == f"user: Hi\nassistant: {ANSWER}"
    obey(chat, "/system Be kind.")
    assert (chat.system, chat.turns) == ("Be kind.", [])
    list(chat.answer("Hi"))
    obey(chat, "/reset")
    assert (chat.system, chat.turns) == ("Be kind.", [])
    assert "/exit" in obey(chat, "/help")
    assert obey(chat, "/nonsense") == "(there is no command /nonsense; /help lists them)"


def test_a_pipe_is_one_message_and_its_answer_alone_is_stdout(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(Llama(parrot(tokenizer, " tick tock", None), tokenizer), Sampling(max_new_tokens=6))
    monkeypatch.setattr("sys.stdin", io.StringIO("Dear model,\n\n/help me\nwith this.\n"))
    run_repl(chat)
    said = capsys.readouterr()
    assert said.out == " tick tock tick tock\n" and said.err == "cut after 6 tokens, which is --max_new_tokens\n"
    assert chat.turns[0]["content"] == "Dear model,\n\n/help me\nwith this."
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    with pytest.raises(ValueError, match="no message in the input"):
        run_repl(chat)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["  Hi  "], "Hi"),
        ([""], ""),
        (['"""', "one", "", '  two"""'], "one\n\n  two"),
        (['"""one"""'], "one"),
        (['"""one', "two", '"""'], "one\ntwo"),
    ],
)
def test_a_message_of_several_lines_stands_between_fences(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], message: str
) -> None:
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert read_message() == message
    assert list(lines) == []


@pytest.fixture
def terminal(tmp_path: Path, llama3_tokenizer_path: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals of this kind")
    model = parrot(open_tokenizer(llama3_tokenizer_path), *request.param)
    write_meta(tmp_path / "m", model.config, model.state_dict(), tokenizer=llama3_tokenizer_path, dtype=torch.bfloat16)
    found = Terminal("chat", str(tmp_path / "m"), "--max_new_tokens", "100000")
    yield found
    found.close()


@pytest.mark.parametrize("terminal", [(ANSWER, END)], indirect=True)
def test_a_chat_in_a_terminal_streams_whole_characters_and_leaves(terminal: Terminal, tokenizer: Tokenizer) -> None:
    split = [tokenizer.decode([token]) for token in tokenizer.encode(ANSWER, bos=False)]
    assert any("\ufffd" in piece for piece in split), "no token ends within a character: the test would show nothing"
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    assert "\ufffd" not in terminal.wait_for(ANSWER)
    terminal.wait_for("> ")
    terminal.type("/nonsense\n")
    terminal.wait_for("there is no command /nonsense")
    terminal.wait_for("> ")
    terminal.type("/usr/bin is no command\n")
    terminal.wait_for(ANSWER)
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(timeout=60) == 0


@pytest.mark.parametrize("terminal", [(" tick tock", None)], indirect=True)
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for("tick tock tick")
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    # Between its prompt and its first look at the keys readline misses a Ctrl-C; a person would press it again.
    assert any(shows_after(terminal, "\x03", "(/exit or Ctrl-D leaves)") for _ in range(60))
    terminal.wait_for("> ")
    terminal.type("/history\n")
    terminal.wait_for("assistant:  tick tock tick")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0


def shows_after(terminal: Terminal, typed: str, text: str) -> bool:
    terminal.type(typed)
    return terminal.shows(text, seconds=2)
