"""int4 weights in the layout of torch's own kernel for bf16 activations: one pass over packed weights at memory speed.

A group is 32 inputs side by side with a scale and a zero point, both bf16: weight = (number - 8) * scale + zero. They
are chosen by least squares: numbers by the group's range, then the line that fits the weights best, then the
numbers by that line.

    numbers, scales = quantize(weight)                # (N, K) -> packed uint8 (N, K/2) and bf16 (K/32, N, 2)
    y = matmul(x, numbers, scales)                    # x (..., K) bf16 -> (..., N) bf16, summed in fp32
    weight = dequantize(numbers, scales)              # fp32 (N, K)

The packed bytes lie as this processor's vectors read them (torch.backends.cpu.get_cpu_capability), so they are made
when a model is loaded and never stored in a file.
"""

from functools import cache

import torch
from torch import Tensor

GROUP = 32  # inputs that share a scale and a zero point
ROWS = 64  # the kernel's blocks of outputs; it has slow paths for others
REFITS = 1  # of the line through a group's numbers; a second moves the error by 2% and takes a third longer


def fits(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's kernel multiplies these weights (N, K) fast: by bf16 activations, in whole blocks."""
    outputs, inputs = weight.shape
    whole = outputs % ROWS == 0 and inputs % GROUP == 0
    return whole and dtype == torch.bfloat16


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> packed uint8 (N, K/2), and scales and zero points, bf16 (K/32, N, 2)."""
    groups = (
        weight.float().unflatten(1, (-1, GROUP)).permute(2, 0, 1).contiguous()
    )  # (32, N, K/32): sums over the first
    low, high = groups.aminmax(dim=0)
    scale = (high - low) / 15
    line = stored(scale, low + 8 * scale)
    for _ in range(REFITS):
        line = fit(groups, nearest(groups, *line))
    numbers = nearest(groups, *line).add_(8).to(torch.int32).permute(1, 2, 0).flatten(1)  # (N, K)
    pairs = torch.stack(line, dim=-1).to(torch.bfloat16)  # (N, K/32, 2)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1), pairs.transpose(0, 1).contiguous()


def stored(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """As bf16 holds them: the numbers are then chosen for what is kept, and its rounding is no error of the weights."""
    return scale.to(torch.bfloat16).float(), zero.to(torch.bfloat16).float()


def nearest(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(32, N, K/32) -> the numbers less 8, -8..7 as fp32, whose values come nearest to the weights."""
    return ((groups - zero) * torch.where(scale == 0, 1.0, 1 / scale)).round_().clamp_(-8, 7)


def fit(groups: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (N, K/32) with the least squared error for these numbers."""
    mean_n, mean_w = numbers.mean(0), groups.mean(0)
    covariance = (numbers * groups).mean(0) - mean_n * mean_w
    scale = covariance / (numbers.square().mean(0) - mean_n.square()).clamp(min=1e-6)
    return stored(scale, mean_w - scale * mean_n)


def matmul(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x (B, K) bf16 times packed weights -> (B, N) bf16, sums in fp32."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, numbers, GROUP, scales)


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """fp32 (N, K) from packed numbers (N, K/2); N in whole blocks."""
    block = block_rows()
    packed = numbers.view(-1, 2 * numbers.shape[1], block // 2)  # (N/block, K, block/2), a byte two rows of one input
    values = torch.cat((packed & 15, packed >> 4), dim=2).transpose(1, 2)  # (N/block, block, K)
    groups = values.reshape(numbers.shape[0], -1, GROUP).float() - 8
    scale, zero = scales.float().transpose(0, 1).unsqueeze(2).unbind(-1)  # (N, K/32, 1) each
    return (groups * scale + zero).flatten(1)


@cache
def block_rows() -> int:
    """Outputs that lie together, the first half of them in the low halves of bytes: asked of the library's packing."""
    second_half = (torch.arange(ROWS, dtype=torch.int32) >= ROWS // 4).int().unsqueeze(1).expand(ROWS, 2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(second_half.contiguous(), 1)
    # Blocks of 64: byte 0 holds rows 0 and 32; of 32: rows 0 and 16. Byte 16 holds 16 and 48, or 0 and 16 of input 1.
    return ROWS if int(packed.flatten()[16]) & 15 else ROWS // 2
