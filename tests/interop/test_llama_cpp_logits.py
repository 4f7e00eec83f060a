"""Exported GGUF in llama.cpp: prefill and greedy decode, judged by the float64 oracle on the weights in the file.

The bound is that of the parity gates (docs/parity.md): an error at most twice the one that the weights' type makes by
design, and the same token wherever the oracle's choice is clear.

    python -m pytest tests/interop -k llama_cpp
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import LlamaCpp, decided, decisive_weights, oracle_logits, our_logits, ratio
from nanollama.checkpoint import convert, open_checkpoint, write_gguf
from nanollama.model import ModelConfig, RopeScaling
from nanollama.tokenizer import open_tokenizer

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'llama-parity[interop]'")

NEW_TOKENS = 24
BOUND = 2.0
TEXT = (
    "The lighthouse keeper counted 1,024 waves before breakfast; then he wrote them down, one by one, in a book.\n\n"
    "\tfor i in range(10):\n\t\tprint(i ** 2)  # squares\n\nสวัสดี, café, 你好 and 😀: not every word fits a vocabulary. "
    "In the evening the sea was flat again, and nobody could say where the numbers had gone."
)


LLAMA31 = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128_256, hidden_dim=160, norm_eps=2e-5,
    rope_scaling=RopeScaling(), max_seq_len=131_072,
)  # fmt: skip
FAMILIES = {
    "llama3.1": LLAMA31,
    "llama3": replace(LLAMA31, rope_scaling=None),
    "llama3.2": replace(LLAMA31, rope_scaling=RopeScaling(factor=32.0), tied=True),
    "llama2": replace(LLAMA31, rope_scaling=None, vocab_size=32_000, rope_theta=10_000.0),
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def export(folder: Path, family: str, type_name: str, tokenizer: Path | None) -> tuple[Path, Path]:
    """(.gguf, Meta folder that holds the same numbers)"""
    config = FAMILIES[family]
    write_gguf(folder / "x.gguf", config, decisive_weights(config), tokenizer=tokenizer, dtype=type_name)
    convert(folder / "x.gguf", folder / "meta", "meta", dtype="fp32" if type_name == "q8_0" else None)
    return folder / "x.gguf", folder / "meta"


@pytest.mark.parametrize(
    ("family", "type_name"),
    [
        *(("llama3.1", type_name) for type_name in ("fp32", "fp16", "bf16", "q8_0")),
        *(("llama2", type_name) for type_name in ("fp32", "fp16", "q8_0")),
        ("llama3", "fp32"),
        ("llama3.2", "fp16"),
    ],
)
def test_logits_and_greedy_tokens(
    tmp_path: Path, family: str, type_name: str, test_data: Callable[[str], Path], llama3_tokenizer_path: Path
) -> None:
    source = test_data("llama2_tokenizer.model") if family == "llama2" else llama3_tokenizer_path
    gguf, meta = export(tmp_path, family, type_name, source)
    tokenizer = open_checkpoint(gguf).tokenizer
    assert tokenizer is not None
    prompt = open_tokenizer(tokenizer).encode(TEXT, bos=True)
    engine = LlamaCpp(gguf)
    tokens, logits = engine.logits(prompt, NEW_TOKENS)
    engine.close()
    rows = [*range(0, len(prompt), 3), *range(len(prompt) - 1, len(tokens))]
    oracle, noisy = oracle_logits(meta, tokens, rows), our_logits(meta, tokens, rows, type_name)
    found = ratio(logits[rows], noisy, oracle)
    clear = decided(noisy, oracle)
    print(f"{family} {type_name}: ratio {found:.2f}, {int(clear.sum())} of {len(rows)} positions clear")
    assert found <= BOUND
    assert clear.float().mean() >= 0.3
    assert torch.equal(logits[rows].argmax(1)[clear], oracle.argmax(1)[clear])
    chosen, clear = torch.tensor(tokens[-NEW_TOKENS:]), clear[-NEW_TOKENS - 1 : -1]
    assert torch.equal(chosen[clear], oracle[-NEW_TOKENS - 1 : -1].argmax(1)[clear])


def test_without_rope_freqs_the_same_gate_fails(tmp_path: Path) -> None:
    """The trap of early Llama 3.1 files (llama.cpp#8676): the gate has to see it."""
    gguf, meta = export(tmp_path, "llama3.1", "fp32", None)
    opened = open_checkpoint(gguf)
    broken = gguf.with_name("broken.gguf")
    write_gguf(broken, replace(opened.config, rope_scaling=None), opened.weights)
    tokens = torch.randint(1000, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = list(range(0, 200, 4))
    engine = LlamaCpp(broken)
    _, logits = engine.logits(tokens)
    engine.close()
    oracle, noisy = oracle_logits(meta, tokens, rows), our_logits(meta, tokens, rows, "fp32")
    assert ratio(logits[rows], noisy, oracle) > 100


def test_a_trained_model_tells_the_same_story(tmp_path: Path, test_data: Callable[[str], Path]) -> None:
    """stories260K, greedy from BOS, 200 tokens: llama.cpp's text is ours."""
    from nanollama.generation.llama import Llama, Sampling

    source, tokenizer = test_data("stories260K.bin"), test_data("tok512.bin")
    convert(source, tmp_path / "x.gguf", "gguf", tokenizer=tokenizer)
    llama = Llama.load(str(source), tokenizer=tokenizer)
    ours = [event.token for event in llama.generate([[1]], Sampling(max_new_tokens=200))]
    engine = LlamaCpp(tmp_path / "x.gguf")
    theirs, _ = engine.logits([1], 200)
    text = engine.llama.detokenize(theirs[1:]).decode()
    engine.close()
    assert theirs[1:] == ours
    assert text.strip().startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
