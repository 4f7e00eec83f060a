"""Decoding one row on CPU: ours, transformers, a gpt-fast-style loop and llama.cpp, as shares of the memory limit.

Every engine has a process of its own with the same threads and the same seeded weights; they take turns, round after
round, and the median of the rounds counts. A token needs every weight once, so the speed at which the machine reads
memory, measured in the same rounds, bounds all of them. Quote the ratios: absolute figures move with the machine.

    python -m benchmarks.decode --shape 110M --threads 2 --json decode-110M-2t.json
    # prints a table; in the file: {"shape": "110M", ..., "engines": {"nanollama fp32": {"tokens_per_s": ...}}}
"""

import json as jsonlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.machine import Company, disturbance, disturbed, environment, read_bandwidth, refuse_busy
from nanollama.cli import run
from nanollama.machine import peak_memory_bytes

SHAPES: dict[str, dict[str, Any]] = {  # llama2.c's two story models, with a tied head
    "tiny": dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=160),
    "15M": dict(dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768),
    "110M": dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, hidden_dim=2048),
}
VOCAB, CONTEXT, PROMPT_TOKENS = 32000, 1024, 8
OURS = [
    f"nanollama {kind}{eager}"
    for eager in ("", " eager")
    for kind in ("fp32", "bf16", "int8", "int4")
    if not eager or kind[0] != "i"
]
ENGINES = [
    *OURS,
    "gpt-fast-style fp32",
    "gpt-fast-style bf16",
    "transformers fp32",
    "transformers bf16",
    "llama.cpp F32",
    "llama.cpp Q8_0",
]
Generate = Callable[[list[int], int], list[float]]  # prompt ids, tokens -> the time at which each was decided


def main(
    *,
    shape: Literal["tiny", "15M", "110M"] = "110M",  # of the model
    threads: int = 2,  # of every engine
    tokens: int = 128,  # decoded in each round
    rounds: int = 5,  # the engines take turns
    engines: list[str] | None = None,  # several by repeating it; default: all that are installed
    anyway: bool = False,  # even where others are at work; the rounds that they disturb are named
    json: Path | None = None,  # where the result goes; its chart goes beside it, as .png
) -> None:
    """Decode speed of one row on CPU, ours and others, and its share of what the memory allows."""
    wanted = engines or [name for name in ENGINES if is_installed(name)]
    if unknown := [name for name in wanted if name not in ENGINES]:
        raise ValueError(
            f"engine {unknown[0]!r} is unknown: expected one of {', '.join(ENGINES)}; repeat --engines for several"
        )
    refuse_busy(anyway)
    with TemporaryDirectory() as folder:
        found = compare(wanted, shape, threads, tokens, rounds, Path(folder))
    if json:
        json.write_text(jsonlib.dumps(found, indent=2) + "\n")
        chart(found, json.with_suffix(".png"))
    print(as_text(found))


def compare(names: list[str], shape: str, threads: int, tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Set every engine up in its own process, let them take turns, and put the figures together."""
    pools = {name: _pool(threads) for name in ["memory", *names]}
    try:
        pools["memory"].submit(write_checkpoints, shape, str(folder), names).result()
        names, died, weights = [*names], [], {}
        for name in [*names]:
            try:
                weights[name] = pools[name].submit(set_up, name, shape, str(folder)).result()
            except BrokenProcessPool:  # a library that was compiled for another processor, say
                print(f"{name}: its process died as it began; the others go on without it", file=sys.stderr, flush=True)
                names.remove(name)
                died.append(name)
        bandwidth: list[float] = []
        others: list[float | None] = []
        speeds: dict[str, list[float]] = {name: [] for name in names}
        working = [pools[name].submit(os.getpid).result() for name in ["memory", *names]]
        for i in range(rounds):
            with Company(working) as company:
                bandwidth.append(pools["memory"].submit(read_bandwidth).result())
                for name in names:
                    speeds[name].append(pools[name].submit(decode_speed, name, shape, str(folder), tokens).result())
            others.append(company.cores)
            latest = ", ".join(f"{name} {found[-1]:.1f}" for name, found in speeds.items())
            line = f"round {i + 1} of {rounds}: memory {bandwidth[-1] / 1e9:.1f} GB/s; tok/s: {latest}"
            print(line, file=sys.stderr, flush=True)
        peaks = {name: pools[name].submit(peak_memory_bytes).result() for name in names}
    finally:
        for pool in pools.values():
            pool.shutdown()
    found = {name: figures(speeds[name], weights[name], bandwidth) | {"peak_bytes": peaks[name]} for name in names}
    return {
        "schema": "nanollama.decode/1",
        "shape": shape,
        "threads": threads,
        "tokens": tokens,
        "rounds": rounds,
        "read_bytes_per_s": statistics.median(bandwidth),
        "read_bytes_per_s_rounds": bandwidth,
        "cores_of_others_rounds": others,
        "disturbed_rounds": disturbed(others),
        "died": died,
        "engines": found,
        "ratios": ratios(speeds),
        "environment": environment(),
    }


def _pool(threads: int) -> ProcessPoolExecutor:
    """One process, its own torch, so many threads."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=start_process, initargs=(threads,))


def start_process(threads: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(threads)


def figures(speeds: list[float], weight_bytes: int, limit: list[float]) -> dict[str, Any]:
    """limit: bytes a second that memory read in each round. Shares are medians of the rounds' own."""
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_rounds": speeds,
        "weight_bytes": weight_bytes,
        "share_of_limit": statistics.median(s * weight_bytes / b for s, b in zip(speeds, limit, strict=True)),
    }


def ratios(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the rounds' own ratios: a machine that changes its pace between rounds leaves them as they are."""
    pairs = [
        (f"nanollama {kind}", f"{other} {kind}")
        for other in ("transformers", "gpt-fast-style")
        for kind in ("fp32", "bf16")
    ]
    pairs += [("nanollama fp32", "llama.cpp F32"), ("nanollama int8", "llama.cpp Q8_0")]
    pairs += [("nanollama bf16", "nanollama fp32"), ("nanollama int8", "nanollama bf16")]
    pairs += [("nanollama int4", "nanollama int8"), ("nanollama fp32", "nanollama fp32 eager")]
    pairs = [(a, b) for a, b in pairs if a in speeds and b in speeds]
    return {f"{a} / {b}": statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True)) for a, b in pairs}


def is_installed(name: str) -> bool:
    from importlib.util import find_spec

    needs = {"transformers": "transformers", "llama.cpp": "llama_cpp"}.get(name.split()[0], "torch")
    return find_spec(needs) is not None


# What follows runs in the engines' processes.


def write_checkpoints(shape: str, folder: str, names: list[str]) -> None:
    """The seeded weights in the forms that the engines open."""
    import torch

    from nanollama.checkpoint import write_gguf, write_hf
    from nanollama.model import ModelConfig, Transformer

    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCAB, max_seq_len=CONTEXT, tied=True, rope_theta=10000.0, **SHAPES[shape])
    weights = Transformer(config).state_dict()
    write_hf(Path(folder) / "hf", config, weights)
    for kind in ("F32", "Q8_0"):
        if f"llama.cpp {kind}" in names:
            write_gguf(Path(folder) / f"{kind}.gguf", config, weights, dtype={"F32": "fp32"}.get(kind, kind.lower()))


def set_up(name: str, shape: str, folder: str) -> int:
    """Load the engine and let it compile and warm up; returns the bytes that it reads for a token."""
    decode_speed(name, shape, folder, 8)
    return engine(name, folder)[1]


def decode_speed(name: str, shape: str, folder: str, tokens: int) -> float:
    """Tokens a second after the first one, which belongs to the prompt."""
    times = engine(name, folder)[0](list(range(5, 5 + PROMPT_TOKENS)), tokens + 1)
    assert len(times) == tokens + 1, f"{name} decoded {len(times)} tokens, not {tokens + 1}"
    return tokens / (times[-1] - times[0])


def stamps(tokens: Iterable[object]) -> list[float]:
    return [time.perf_counter() for _ in tokens]


@lru_cache
def engine(name: str, folder: str) -> tuple[Generate, int]:
    """(prompt ids, tokens) -> an iterator that moves with each token; and the bytes of weights that a token needs."""
    family, kind, *rest = name.split()
    if family == "nanollama":
        return ours(folder, kind, "off" if rest else "on")
    if family == "gpt-fast-style":
        return gpt_fast_style(folder, kind)
    return transformers_generate(folder, kind) if family == "transformers" else llama_cpp(folder, kind)


def ours(folder: str, kind: str, compile: Literal["on", "off"]) -> tuple[Generate, int]:
    from nanollama.generation.llama import Llama, Sampling
    from nanollama.speed.quantize import SCHEMES, weight_bytes

    scheme = kind if kind in SCHEMES else None
    dtype = "bf16" if scheme else kind
    llama = Llama.load(Path(folder) / "hf", dtype=dtype, quantize=scheme, compile=compile)
    # A tied head in quantised form is a matrix of its own; the embedding's rows are not read for a token.
    unread = llama.model.tok_embeddings.weight.nbytes if scheme else 0

    def generate(prompt: list[int], tokens: int) -> list[float]:
        return stamps(llama.generate([prompt], Sampling(max_new_tokens=tokens)))

    return generate, weight_bytes(llama.model) - unread


def gpt_fast_style(folder: str, kind: str) -> tuple[Generate, int]:
    """gpt-fast's manner without its compiler: a static cache, a row of a mask, fused attention over all slots."""
    import torch
    import torch.nn.functional as F

    from nanollama.generation.llama import Llama
    from nanollama.model import apply_rope, rope_table
    from nanollama.speed.quantize import weight_bytes

    model = Llama.load(Path(folder) / "hf", dtype=kind).model
    config, slots = model.config, 256
    cos, sin = rope_table(config, torch.arange(slots))
    mask = torch.ones(slots, slots, dtype=torch.bool).tril()

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, config.head_dim))

    def forward(ids: torch.Tensor, at: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        x = model.tok_embeddings(ids)
        for block, cache in zip(model.layers, caches, strict=True):
            layer: Any = block
            h, attention = layer.attention_norm(x), layer.attention
            q, k, v = (heads(w(h)) for w in (attention.wq, attention.wk, attention.wv))
            q, k = (apply_rope(z, cos[at][None], sin[at][None]).transpose(1, 2) for z in (q, k))
            cache[0][:, :, at], cache[1][:, :, at] = k, v.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                q, cache[0], cache[1], attn_mask=mask[at][None, None], enable_gqa=True
            )
            x = x + attention.wo(mixed.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return F.linear(model.norm(x)[:, -1], model.head())

    def generate(prompt: list[int], tokens: int) -> list[float]:
        with torch.inference_mode():
            shape = (2, 1, config.n_kv_heads, slots, config.head_dim)
            caches = [torch.zeros(shape, dtype=model.head().dtype) for _ in model.layers]
            ids, at = torch.tensor([prompt]), torch.arange(len(prompt))
            times = []
            for _ in range(tokens):
                ids, at = forward(ids, at, caches).argmax(-1, keepdim=True), at[-1:] + 1
                times.append(time.perf_counter() if int(ids) >= 0 else 0.0)  # the token has reached the host
            return times

    return generate, weight_bytes(model)


def transformers_generate(folder: str, kind: str) -> tuple[Generate, int]:
    import torch
    import transformers

    from nanollama.checkpoint.weights import DTYPES

    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "hf", dtype=DTYPES[kind]).eval()
    model.generation_config.eos_token_id = None

    class Times(list[float]):
        """A streamer that notes when tokens come; the first `put` is the prompt."""

        def put(self, _: object) -> None:
            self.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompt: list[int], tokens: int) -> list[float]:
        times, ids = Times(), torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=times,
                pad_token_id=0,
            )
        return times[1:]

    return generate, sum(p.nbytes for p in model.parameters())


def llama_cpp(folder: str, kind: str) -> tuple[Generate, int]:
    import torch
    from llama_cpp import Llama

    path, threads = Path(folder) / f"{kind}.gguf", torch.get_num_threads()
    model = Llama(str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompt: list[int], tokens: int) -> list[float]:
        model.reset()
        return stamps(islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), tokens))

    return generate, path.stat().st_size


def as_text(found: dict[str, Any]) -> str:
    limit = found["read_bytes_per_s"]
    lines = [f"{found['shape']}, {found['threads']} thread(s), memory reads {limit / 1e9:.1f} GB/s"]
    lines += [f"{name}: its process died" for name in found["died"]] + disturbance(found["disturbed_rounds"])
    for name, figure in sorted(found["engines"].items(), key=lambda item: -item[1]["tokens_per_s"]):
        lines.append(
            f"{name:24} {figure['tokens_per_s']:8.1f} tok/s  {figure['share_of_limit']:6.1%} of the memory limit"
        )
    return "\n".join([*lines, "", *(f"{name:44} {ratio:5.2f}x" for name, ratio in found["ratios"].items())])


def chart(found: dict[str, Any], path: Path) -> None:
    """Bars, slowest first, with a mark where the memory limit lies for that engine's weights."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: pip install 'llama-parity[finetune]'", file=sys.stderr)
        return
    items = sorted(found["engines"].items(), key=lambda item: item[1]["tokens_per_s"])
    names, speeds = [name for name, _ in items], [figure["tokens_per_s"] for _, figure in items]
    figure = Figure(figsize=(8, 0.4 * len(items) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, speeds, color=["#2a6fbb" if name.startswith("nano") else "#b8bec6" for name in names])
    limits = [found["read_bytes_per_s"] / engine["weight_bytes"] for _, engine in items]
    axes.plot(limits, names, "|", color="#c0392b", markersize=14, markeredgewidth=2, label="memory limit")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("tokens per second, one row")
    axes.set_title(f"{found['shape']}, {found['threads']} threads, {found['environment']['cpu']}")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
