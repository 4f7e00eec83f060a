"""What a candidate answered, made sure of before it is kept: type, shape and dtype of each method's return value.

Numbers are not looked at here: NaN and infinities go on to the gates, which no such number passes. Each function
returns the answer in the form in which it is recorded and raises `Wrong`, in words, for one that is none.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.candidates.crash import Wrong
from reference.protocol import tap_names

Shape = tuple[int | str, ...]  # a name stands for any size


def named(value: Any) -> str:
    """A value as an error shows it."""
    if isinstance(value, Tensor):
        return f"a Tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else type(value).__name__


def of_array(value: Any) -> Any:
    """Floats in an array of numpy's, or of what numpy takes for one (JAX, TensorFlow), as a Tensor; else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # JAX's own type, every number of which float32 holds
        array = array.astype(np.float32)
    known = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if known else value


def floats(value: Any, asked: str, expected: str) -> Tensor:
    """A Tensor of floating-point numbers, detached."""
    value = of_array(value)
    if not isinstance(value, Tensor):
        raise Wrong(f"{asked} returned {named(value)}: expected {expected}")
    if not value.is_floating_point() or value.is_meta:
        raise Wrong(f"{asked} returned {named(value)}: expected floating-point numbers")
    return value.detach()


def logits(out: Any, asked: str, rows: int, length: int, vocab_size: int | None, last: bool = False) -> Tensor:
    """(B, T, V); with `last` also (B, 1, V) or (B, V). An output object with a `logits` field, as transformers returns,
    will do."""
    found = getattr(out, "logits", out)
    expected = (rows, length, vocab_size or "V")
    value = floats(found, asked, f"logits {shown(expected)}")
    if last and value.dim() == 2:
        value = value.unsqueeze(1)
    lengths = (length, 1) if last else (length,)
    if not any(fits(value, (rows, n, vocab_size or "V")) for n in lengths):
        hint = "; set last_only = True if it gives the last token's alone" if fits(value, (rows, 1, "V")) else ""
        raise Wrong(f"{asked} returned logits {tuple(found.shape)}: expected {shown(expected)}{hint}")
    return value


def fits(value: Tensor, shape: Shape) -> bool:
    return value.dim() == len(shape) and all(
        (isinstance(n, str) and size > 0) or n == size for size, n in zip(value.shape, shape, strict=True)
    )


def shown(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


def taps(out: Any, length: int, n_layers: int | None = None) -> dict[str, Tensor]:
    """{tap: (1, T, ...)} but for the logits; at least one."""
    if not isinstance(out, dict):
        raise Wrong(f"taps(tokens) returned {named(out)}: expected a dict of Tensors by tap name")
    kept = {name: tap(x, f"taps(tokens)[{name!r}]", length) for name, x in out.items() if name != "logits"}
    if not kept:
        raise Wrong("taps(tokens) returned no tap")
    unknown = [] if n_layers is None else [name for name in kept if name not in tap_names(n_layers)]
    if len(unknown) == len(kept):
        raise Wrong(f"taps(tokens) returned {unknown[0]!r} and no tap of the interface, such as layers.0.q")
    return kept


def tap(value: Any, asked: str, length: int) -> Tensor:
    """(1, T, ...)."""
    found = floats(value, asked, "a Tensor (1, T, ...)")
    if found.dim() < 3 or tuple(found.shape[:2]) != (1, length):
        raise Wrong(f"{asked} has shape {tuple(found.shape)}: expected (1, {length}, ...)")
    return found


def ids(out: Any, asked: str, vocab_size: int | None = None) -> list[int]:
    """Token ids, from a list, a tuple, a Tensor or an array of integers."""
    flat = out.tolist() if hasattr(out, "tolist") else out
    if not isinstance(flat, list | tuple):
        raise Wrong(f"{asked} returned {named(out)}: expected a list of token ids")
    try:
        found = [operator.index(i) for i in flat]
    except TypeError:
        raise Wrong(f"{asked} returned {str(flat)[:60]}: expected a list of token ids") from None
    outside = [i for i in found if i < 0 or (vocab_size is not None and i >= vocab_size)]
    if outside:
        raise Wrong(f"{asked} returned the id {outside[0]}: expected 0 to {(vocab_size or 0) - 1 or 'V - 1'}")
    return found


def log_probs(out: Any, asked: str, length: int, vocab_size: int | None = None) -> dict[str, dict[str, float]]:
    """{position: {id: log-probability of it as the next token}}, as JSON holds it."""
    if not isinstance(out, dict) or not all(isinstance(row, dict) for row in out.values()):
        raise Wrong(f"{asked} returned {named(out)}: expected {{position: {{id: log-probability}}}}")
    positions = ids(list(out), asked)
    if any(position >= length for position in positions):
        raise Wrong(f"{asked} returned position {max(positions)}: expected 0 to {length - 1}")
    rows = {}
    for position, row in zip(positions, out.values(), strict=True):
        tokens = ids(list(row), asked, vocab_size)
        rows[str(position)] = {str(i): number(x, asked) for i, x in zip(tokens, row.values(), strict=True)}
    return rows


def config(out: Any) -> dict[str, Any]:
    if not isinstance(out, dict) or not out:
        raise Wrong(f"config() returned {'an empty dict' if out == {} else named(out)}: expected the echo")
    return {str(key): plain(value) for key, value in out.items()}


def plain(value: Any) -> Any:
    """As JSON holds it; what it does not hold, as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return plain(value.item()) if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def weights(out: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(out, dict) or not out:
        raise Wrong(f"weights() returned {'no weight' if out == {} else named(out)}: expected shapes and checksums")
    found = {}
    for name, entry in out.items():
        try:
            shape, crc32 = [operator.index(n) for n in entry["shape"]], operator.index(entry["crc32"])
        except (TypeError, KeyError, IndexError):
            raise Wrong(f"weights()[{name!r}] is {str(entry)[:60]}: expected shape and crc32") from None
        found[str(name)] = {"shape": shape, "crc32": crc32}
    return found


def rope(out: Any, positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin (N, D/2) float32."""
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise Wrong(f"rope(positions) returned {named(out)}: expected cos and sin")
    cos, sin = (floats(x, "rope(positions)", "cos and sin") for x in out)
    for table in (cos, sin):
        if not fits(table, (positions, "head_dim/2")) or table.shape != cos.shape:
            raise Wrong(f"rope(positions) returned a table {tuple(table.shape)}: expected ({positions}, head_dim/2)")
    return cos.float().cpu(), sin.float().cpu()


def part(out: Any) -> tuple[str, dict[str, Tensor]]:
    """What stream() yields."""
    if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], dict):
        raise Wrong(f"stream() yielded {named(out)}: expected (part, tensors)")
    return str(out[0]), {str(name): floats(x, f"stream(), {name}", "a Tensor") for name, x in out[1].items()}


# --- Training --------------------------------------------------------------------------------------------------------


def loss_and_grads(out: Any, asked: str) -> tuple[float, dict[str, Tensor]]:
    if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], dict):
        raise Wrong(f"{asked} returned {named(out)}: expected a loss and a dict of gradients by Meta's weight names")
    return number(out[0], asked), weights_of(out[1], asked)


def weights_of(out: Any, asked: str) -> dict[str, Tensor]:
    if not isinstance(out, dict) or not out:
        raise Wrong(f"{asked} returned {named(out)}: expected a dict of Tensors by Meta's weight names")
    return {str(name): floats(x, f"{asked}, {name}", "a Tensor") for name, x in out.items()}


def number(value: Any, asked: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{asked} returned {named(value)}: expected a number") from None


def steps(out: Any, asked: str, count: int) -> list[dict[str, Tensor]]:
    if not isinstance(out, list | tuple) or len(out) != count:
        raise Wrong(f"{asked} returned {named(out)}: expected the weights after each of {count} steps")
    return [weights_of(step, asked) for step in out]


def each(out: Any, asked: str, what: str, read: Callable[[Any, str], Any]) -> list[Any]:
    """A list, each entry of it read."""
    if not isinstance(out, Sequence) or isinstance(out, str):
        raise Wrong(f"{asked} returned {named(out)}: expected a list of {what}")
    return [read(entry, asked) for entry in out]


def label_row(row: Any, asked: str) -> list[int]:
    flat = row.tolist() if hasattr(row, "tolist") else row
    try:
        return [operator.index(i) for i in flat]
    except TypeError:
        raise Wrong(f"{asked} returned {named(row)}: expected a list of labels") from None


def two_logits(out: Any, asked: str, length: int, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise Wrong(f"{asked} returned {named(out)}: expected logits with the adapter beside, and merged in")
    first, second = (logits(x, asked, 1, length, vocab_size) for x in out)
    return first, second


def finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
