"""The built-in prompts, and prompts from a user's file.

The set holds plain completions, code, and one text of more than 256 tokens: dropped RoPE scaling hides in bf16 on
short ones.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from parity.contract import UsageError

LONG = (
    "A parity harness answers one question: does this program compute what that program computes? It sounds "
    "simple and is not. Two programs that are both right differ in their last digits, because sums of rounded "
    "numbers depend on the order of the terms, and a machine with wide registers orders them differently from one"
    " with narrow ones. Two programs of which one is wrong may agree in all the digits that anyone prints, "
    "because a small model on a short prompt forgives a wrong rotation, a wrong constant under a square root, or "
    "a mask that leaves one key too many in view. A fixed tolerance has to choose: wide enough to let honest "
    "differences pass, it lets mistakes pass as well; narrow enough to catch mistakes, it cries wolf at every "
    "change of library. The way out is to measure. Compute the same thing once more, slowly, with twice the "
    "digits, and call the result the truth. Look how far the reference strays from it: that is what rounding does"
    " to this model, on this prompt, in this number format. Then look how far the newcomer strays. Numbers such "
    "as 3.14159, 2,718 and 1e-5, a few words in other languages (Schmetterling, bibliothèque, mañana) and a line "
    "of code, `x = x + f(norm(x))`, are here so that the text is not of one kind."
)

BUILT_IN: tuple[str, ...] = (
    "Clearly, the meaning of life is",
    "Simply put, the theory of relativity states that",
    "def fibonacci(n):\n    if n < 2:",
    LONG,
)

# Texts that only the tokenizers see.
CORPUS: tuple[str, ...] = (
    "",
    " ",
    "Hello, world!",
    "  two spaces, a\ttab and\r\na line end \n\n\n",
    "1234567890 3.14 0x1F 12,345",
    "don't, I'll, WE'VE, it's",
    "naïve café, Straße, ñandú, Ελληνικά, русский, العربية, עברית",
    "日本語のテキスト、中文文本，한국어 문장",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "😀👩‍👩‍👧‍👦🇨🇭 ✓ ∑∫√",
    "def f(x):\n\treturn {k: v for k, v in x.items()}  # ok\n",
    "<|begin_of_text|> and <|eot_id|> are plain text here",
    "a" * 300 + " " * 300 + "!" * 60,
)

DIALOGS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello!"},),
    (
        {"role": "system", "content": "You are terse.\nAnswer in one line."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  Are you sure? <|eot_id|>"},
    ),
)


@dataclass(frozen=True)
class Prompts:
    """Either texts or token ids, and remarks about them that a user should read."""

    texts: list[str] | None
    tokens: list[list[int]] | None
    notices: list[str]


def built_in() -> Prompts:
    return Prompts(list(BUILT_IN), None, [])


def seeded(vocab_size: int, seed: int = 0) -> Prompts:
    """For a checkpoint that has no tokenizer: random ids, of odd lengths, one prompt of more than 256 tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (7, 13, 11, 271)]
    return Prompts(None, tokens, ["no tokenizer lies beside the checkpoint: seeded token prompts are used"])


def within(prompts: Prompts, room_tokens: int, encode: Callable[[str], list[int]] | None, own: Path | None) -> Prompts:
    """The prompts, none longer than `room_tokens`: ours are cut, those of the user's file `own` are refused.

    encode: ids of a text, with BOS. Raises UsageError.
    """
    many = [encode(text) for text in prompts.texts] if prompts.texts and encode else prompts.tokens or []
    long = [i for i, ids in enumerate(many) if len(ids) > room_tokens]
    if not long:
        return prompts
    if own is not None:
        n = long[0]
        raise UsageError(
            f"--prompts {own}, prompt {n + 1}: {len(many[n])} tokens, and with those that follow there is room for "
            f"{room_tokens}: shorten it, or lower --max_new_tokens"
        )
    if prompts.texts is None or encode is None:
        return replace(prompts, tokens=[ids[:room_tokens] for ids in many])
    return replace(prompts, texts=[cut(text, room_tokens, encode) for text in prompts.texts])


def cut(text: str, room_tokens: int, encode: Callable[[str], list[int]]) -> str:
    """The longest beginning of whole words whose ids fit; of one word, of characters."""
    ends = [m.end() for m in re.finditer(r"\S+", text)] if " " in text.strip() else list(range(1, len(text) + 1))
    fitting = [end for end in ends if len(encode(text[:end])) <= room_tokens]
    return text[: max(fitting, default=1)]


def from_file(path: Path) -> Prompts:
    r"""A text file, one prompt a line (\n, \t and \\ escapes), or a .jsonl, all lines token lists or all with a text
    under "prompt". Raises UsageError."""
    try:  # with universal line ends, and U+2028 is none
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"--prompts {path}: holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return _of_texts([(i, unescape(line)) for i, line in numbered])
    prompts = [(i, _json_prompt(path, i, line)) for i, line in numbered]
    texts = [(i, prompt) for i, prompt in prompts if isinstance(prompt, str)]
    tokens = [prompt for _, prompt in prompts if not isinstance(prompt, str)]
    if texts and tokens:
        raise UsageError(f"--prompts {path}: token lists and texts together; put them in two files")
    return _of_texts(texts) if texts else Prompts(None, tokens, [])


def _of_texts(numbered: list[tuple[int, str]]) -> Prompts:
    return Prompts([text for _, text in numbered], None, [lint for i, text in numbered for lint in warn(i, text)])


def _json_prompt(path: Path, number: int, line: str) -> str | list[int]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    found = found.get("prompt") if isinstance(found, dict) else found
    if isinstance(found, str) and found:
        return found
    if not isinstance(found, list) or not found or not all(type(i) is int and i >= 0 for i in found):
        raise UsageError(
            f"--prompts {path}, line {number}: expected a list of token ids such as [128000, 9906], or "
            '{"prompt": "..."}'
        )
    return found


def unescape(line: str) -> str:
    r"""\n, \t, \r and \\ become what they stand for; every other backslash stays."""
    out, i = [], 0
    escapes = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    while i < len(line):
        if line[i] == "\\" and i + 1 < len(line) and line[i + 1] in escapes:
            out.append(escapes[line[i + 1]])
            i += 2
        else:
            out.append(line[i])
            i += 1
    return "".join(out)


def warn(number: int, text: str) -> list[str]:
    """The known tokenization trap: a trailing space becomes a token that the model hardly ever saw there."""
    if text.endswith(" "):
        return [f"prompt {number} ends in a space: the next word usually carries its own space; drop the trailing one"]
    return []
