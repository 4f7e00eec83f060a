"""The arithmetic of a compiled step, one token of each row: matrices read once, as they are stored, sums in fp32.

torch's inductor makes machine code of it; run as it is it gives the same numbers, slowly.

    matvec(x, [weight])                          # x (B, K), weight (N, K) fp32 or bf16 -> (B, N)
    matvec(x, [numbers, scales])                 # integers as nanollama.speed.quantize makes them
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nanollama.speed import int4


def matvec(x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """x (B, K) times a matrix -> (B, N) in x's dtype. Packed int4 goes to the library's kernel.

    Written row by row and in two halves of the outputs: the compiler fuses them into one pass over the weights with
    independent sums, which keeps the adders busy (one running sum alone waits four cycles for each addition). int4 has
    independent sums of its own, and a GPU has sums enough.
    """
    if operands[-1].ndim == 3:
        return int4.matmul(x.to(torch.bfloat16), *operands).to(x.dtype)
    halves = 2 if operands[0].device.type == "cpu" and operands[0].dtype != torch.uint8 else 1
    parts = list(zip(*(tensor.chunk(halves) for tensor in operands), strict=True))
    # Beside integers, a vector of bf16 would take the compiler's slow conversions for both: fp32 is loaded instead.
    rows = [arrange(row, operands[0]) for row in (x if len(operands) == 1 else x.float()).unbind()]
    return torch.stack([torch.cat([dot(row, *part) for part in parts]) for row in rows]).to(x.dtype)


def dot(x: Tensor, numbers: Tensor, scales: Tensor | None = None) -> Tensor:
    """x (K,), in the order of `arrange`, times a matrix in any of its forms (see `quantize`) -> (N,) float32."""
    x = x.float()
    if numbers.dtype == torch.uint8:
        assert scales is not None
        half = numbers.shape[1]
        x = x.view(2 * half, -1)  # (G, K/G)
        low = [x[j] * (numbers[:, j] & 15).float() for j in range(half)]
        high = [x[j + half] * (numbers[:, j] >> 4).float() for j in range(half)]
        # The numbers are stored plus 8: taken off once a group and not once a weight.
        return ((sum(low[1:] + high, low[0]) - 8 * x.sum(0)) * scales.float()).sum(-1)
    weights = unpack_words(numbers) if in_words(numbers) else [numbers.float()]
    sums = [(part * weight).sum(-1) for part, weight in zip(x.view(len(weights), -1), weights, strict=True)]
    total = sum(sums[1:], sums[0])
    return total if scales is None else total * scales


def in_words(numbers: Tensor) -> bool:
    """Whether four int8 weights are read as one number of 32 bits."""
    is_whole = numbers.dtype == torch.int8 and numbers.shape[1] % 4 == 0
    return is_whole and numbers.device.type == "cpu" and loads_bytes_slowly()


def loads_bytes_slowly() -> bool:
    """Without AVX-512 the compiler loads bytes by way of memory; floats it loads at once."""
    return torch.backends.cpu.get_cpu_capability() != "AVX512"


def arrange(x: Tensor, numbers: Tensor) -> Tensor:
    """x (K,) in the order of the weights: for words every fourth input from the first on, then from the second."""
    return torch.cat([x[i::4] for i in range(4)]) if in_words(numbers) else x


def unpack_words(numbers: Tensor) -> list[Tensor]:
    """int8 (N, K) -> float32 (N, K/4) four times: the words' first weights, their second."""
    words = numbers.view(torch.float32).view(torch.int32)
    return [*(((words << (24 - 8 * i)) >> 24).float() for i in range(3)), (words >> 24).float()]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """One query over its row's cache, in fp32: q (H, D); k, v (S, K, D); position (1,) -> (H, D) in q's dtype."""
    query = q.float().unflatten(0, (k.shape[1], -1))  # (K, R, D), R query heads for each key/value head
    scores = (query * k.float().unsqueeze(2)).sum(-1) / math.sqrt(q.shape[-1])  # (S, K, R)
    hidden = torch.arange(k.shape[0], device=k.device) > position  # (S,)
    probs = scores.masked_fill(hidden.view(-1, 1, 1), -math.inf).softmax(0)
    return (probs.unsqueeze(-1) * v.float().unsqueeze(2)).sum(0).flatten(0, 1).type_as(q)
