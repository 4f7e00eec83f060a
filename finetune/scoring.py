"""How well checkpoints predict a text, side by side, and what they reach in tasks of lm-eval.

    $ python -m finetune.evaluate --ckpt Llama-3.2-1B --ckpt out/RUN/final --data held-out.txt
    checkpoint         parameters   tokens    bytes  bits per byte  perplexity  nats per token
    Llama-3.2-1B    1,235,814,400   21,402   91,755         0.8311       11.87          2.4738
    out/RUN/final   1,235,814,400   21,402   91,755         0.7105        8.28          2.1139

Perplexity by the usual sliding window: each window of `--window` tokens is read whole, and of each but the first only
the last `--stride` are counted, which have at least window - stride tokens before them. Bits per byte are the same
nats over the bytes of the text, so that tokenizers can be compared; neither BOS nor EOS is counted.
"""

import json as jsonlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.data.documents import IGNORE
from finetune.data.files import write_atomically
from finetune.errors import UserError
from finetune.loss import token_log_probs
from finetune.prepare import corpus
from finetune.prepare.corpus import Format
from nanollama.generation.llama import Llama
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer

WINDOW = 2048  # tokens, at most, where none is given


@dataclass(frozen=True)
class TextScore:
    """Of one checkpoint on one text."""

    checkpoint: str
    parameters: int
    tokens: int  # that were predicted
    bytes: int  # of the text that they stand for
    nats: float  # of all of them

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def evaluate_checkpoints(
    *,
    ckpt: list[str],  # a checkpoint of any format; give the flag once for each
    data: Path | None = None,  # a text to predict: .txt, .jsonl, .json, .parquet, or a folder of them
    tasks: str | None = None,  # comma list of lm-eval's tasks, or .yaml files of your own
    limit: int = 0,  # of each task the first examples; 0: all
    num_fewshot: int = -1,  # examples before each question of a task; -1: as the task says
    field: str = "text",  # of rows, that holds the text
    separator: str = "<|endoftext|>",  # between the documents of a .txt file
    window: int = 0,  # tokens read at a time; 0: the checkpoint's context, at most 2048
    stride: int = 0,  # tokens from one window to the next; 0: half of one
    batch_size: int = 4,  # windows, or a task's questions, at a time
    tokenizer: Path | None = None,  # a tokenizer file, where there is none beside a checkpoint
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,  # of weights and computation; default: as stored
    device: Literal["cpu", "cuda", "mps"] = "cpu",  # where the models run
    json: Path | None = None,  # also write the figures there
) -> int:
    """Bits per byte and perplexity of a text, and scores in tasks, of several checkpoints side by side."""
    if data is None and tasks is None:
        raise UserError("--data is missing: name a text to predict, or --tasks of lm-eval")
    if window < 0 or window == 1 or stride < 0 or limit < 0 or batch_size < 1 or num_fewshot < -1:
        raise UserError("--window, --stride, --limit, --batch_size: expected 0 or more, and 2 tokens a window at least")
    texts = list(read_texts(data, Format.typed(separator, field))) if data else []
    scores, reached = [], dict[str, dict[str, float]]()
    for name in ckpt:
        llama = Llama.load(name, tokenizer=tokenizer, dtype=dtype, device=device, compile="off")
        if data:
            scores.append(score_text(name, llama, texts, window, stride, batch_size))
        if tasks:
            from finetune.harness import run_tasks

            reached[name] = run_tasks(llama, tasks.split(","), batch_size, limit, num_fewshot)
    for line in [*(_text_table(scores) if scores else []), *(_task_table(reached) if reached else [])]:
        print(line)
    if json:
        found = {"texts": [{**asdict(s), **_derived(s)} for s in scores], "tasks": reached}
        write_atomically(json, (jsonlib.dumps(found, indent=1) + "\n").encode())
    return 0


def read_texts(path: Path, form: Format) -> Iterator[str]:
    """The documents, whole. Raises UserError for a path that holds none."""
    files, _ = corpus.named_files(path, print)
    numbered = (part for chunk in corpus.all_chunks(files, form) for part in corpus.documents(chunk, form))
    for _, parts in groupby(numbered, key=lambda part: part[0]):
        yield "".join(text for _, text in parts)


# --- Text ------------------------------------------------------------------------------------------------------------


def score_text(name: str, llama: Llama, texts: Sequence[str], window: int, stride: int, batch_size: int) -> TextScore:
    """Raises UserError for a window that does not fit the checkpoint, and for a text without a token to predict."""
    if llama.tokenizer is None:
        raise UserError(f"--ckpt {name}: has no tokenizer beside it: name one with --tokenizer")
    longest = llama.config.max_seq_len
    if window > longest:
        raise UserError(f"--window {window}: {name} was made for at most {longest} tokens")
    window = window or min(longest, WINDOW)
    stride = stride or max(1, window // 2)
    if stride >= window:
        raise UserError(f"--stride {stride}: expected less than the window's {window} tokens")
    encoded = [encode_text(text, llama.tokenizer) for text in texts]
    rows = [(ids[a:b], b - first) for ids, _ in encoded for a, b, first in spans(len(ids), window, stride)]
    nats = sum(_nats(llama.model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
    tokens = sum(counted for _, counted in rows)
    if not tokens:
        raise UserError("--data holds no token to predict")
    parameters = sum(p.numel() for p in llama.model.parameters())
    return TextScore(name, parameters, tokens, sum(size for _, size in encoded), nats)


def encode_text(text: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """(ids, bytes of what is predicted): all of the text, but for its first token where no BOS stands before it."""
    ids, size = tokenizer.encode(text, bos=True), len(text.encode())
    if ids[:1] != [tokenizer.bos_id] and ids:
        size -= len(tokenizer.token_bytes(ids[0]))
    return ids, size


def spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first token that is counted) of the windows over `length` tokens; token 0 is never counted."""
    counted = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end > counted:
            yield begin, end, counted
            counted = end
        if end == length:
            return


@torch.no_grad()
def _nats(model: Transformer, rows: Sequence[tuple[list[int], int]]) -> float:
    """-log p of the last tokens of each row, as many as it says, summed in float64."""
    device, width = model.tok_embeddings.weight.device, max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE)
    for row, (ids, counted) in enumerate(rows):  # causal attention never sees the padding behind them
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, len(ids) - 1 - counted : len(ids) - 1] = torch.tensor(ids[len(ids) - counted :])
    hidden = model.hidden(tokens.to(device)).flatten(0, 1)
    found: Tensor = token_log_probs(hidden, model.head(), labels.flatten().to(device))
    return -float(found.cpu().double().sum())


# --- Tables ----------------------------------------------------------------------------------------------------------


def _derived(score: TextScore) -> dict[str, float]:
    return {name: getattr(score, name) for name in ("bits_per_byte", "perplexity", "nats_per_token")}


def _text_table(scores: Sequence[TextScore]) -> list[str]:
    rows = [["checkpoint", "parameters", "tokens", "bytes", "bits per byte", "perplexity", "nats per token"]]
    for s in scores:
        whole = [f"{n:,}" for n in (s.parameters, s.tokens, s.bytes)]
        rows.append([s.checkpoint, *whole, f"{s.bits_per_byte:.4f}", f"{s.perplexity:.2f}", f"{s.nats_per_token:.4f}"])
    return _aligned(rows)


def _task_table(reached: dict[str, dict[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for found in reached.values() for name in found))
    rows: list[list[Any]] = [["task", *reached]]
    rows += [[name, *(f"{found[name]:.4f}" if name in found else "-" for found in reached.values())] for name in names]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
