"""Commands: generate text from a checkpoint, chat with it, say what it is, write it in another format.

python -m nanollama generate --ckpt Meta-Llama-3.1-8B --prompt "Once upon a time" --max_new_tokens 64
python -m nanollama inspect Meta-Llama-3.1-8B
"""

import json as jsonlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanollama.cli import run
from nanollama.gate import read_prompts
from nanollama.machine import peak_memory_bytes
from nanollama.options import Drawing, ModelOptions, say
from nanollama.serve.command import serve

# Of --dtype: floats, and what the gguf package quantizes to.
DTypes = Literal["fp32", "bf16", "fp16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "tq2_0", "tq1_0"]

# `--help` and usage errors answer at once: torch and what needs it is imported inside the commands.
if TYPE_CHECKING:
    from nanollama.generation.llama import Event, Llama


def generate(
    ckpt: str,  # Meta folder, Hugging Face folder or hub id, .gguf or .bin
    *,
    prompt: list[str] | None = None,  # text to continue, several are decoded together; default: none, from BOS
    prompts: Path | None = None,  # a file of prompts, one a line (\n, \t, \\ escapes); .jsonl: {"prompt": ...} or ids
    drawing: Drawing = Drawing(),
    n: int = 1,  # answers per prompt
    stop: list[str] | None = None,  # text that ends an answer; may be given several times
    logprobs: bool = False,  # show each token's logprob (nats)
    json: bool = False,  # one JSON object on stdout at the end
    stream: bool = True,  # print a single answer as it comes
    model: ModelOptions = ModelOptions(),
) -> None:
    """Continue one or more prompts. Text goes to stdout, the speed to stderr."""
    texts = _read_prompts(prompt, prompts)

    from nanollama.generation.llama import Sampling

    sampling = Sampling(**vars(drawing), n=n, stop=stop or ())
    llama = model.load(ckpt)
    _remark_special(texts, llama)
    ids = [llama.encode(text) if isinstance(text, str) else text for text in texts]
    live = stream and not json and len(ids) * n == 1
    answers: dict[tuple[int, int], list[Event]] = {(i, a): [] for i in range(len(ids)) for a in range(n)}
    clock = [time.perf_counter()]
    for event in llama.generate(ids, sampling):
        if len(clock) == 1:
            clock.append(time.perf_counter())
        answers[event.prompt, event.answer].append(event)
        if live:
            print(_piece(event, llama), end="", flush=True)
    clock.append(time.perf_counter())
    speed = _speed(sum(map(len, ids)), [len(events) for events in answers.values()], *clock)
    if json:
        found = [_as_json(key, events, logprobs) for key, events in answers.items()]
        print(jsonlib.dumps({"answers": found, "speed": speed}, ensure_ascii=False))
        return
    for (i, a), events in answers.items():
        if len(answers) > 1:
            print(f"--- prompt {i}" + (f", answer {a}" if n > 1 else ""))
        print("" if live else "".join(_piece(event, llama) for event in events))
        if logprobs:
            print("\n".join(f"{event.logprob:9.4f}  {event.token:6}  {event.text!r}" for event in events))
    print(_speed_line(speed), file=sys.stderr)


def inspect(
    ckpt: str,  # Meta folder, Hugging Face folder or hub id, .gguf or .bin
    *,
    json: bool = False,  # one JSON object with every tensor, on stdout
) -> None:
    """Say what a checkpoint is: format, config, parameters, tokenizer, weights. Compares files with their checksums."""
    from nanollama.checkpoint import open_checkpoint, verify
    from nanollama.describe import as_text, describe

    opened = open_checkpoint(ckpt)
    facts = describe(opened, verified=verify(opened.path))
    print(jsonlib.dumps(facts, indent=2) if json else as_text(facts))


def chat(
    ckpt: str,  # an instruction-tuned checkpoint: Meta folder, Hugging Face folder or hub id, .gguf or .bin
    *,
    system: str = "",  # the system message
    drawing: Drawing = Drawing(max_new_tokens=1024, temperature=0.6, top_p=0.9),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Talk with a model in the terminal. /help there lists the commands."""
    from nanollama.generation.llama import Sampling
    from nanollama.generation.repl import Chat, run_repl

    run_repl(Chat(model.load(ckpt), Sampling(**vars(drawing)), system))


def convert(
    src: str,  # checkpoint of any format
    dst: Path,  # folder to make, or .bin or .gguf file
    *,
    format: Literal["meta", "hf", "llama2c", "gguf"],  # of dst
    dtype: DTypes | None = None,  # of the weights; default: as stored; the quantized ones in gguf only
    shards: int = 1,  # model-parallel files of a Meta folder, 1 to 16
    version: int = 0,  # of llama2c: 0 and 1 are fp32, 2 is int8
    tokenizer: Path | None = None,  # a tokenizer file, where there is none beside src
    adapter: Path | None = None,  # folder of a LoRA adapter (PEFT's format) to merge into the weights
) -> None:
    """Write a checkpoint in another format. Weights stream from file to file."""
    from nanollama.checkpoint import Checkpoint
    from nanollama.checkpoint import convert as write
    from nanollama.describe import describe, summary

    def merge(base: Checkpoint) -> Checkpoint:
        from nanollama.checkpoint.adapter import merged, read_adapter

        return replace(base, weights=merged(base.weights, read_adapter(str(adapter), base.config)))

    change = merge if adapter else None
    made = write(src, dst, format, dtype=dtype, shards=shards, version=version, tokenizer=tokenizer, change=change)
    print(summary(describe(made)))
    for notice in made.notices:
        say(f"note: {notice}")


def _read_prompts(texts: list[str] | None, file: Path | None) -> list[str | list[int]]:
    """The prompts of both flags; with neither, one that is empty: BOS alone. Raises ValueError."""
    found: list[str | list[int]] = list(texts or [])
    if file:
        found += [prompt for _, prompt in read_prompts(file)]
    return found or [""]


def _remark_special(texts: list[str | list[int]], llama: "Llama") -> None:
    """A chat that was typed as text reads like one and is none: its special tokens are spelled out."""
    names = [*(llama.tokenizer.special_ids if llama.tokenizer else ()), "<s>", "[INST]"]
    found = [name for name in names if any(name in text for text in texts if isinstance(text, str))]
    if found:
        say(f"{found[0]} in a prompt is text here, no special token: python -m nanollama chat sends a chat")


def _piece(event: "Event", llama: "Llama") -> str:
    return event.text if llama.tokenizer else f"{event.token} "


def _as_json(key: tuple[int, int], events: "list[Event]", logprobs: bool) -> dict[str, Any]:
    found = {
        "prompt": key[0],
        "answer": key[1],
        "text": "".join(event.text for event in events),
        "tokens": [event.token for event in events],
        "finish": events[-1].finish,
    }
    return {**found, "logprobs": [event.logprob for event in events]} if logprobs else found


def _speed(prompt_tokens: int, lengths: list[int], start: float, first: float, end: float) -> dict[str, float | None]:
    """Tokens and tokens per second. The first token of each answer belongs to the prefill."""
    decoded = sum(lengths) - len(lengths)
    return {
        "prefill_tokens": prompt_tokens,
        "prefill_tokens_per_s": prompt_tokens / (first - start),
        "decode_tokens": decoded,
        "decode_tokens_per_s": decoded / (end - first) if decoded else None,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _speed_line(speed: dict[str, float | None]) -> str:
    parts = [f"prefill {speed['prefill_tokens']:,} tokens at {speed['prefill_tokens_per_s']:,.1f} tok/s"]
    if speed["decode_tokens_per_s"]:
        parts.append(f"decode {speed['decode_tokens']:,} tokens at {speed['decode_tokens_per_s']:,.1f} tok/s")
    if speed["peak_memory_bytes"]:
        parts.append(f"peak memory {speed['peak_memory_bytes'] / 2**30:.2f} GiB")
    return "; ".join(parts)


COMMANDS: dict[str, Callable[..., object]] = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "convert": convert,
}


def main() -> None:
    run(COMMANDS, prog="python -m nanollama")


if __name__ == "__main__":
    main()
