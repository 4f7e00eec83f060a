"""The measurements of `benchmarks.gpu`, one section in one process; results go to a file, a line of JSON each.

    python -m benchmarks.gpu_sections decode /tmp/decode.jsonl --limit_s 120
    {"name": "1B bf16 compiled", "steps_per_s": 410.3, "share_of_limit": 0.41, ...}

Decode: steps a second times the bytes that a step must read (weights, and keys and values of the tokens so far) over
the bytes a second that the memory reads. Training: tokens a second times the FLOPs of a token over those of a large
bf16 product. Parity: distance of logits from an fp32 run, ours beside transformers', relative root mean squares.
"""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.gpu_attention import attention_items
from benchmarks.gpu_models import DTYPES, LLAMA_1B, LLAMA_8B, REHEARSED, Bench, Item, random_ids, seeded_weights
from benchmarks.gpu_parity import parity_items
from finetune.config import LORA_METHODS, TrainConfig, lora_targets
from finetune.data.documents import Ints
from finetune.lora import add_lora_
from finetune.memory import plan_memory
from finetune.parallelize import World
from finetune.resume import RunFolder
from finetune.train import Loop, Setup
from nanollama.cli import run
from nanollama.generation.decode import Row, prefill
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import ModelConfig, Transformer
from nanollama.speed.quantize import load_quantized, weight_bytes

PROMPT_TOKENS, NEW_TOKENS, UNTIMED_TOKENS, STEPS_ALONE = 128, 128, 8, 64
WARM_STEPS, TIMED_STEPS = 2, 5  # of training


def main(
    section: Literal["decode", "training", "parity", "attention"],
    results: Path,  # a line of JSON each
    *,
    limit_s: float = 120.0,  # nothing is begun after this time
    rehearse: bool = False,  # tiny models on the CPU
) -> None:
    """One section of benchmarks.gpu."""
    started = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = REHEARSED if rehearse else {"1B": LLAMA_1B, "8B": LLAMA_8B}
    bench = Bench(torch.device("cpu" if rehearse else "cuda"), shapes)
    with results.open("w") as file:
        for name, measure in SECTIONS[section](bench):
            left = limit_s - (time.monotonic() - started)
            found = {"name": name} | (measured(measure, bench) if left > 0 else {"skipped": "no time was left"})
            file.write(json.dumps(found) + "\n")
            file.flush()


def measured(measure: Callable[[], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """What it found, or its traceback; what it held is let go."""
    started = time.monotonic()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        found = measure()
        if bench.on_gpu:
            found.setdefault("peak_bytes", torch.cuda.max_memory_allocated())
    except Exception:
        found = {"error": traceback.format_exc()}
    torch._dynamo.reset()  # another model's sizes would make this one's dynamic
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return found | {"seconds": round(time.monotonic() - started, 2)}


# --- Decoding --------------------------------------------------------------------------------------------------------


class Decoding(NamedTuple):
    """One way to decode. mode as of `Llama`: eager, a CUDA graph of the model's own kernels, a compiled graph."""

    shape: str
    kind: str  # bf16, int8, int4
    mode: Literal["off", "auto", "on"]
    rows: int = 1

    @property
    def name(self) -> str:
        mode = {"off": "eager", "auto": "graph", "on": "compiled"}[self.mode]
        return f"{self.shape} {self.kind} {mode}{f' {self.rows} rows' if self.rows > 1 else ''}"


DECODINGS = [
    Decoding(shape, kind, mode, rows)  # type: ignore[arg-type]
    for kind, mode, rows in (
        ("bf16", "auto", 1),
        ("bf16", "on", 1),
        ("bf16", "off", 1),
        ("bf16", "auto", 8),
        ("int8", "on", 1),
        ("int4", "on", 1),
    )
    for shape in ("1B", "8B")
]


def decode_items(bench: Bench) -> Iterator[Item]:
    yield from beside_limit("memory", "read_bytes_per_s", partial(read_rate, bench), DECODINGS, partial(decode, bench))


def beside_limit(
    name: str, key: str, measure: Callable[[], float], ways: Sequence[Any], run: Callable[[Any, float], dict[str, Any]]
) -> Iterator[Item]:
    """The limit, measured first under `name` as `key`, then each way beside it: `run(way, limit)`."""
    limit: dict[str, float] = {}

    def measured() -> dict[str, Any]:
        limit[key] = measure()
        return dict(limit)

    yield name, measured
    for way in ways:
        yield way.name, lambda way=way: run(way, limit[key])  # type: ignore[misc]


def read_rate(bench: Bench) -> float:
    """Bytes a second that a sum over 4 GiB reads: the best of ten."""
    data, best = torch.ones(2**30 if bench.on_gpu else 2**24, device=bench.device), 0.0
    for _ in range(10):
        start = bench.now()
        data.sum()
        best = max(best, data.nbytes / (bench.now() - start))
    return best


def decode(bench: Bench, way: Decoding, read_bytes_per_s: float) -> dict[str, Any]:
    """Steps a second of `Llama.generate` behind its first tokens, and of the step alone."""
    config = bench.shapes[way.shape]
    weights = seeded_weights(config, bench.device, torch.bfloat16)
    if way.kind == "bf16":
        model = Transformer.from_weights(config, weights, device=bench.device).eval()
    else:
        model = load_quantized(config, weights, way.kind).eval()
    del weights
    llama, prompts = Llama(model, compile=way.mode if bench.on_gpu else "off"), random_ids(config, way.rows, 128)
    started = bench.now()
    times = stamps(llama, prompts)
    first_s, times = bench.now() - started, stamps(llama, prompts)
    steps_per_s = (len(times) - 1 - UNTIMED_TOKENS) / (times[-1] - times[UNTIMED_TOKENS])
    length = PROMPT_TOKENS + (UNTIMED_TOKENS + NEW_TOKENS) // 2
    step_bytes = read_bytes(model, way.rows * length)
    alone = steps_alone(bench, llama, prompts)
    return {
        "steps_per_s": steps_per_s,
        "tokens_per_s": steps_per_s * way.rows,
        "step_bytes": step_bytes,
        "share_of_limit": steps_per_s * step_bytes / read_bytes_per_s,
        "steps_alone_per_s": alone,
        "step_share_of_limit": alone * step_bytes / read_bytes_per_s,
        "first_answer_s": first_s,
    }


def stamps(llama: Llama, prompts: list[list[int]]) -> list[float]:
    """When each token of the first prompt's answer was on the host."""
    events = llama.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS))
    return [time.perf_counter() for event in events if event.prompt == 0]


def read_bytes(model: Transformer, cached_tokens: int) -> int:
    """Of one step: every weight but the embedding, where it is no head, and the cached keys and values."""
    config, embedding = model.config, model.tok_embeddings.weight
    unread = 0 if model.output is None else embedding.nbytes
    a_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * embedding.element_size()
    return weight_bytes(model) - unread + cached_tokens * a_token


@torch.inference_mode()
def steps_alone(bench: Bench, llama: Llama, prompts: list[list[int]]) -> float:
    """Steps a second of what decodes, without sampling and without a word to the host."""
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    rows = [Row(i, 0, ids, sampling, None, llama.config.max_seq_len) for i, ids in enumerate(prompts)]
    step, (cache, logits) = llama.steps.choose(len(rows), NEW_TOKENS - 1), prefill(llama.model, rows)
    ids, positions = logits.argmax(-1), torch.full((len(rows),), PROMPT_TOKENS, device=bench.device)
    for _ in range(3):
        step(ids, positions, cache)
    start = bench.now()
    for _ in range(STEPS_ALONE):
        step(ids, positions, cache)
    return STEPS_ALONE / (bench.now() - start)


# --- Training --------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """One way to train; `rows` of 2,048 tokens a step."""

    shape: str
    method: str
    weights: str
    compile: bool
    rows: int

    @property
    def name(self) -> str:
        return f"{self.shape} {self.method} {self.weights} weights {'compiled' if self.compile else 'eager'}"


TRAININGS = [
    Training("1B", "full", "fp32", False, 4),
    Training("8B", "lora", "bf16", False, 1),
    Training("1B", "full", "fp32", True, 4),
    Training("8B", "lora", "bf16", True, 2),
    Training("1B", "lora", "bf16", True, 4),
    Training("1B", "full", "bf16", True, 4),
]


def training_items(bench: Bench) -> Iterator[Item]:
    rate = partial(matmul_rate, bench)
    yield from beside_limit("matrix products", "matmul_flops_per_s", rate, TRAININGS, partial(train, bench))


def matmul_rate(bench: Bench) -> float:
    """FLOPs a second of a bf16 product of two random matrices of 8192 x 8192: the median of five times ten."""
    n, rates = 8192 if bench.on_gpu else 256, []
    a, b = (torch.randn(n, n, device=bench.device).to(torch.bfloat16) for _ in range(2))
    for _ in range(5):
        start = bench.now()
        for _ in range(10):
            a @ b
        rates.append(10 * 2 * n**3 / (bench.now() - start))
    return statistics.median(rates)


class RandomDocuments:
    """Seeded tokens in documents of 100 to 4,000."""

    bos_id = 1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.lengths: Ints = np.random.default_rng(0).integers(100, 4000, 400)

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        ids = np.random.default_rng((1, document)).integers(3, self.vocab_size, int(self.lengths[document]))
        ids[0] = self.bos_id
        return ids[start:stop]


class NoTokenizer:
    """There is no text: what is held out counts as one character."""

    def __init__(self) -> None:
        self.special_ids: dict[str, int] = {}

    def decode(self, ids: list[int]) -> str:
        return "x"


def train(bench: Bench, way: Training, flops_per_s: float) -> dict[str, Any]:
    """Tokens a second of the training loop's own steps."""
    config = TrainConfig(
        method=way.method, dtype="bf16", weights=way.weights, compile=way.compile and bench.on_gpu,  # type: ignore[arg-type]
        batch_size=way.rows, seq_len=2048 if bench.on_gpu else 128, accumulate=1, max_steps=1000, warmup_steps=0,
        lr=1e-4, eval_tokens=1, device=bench.device.type,
    )  # fmt: skip
    shape = bench.shapes[way.shape]
    dtype = DTYPES[way.weights]
    model = Transformer.from_weights(shape, seeded_weights(shape, bench.device, dtype), device=bench.device)
    if way.method in LORA_METHODS:
        targets, generator = lora_targets(config), torch.Generator().manual_seed(0)
        add_lora_(model, config.lora_rank, config.lora_alpha, targets, 0.0, generator)
    data: Any = RandomDocuments(shape.vocab_size)
    with TemporaryDirectory() as out:
        tokenizer: Any = NoTokenizer()
        folder = RunFolder(Path(out), config)
        setup = Setup(folder, model, tokenizer, data, data, "", World(bench.device), lambda _: "")
        loop = Loop(setup)
        # A compiled block would be compiled for one row and for two, only to be counted.
        planned = {} if config.compile else {"planned_bytes": plan_memory(model, config, bench.device).total}
        started = bench.now()
        losses = [loop.step(0)[0].loss for _ in range(WARM_STEPS)]
        warm_s, before, started = bench.now() - started, loop.progress.tokens, bench.now()
        losses += [loop.step(0)[0].loss for _ in range(TIMED_STEPS)]
        tokens_per_s = (loop.progress.tokens - before) / (bench.now() - started)
    token_flops = flops_of(shape, way.method, config.seq_len)
    return {
        "tokens_per_s": tokens_per_s,
        "token_flops": token_flops,
        "share_of_limit": tokens_per_s * token_flops / flops_per_s,
        "first_steps_s": warm_s,
        "losses": losses,
        **planned,
    }


def flops_of(shape: ModelConfig, method: str, seq_len: int) -> float:
    """Of a token: 2 a weight that is multiplied and pass; full training has three passes, LoRA no gradients of weights.

    Attention: 4 a feature and key forward, twice that backward, counted over half of the row (it is causal), whatever
    the documents are.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(shape).parameters())
    multiplied = parameters if shape.tied else parameters - shape.vocab_size * shape.dim
    attention = 12 * shape.n_layers * shape.n_heads * shape.head_dim * seq_len / 2
    return (4 if method in LORA_METHODS else 6) * multiplied + attention


SECTIONS: dict[str, Callable[[Bench], Iterator[Item]]] = {
    "decode": decode_items,
    "training": training_items,
    "parity": parity_items,
    "attention": attention_items,
}


if __name__ == "__main__":
    run(main)
