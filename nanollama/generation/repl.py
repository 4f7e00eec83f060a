"""The chat in the terminal: answers stream, Ctrl-C stops an answer and not the program, commands start with a slash.

$ python -m nanollama chat Meta-Llama-3.1-8B-Instruct
/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.
> Hello!
Hello! How can I help you today?

What comes through a pipe is one message, whole, and its answer alone goes to stdout: `chat MODEL < letter > reply`.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from nanollama.chat import encode_chat, template_source
from nanollama.generation.llama import Llama, Sampling
from nanollama.options import say

COMMANDS = {
    "/help": "list the commands",
    "/history": "show what was said",
    "/system": "/system TEXT sets the system message and starts over; without TEXT there is none",
    "/reset": "forget what was said",
    "/exit": "leave (also Ctrl-D)",
    '"""': "begins and ends a message of several lines",
}
FENCE = '"""'


@dataclass
class Chat:
    """What was said, and the model that answers."""

    llama: Llama
    sampling: Sampling
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)  # user and assistant in turn
    notices: list[str] = field(default_factory=list)  # what the user should know about the last answer

    def answer(self, text: str) -> Iterator[str]:
        """The answer's pieces. However it ends, what was shown is what is remembered; nothing shown, nothing said.

        Raises ValueError for a message that cannot be answered; the history is then as before.
        """
        self.notices = []
        ids, turns = self._fit([*self.turns, {"role": "user", "content": text}])
        shown, tokens = "", 0
        # Other random numbers for each turn, or the same question would get the same answer.
        sampling = replace(self.sampling, seed=self.sampling.seed + len(turns))
        try:
            for event in self.llama.generate([ids], sampling):
                tokens += 1
                shown += event.text
                yield event.text
                if event.finish == "length":
                    self.notices.append(f"cut after {tokens:,} tokens, {self._why_cut(tokens)}")
        finally:
            if shown:
                self.turns = [*turns, {"role": "assistant", "content": shown}]

    def _fit(self, turns: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """The ids of the chat without its oldest turns, as many as it takes to leave room for an answer."""
        context, dropped = self.llama.config.max_seq_len, 0
        room = min(self.sampling.max_new_tokens, context // 4)
        while len(ids := self._encode(turns)) + room > context + 1:
            if len(turns) == 1:
                raise ValueError(
                    f"the message makes {len(ids):,} tokens; with {room:,} for an answer they do not fit the context "
                    f"of {context:,}: shorten it"
                )
            turns, dropped = turns[2:], dropped + 1
        if dropped:
            self.notices.append(f"the context of {context:,} tokens is full: forgot the {dropped} oldest turn(s)")
        return ids, turns

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        assert self.llama.tokenizer is not None
        system = [{"role": "system", "content": self.system}] if self.system else []
        return encode_chat([*system, *turns], self.llama.tokenizer, add_generation_prompt=True).ids

    def _why_cut(self, tokens: int) -> str:
        return "which is --max_new_tokens" if tokens == self.sampling.max_new_tokens else "where the context is full"


def run_repl(chat: Chat) -> None:
    """Read, answer and print until /exit or the end of the input."""
    if chat.llama.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer beside it: name one with --tokenizer")
    if not sys.stdin.isatty():
        answer_input(chat)
        return
    with suppress(ImportError):  # editing and recall of lines, where the platform has it
        import readline  # noqa: F401
    print(f"/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. ({template_source(chat.llama.tokenizer)})")
    while True:
        try:
            line = read_message()
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        if re.fullmatch(r"/\w+(\s.*)?", line, re.DOTALL):  # and not /usr/bin/python
            print(obey(chat, line))
        elif line:
            show_answer(chat, line)


def read_message() -> str:
    """A line, or several between two fences. Raises EOFError where the input ends."""
    line = input("> ").strip()
    if not line.startswith(FENCE):
        return line
    lines = [line.removeprefix(FENCE)]
    while FENCE not in lines[-1]:
        lines.append(input("... "))
    return "\n".join(lines).replace(FENCE, "", 1).strip()


def answer_input(chat: Chat) -> None:
    """All that a pipe or a file holds as one message; what is to be known of the answer goes to stderr.

    Raises ValueError for a message that cannot be answered.
    """
    text = sys.stdin.read().strip()
    if not text:
        raise ValueError("there is no message in the input: write one into the pipe, or chat in a terminal")
    for piece in chat.answer(text):
        print(piece, end="", flush=True)
    print()
    for notice in chat.notices:
        say(notice)


def show_answer(chat: Chat, text: str) -> None:
    try:
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(stopped)")
    except ValueError as error:
        print(f"({error})")
    for notice in chat.notices:
        print(f"({notice})")


def obey(chat: Chat, line: str) -> str:
    """Do what a /command says; returns what to print."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        chat.turns = []
        return "(forgotten)"
    if command == "/system":
        chat.system, chat.turns = rest.strip(), []
        return "(the chat starts over)"
    if command == "/history":
        turns = [{"role": "system", "content": chat.system}] * bool(chat.system) + chat.turns
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) or "(nothing was said yet)"
    if command == "/help":
        return "\n".join(f"{name:10} {what}" for name, what in COMMANDS.items())
    return f"(there is no command {command}; /help lists them)"
