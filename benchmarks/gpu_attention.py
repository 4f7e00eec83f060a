"""Which of torch's attention kernels takes which of the model's calls, and in what time: bf16, heads of an 8B model.

python -m benchmarks.gpu_sections attention /tmp/attention.jsonl
{"name": "one token, mask", "milliseconds": {"chosen": 0.021, "FLASH_ATTENTION": "refused", ...}}
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_models import Bench, Item
from nanollama.model import fast_attention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROW_TOKENS, CALLS = 2048, 20
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]


def attention_items(bench: Bench) -> Iterator[Item]:
    n = ROW_TOKENS if bench.on_gpu else 32
    causal = torch.ones(1, n, n, dtype=torch.bool, device=bench.device).tril()
    first = torch.arange(n, device=bench.device).lt(n // 2).view(1, 1, n)
    for name, T, slots, mask, backward in (
        ("prompt, causal", n, [n], None, False),
        ("row, document mask", n, [n], causal, False),
        ("row, document mask, backward", n, [n], causal, True),
        ("one token, mask", 1, [n], first, False),
        ("one token, no mask", 1, [n], None, False),
        # A kernel that is planned anew for every length shows here.
        ("one token, each time one more", 1, range(n // 2, n // 2 + CALLS), None, False),
    ):
        made = [arguments(bench, T, length, mask) for length in slots]
        yield name, lambda made=made, backward=backward: timed(bench, made, backward)  # type: ignore[misc]


def arguments(bench: Bench, T: int, slots: int, mask: Tensor | None) -> Arguments:
    """q (1, T, H, D), k and v (1, slots, K, D)."""
    shapes = ((T, HEADS), (slots, KV_HEADS), (slots, KV_HEADS))
    q, k, v = (torch.randn(1, *shape, HEAD_DIM, device=bench.device, dtype=torch.bfloat16) for shape in shapes)
    return q, k, v, mask


def timed(bench: Bench, made: list[Arguments], backward: bool) -> dict[str, Any]:
    """Milliseconds of a call by torch's own choice and by each kernel alone, or that it is refused."""
    kinds: dict[str, Callable[[], AbstractContextManager[Any]]] = {"chosen": nullcontext}
    kinds |= {name: lambda name=name: sdpa_kernel(getattr(SDPBackend, name)) for name in BACKENDS}  # type: ignore[misc]
    found: dict[str, float | str] = {}
    for name, context in kinds.items():
        try:
            with context():
                found[name] = milliseconds(bench, made, backward)
        except RuntimeError as error:
            found[name] = f"refused: {str(error).partition(chr(10))[0][:80]}"
    return {"milliseconds": found}


def milliseconds(bench: Bench, made: list[Arguments], backward: bool) -> float:
    calls = made if len(made) > 1 else made * CALLS
    if len(made) == 1:
        attend(*made[0], backward)
    start = bench.now()
    for one in calls:
        attend(*one, backward)
    return 1e3 * (bench.now() - start) / len(calls)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backward: bool) -> None:
    if not backward:
        fast_attention(q, k, v, mask)
        return
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    fast_attention(leaves[0], leaves[1], leaves[2], mask).sum().backward()
