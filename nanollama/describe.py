"""What a checkpoint is, without building a model: format, config, weights, and the published model whose shape it has.

python -m nanollama inspect Meta-Llama-3.1-8B
Meta-Llama-3.1-8B: format meta, the shape of Llama 3.1 8B, 8,030,261,248 parameters in bf16
...
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nanollama.checkpoint import Checkpoint
from nanollama.checkpoint.weights import DTYPES
from nanollama.model import ModelConfig
from nanollama.printable import printable, printable_all
from nanollama.tokenizer import TokenizerError, open_tokenizer

# (dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, whether RoPE is scaled) -> name
PUBLISHED = {
    (4096, 32, 32, 32, 11008, 32000, False): "Llama 2 7B",
    (5120, 40, 40, 40, 13824, 32000, False): "Llama 2 13B",
    (8192, 80, 64, 8, 28672, 32000, False): "Llama 2 70B",
    (4096, 32, 32, 8, 14336, 128256, False): "Llama 3 8B",
    (8192, 80, 64, 8, 28672, 128256, False): "Llama 3 70B",
    (4096, 32, 32, 8, 14336, 128256, True): "Llama 3.1 8B",
    (8192, 80, 64, 8, 28672, 128256, True): "Llama 3.1 or 3.3 70B",
    (16384, 126, 128, 8, 53248, 128256, True): "Llama 3.1 405B",
    (2048, 16, 32, 8, 8192, 128256, True): "Llama 3.2 1B",
    (3072, 28, 24, 8, 8192, 128256, True): "Llama 3.2 3B",
    (64, 5, 8, 4, 172, 512, False): "llama2.c stories260K",
    (288, 6, 6, 6, 768, 32000, False): "llama2.c stories15M",
    (512, 8, 8, 8, 1376, 32000, False): "llama2.c stories42M",
    (768, 12, 12, 12, 2048, 32000, False): "llama2.c stories110M",
}


def published_name(config: ModelConfig) -> str | None:
    """The published model with this shape, or None."""
    shape = (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size)
    return PUBLISHED.get((*shape, config.rope_scaling is not None))


def describe(checkpoint: Checkpoint, verified: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that `inspect` shows, ready for JSON. Reads no weights.

    verified: files that were found equal to their checksums.
    """
    weights = checkpoint.weights
    tensors = {
        name: {"shape": list(shape), "dtype": dtype_name(weights.dtypes[name])}
        for name, shape in weights.shapes.items()
    }
    tokenizer, problems = None, []
    if checkpoint.tokenizer:
        try:
            opened = open_tokenizer(checkpoint.tokenizer)
            tokenizer = {"path": str(checkpoint.tokenizer), "kind": opened.kind, "vocab_size": opened.vocab_size}
        except TokenizerError as error:
            problems.append(f"its tokenizer cannot be used: {error}")
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "published_shape": published_name(checkpoint.config),
        "parameters": sum(math.prod(shape) for shape in weights.shapes.values()),
        "dtype": dtype_name(weights.dtype),
        "config": asdict(checkpoint.config),
        "tokenizer": tokenizer,
        "tensors": tensors,
        "verified": list(verified),
        "notices": [*checkpoint.notices, *problems],
    }


def dtype_name(dtype: object) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def as_text(facts: dict[str, Any]) -> str:
    """The same for people; weights that all layers have in common take one line."""
    facts = printable_all(facts)
    lines = [summary(facts)]
    lines += [f"notice: {notice}" for notice in facts["notices"]]
    if facts["verified"]:
        lines.append(f"verified: {', '.join(facts['verified'])} match their checksums")
    lines += ["", "config"]
    lines += [f"  {name:14} {_show(value)}" for name, value in facts["config"].items()]
    tokenizer = facts["tokenizer"]
    lines += ["", "tokenizer"]
    lines += [f"  {name:14} {_show(value)}" for name, value in tokenizer.items()] if tokenizer else ["  none found"]
    lines += ["", "weights"]
    for (name, dims, dtype), count in _grouped(facts["tensors"]).items():
        times = f"  x {count}" if count > 1 else ""
        lines.append(f"  {name:38} {dims:18} {dtype}{times}")
    return "\n".join(lines)


def summary(facts: dict[str, Any]) -> str:
    """One line: path, format, published shape, parameters, dtype."""
    shape = f"the shape of {facts['published_shape']}" if facts["published_shape"] else "no published shape"
    parameters = f"{facts['parameters']:,} parameters in {facts['dtype']}"
    return f"{printable(facts['path'])}: format {facts['format']}, {shape}, {parameters}"


def _grouped(tensors: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    """(name with * for the layer, shape, dtype) -> how many."""
    return Counter(
        (re.sub(r"^layers\.\d+\.", "layers.*.", name), " x ".join(map(str, tensor["shape"])), tensor["dtype"])
        for name, tensor in tensors.items()
    )


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(item)}" for name, item in value.items())
    return f"{value:,}" if type(value) is int else "none" if value is None else str(value)
