"""Weight-only quantisation from outside the model: int8 a row, int4 a group, in place of the linear layers.

Activations, norms and the embedding keep their dtype; a tied head becomes a quantised copy of the embedding. Weights
stream from the checkpoint one matrix at a time, so the process never holds both forms. Decoding through
`nanollama.speed.compiled` multiplies the integers as they are; everything else dequantises blocks of rows on the way.

    python -m nanollama generate Meta-Llama-3.1-8B --prompt "Once upon a time" --quantize int8

int8: one fp32 scale for each output row. int4 with bf16 activations on a CPU: `nanollama.speed.int4`, torch's kernel.
int4 elsewhere: two numbers a byte, one bf16 scale for each group of about 32 inputs. A group is a stride of the inputs
(0, n, 2n, ...), so the scales of neighbouring inputs lie side by side and a vector unit multiplies 16 groups at once.
Scales as in llama.cpp's Q8_0 and Q4_0 (the largest number becomes -127 or -8).
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanollama.model import ModelConfig, Transformer
from nanollama.speed import int4

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
GROUP_INPUTS = 32  # aimed at; see `group_size`
BLOCK_BYTES = 2**22  # of dequantised weights, as fp32, at a time: they stay in the processor's cache
PROMPT_ROWS = 128  # of packed int4: with more, dequantising for the matrix product of bf16 costs less than it wins
QUANTIZE_BYTES = 2**21  # of fp32 weights at a time: small enough that the allocator gives its memory back
MADV_PAGEOUT = 21  # Linux's


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and fp32 scales (N,), weight ~ int8 * scale."""
    weight = weight.float()
    # By a tensor: CUDA multiplies by the reciprocal of a plain number, one rounding more than a CPU.
    scales = weight.abs().amax(dim=1) / weight.new_tensor(127)  # (N,)
    rounded = (weight / scales.clamp(min=1e-30).unsqueeze(1)).round_().clamp_(-127, 127)
    return rounded.to(torch.int8), scales


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> uint8 (N, G/2, K/G) and bf16 scales (N, K/G); G is the group.

    Input j * K/G + c belongs to group c. Byte [n, j, c] holds input j in its low half, input j + G/2 in its high one,
    each as its number plus 8.
    """
    weight = weight.float().unflatten(1, (group, -1))  # (N, G, K/G)
    largest = weight.gather(1, weight.abs().argmax(dim=1, keepdim=True))  # (N, 1, K/G), with its sign
    scales = (largest / -8).to(torch.bfloat16)
    # Divide by the scale as it is stored: its rounding is then no error of the weights.
    divisor = torch.where(scales == 0, 1.0, scales.float())
    numbers = (weight / divisor).round_().clamp_(-8, 7).add_(8).to(torch.uint8)  # (N, G, K/G)
    low, high = numbers.chunk(2, dim=1)
    return low | (high << 4), scales.squeeze(1)


def quantize(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> integers and scales, by blocks of rows, read and let go: a large head is never held in fp32."""
    (N, K), device = weight.shape, weight.device
    if scheme == "int8":
        numbers, scales = torch.empty(N, K, dtype=torch.int8, device=device), torch.empty(N, device=device)
    else:
        group = group_size(K)
        numbers = torch.empty(N, group // 2, K // group, dtype=torch.uint8, device=device)
        scales = torch.empty(N, K // group, dtype=torch.bfloat16, device=device)
    step = block_rows(QUANTIZE_BYTES, K, device)
    for at in range(0, N, step):
        rows = weight[at : at + step]
        block = quantize_int8(rows) if scheme == "int8" else quantize_int4(rows, group)
        numbers[at : at + step], scales[at : at + step] = block
        release(rows)
    return numbers, scales


def block_rows(block_bytes: int, inputs: int, device: torch.device) -> int:
    """Rows of `inputs` fp32 numbers at a time: 64 times as many on a GPU, where every block is a launch."""
    return max(1, block_bytes * (1 if device.type == "cpu" else 64) // (4 * inputs))


def group_size(inputs: int) -> int:
    """The even divisor of `inputs` nearest to 32; where some leave whole vectors of 16 groups, one of those."""
    even = [size for size in range(2, inputs + 1, 2) if inputs % size == 0]
    if not even:
        raise ValueError(f"int4 takes two weights a byte, and a layer has {inputs} inputs: use int8")
    whole = [size for size in even if (inputs // size) % 16 == 0 and size >= GROUP_INPUTS // 2]
    return min(whole or even, key=lambda size: abs(size - GROUP_INPUTS))


class QuantLinear(nn.Module):
    """A linear layer without bias whose weights are integers. `dtype` is that of its activations."""

    is_quantized = True
    numbers: Tensor  # int8 (N, K), uint8 (N, G/2, K/G), or packed (N, K/2)
    scales: Tensor  # fp32 (N,), bf16 (N, K/G), or (K/32, N, 2) beside packed numbers

    def __init__(self, weight: Tensor, scheme: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.scheme = dtype, scheme
        self.out_features, self.in_features = weight.shape
        numbers, scales = self._quantize(weight)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(weight, self.scheme)

    @property
    def weight(self) -> Tensor:
        """The weights that the integers stand for, (N, K) in the dtype of the activations."""
        return self.rows(0, self.out_features)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of `weight`."""
        return dequantize(self.numbers[start:stop], self.scales[start:stop]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        step = block_rows(BLOCK_BYTES, self.in_features, self.numbers.device)
        blocks = [self._outputs(x, at, at + step) for at in range(0, self.out_features, step)]
        return torch.cat(blocks, dim=-1)  # (..., N)

    def _outputs(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs start..stop. int8 scales them and not the weights, which it would take a pass of their own."""
        if self.scheme != "int8" or self.dtype == torch.float16:  # whose range sums of unscaled products would leave
            return F.linear(x, self.rows(start, stop))
        products = F.linear(x, self.numbers[start:stop].to(self.dtype))  # -127..127 are exact in bf16
        return (products.float() * self.scales[start:stop]).to(self.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # `model.to(torch.bfloat16)` is about the activations: scales keep their precision.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.numbers.device))
        self.dtype = probe.dtype
        for name, buffer in list(self._buffers.items()):
            assert buffer is not None
            self._buffers[name] = buffer.to(probe.device)
        return self


class PackedLinear(QuantLinear):
    """int4 as `nanollama.speed.int4` packs it for bf16 activations; others are rounded to bf16 on the way in."""

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        N, K = weight.shape
        numbers = torch.empty(N, K // 2, dtype=torch.uint8)
        scales = torch.empty(K // int4.GROUP, N, 2, dtype=torch.bfloat16)
        step = self._step(QUANTIZE_BYTES)
        for at in range(0, N, step):
            rows = weight[at : at + step]
            numbers[at : at + step], scales[:, at : at + step] = int4.quantize(rows)
            release(rows)
        return numbers, scales

    def rows(self, start: int, stop: int) -> Tensor:
        return int4.dequantize(self.numbers[start:stop], self.scales[:, start:stop]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if len(flat) <= PROMPT_ROWS:
            products = int4.matmul(flat.to(torch.bfloat16), self.numbers, self.scales)
        else:
            step = self._step(BLOCK_BYTES)
            blocks = range(0, self.out_features, step)
            products = torch.cat([F.linear(flat, self.rows(at, at + step)) for at in blocks], dim=-1)
        return products.to(x.dtype).unflatten(0, x.shape[:-1])

    def _step(self, block_bytes: int) -> int:
        """Rows at a time, in whole blocks of the kernel's."""
        rows = block_rows(block_bytes, self.in_features, torch.device("cpu"))
        return max(rows // int4.ROWS, 1) * int4.ROWS


def quantized_linear(weight: Tensor, scheme: str, dtype: torch.dtype, device: torch.device) -> QuantLinear:
    """The layer in the form that this device multiplies fastest."""
    is_packed = scheme == "int4" and device.type == "cpu" and int4.fits(weight, dtype)
    return (PackedLinear if is_packed else QuantLinear)(weight, scheme, dtype).to(device)


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """fp32 (N, K) from any form."""
    if scales.ndim == 3:
        return int4.dequantize(numbers, scales)
    if numbers.dtype == torch.int8:
        return numbers.float() * scales.unsqueeze(1)
    both = torch.cat((numbers & 15, numbers >> 4), dim=1).float() - 8  # (N, G, K/G)
    return (both * scales.float().unsqueeze(1)).flatten(1)


def load_quantized(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    scheme: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Transformer:
    """A quantised model straight from a checkpoint's weights, read one matrix at a time and let go.

    dtype: of activations, norms and embedding; None: as stored. device: None: the weights' own. Raises ValueError for
    an unknown scheme.
    """
    with torch.device("meta"):
        model = Transformer(config)
    norm = weights["norm.weight"]
    dtype, device = dtype or norm.dtype, torch.device(device or norm.device)
    if scheme not in SCHEMES:
        raise ValueError(f"quantize is {scheme!r}: expected one of {', '.join(SCHEMES)}")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # What is kept comes first: the embedding's copy, the largest, is made before the integers fill the memory.
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        if parent in linears:
            continue
        # A copy, so that nothing keeps the checkpoint's file mapped.
        weight = weights[name]
        kept = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(parent), last, kept)
        release(weight)
    for name in linears:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantized_linear(weights[f"{name}.weight"], scheme, dtype, device))
    if model.output is None:
        head = quantized_linear(weights["tok_embeddings.weight"], scheme, dtype, device)
        model.output = head  # type: ignore[assignment]
    return model


def weight_bytes(model: nn.Module) -> int:
    """Memory of the weights in the form in which they are kept."""
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def release(tensor: Tensor) -> None:
    """Its pages are not needed now: those of a mapped file leave the resident memory (advice, on Linux)."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page  # the whole pages inside of it
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT)
