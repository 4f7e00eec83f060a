"""AdamW's two moments: as fine as the weights, or in bytes (--optimizer adamw8bit), a quarter of what fp32 takes.

In bytes, 256 numbers share a scale, their largest. A signed byte c stands for c |c| / 127^2 of it, an unsigned one for
(c / 255)^4: such steps are finest near zero, and the squared gradients of one block span many orders of magnitude.
Rounding is stochastic, so that a moment which decays by less than a step does decay, on average.

    state = new_moments(parameter, eight_bit=True)
    write_(state, "exp_avg", slice(0, 512), values, generator)
    read(state, "exp_avg", slice(0, 512))
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SHARE_SCALE = 256  # numbers
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


def new_moments(parameter: Tensor, eight_bit: bool) -> dict[str, Tensor]:
    """Zeros: like the parameter, or bytes and their scales. What does not divide into whole blocks keeps its dtype."""
    if not eight_bit or parameter.numel() % SHARE_SCALE:
        return {name: torch.zeros_like(parameter) for name in CODES}
    scales = torch.zeros(parameter.numel() // SHARE_SCALE, dtype=torch.float32, device=parameter.device)
    codes = {name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in CODES.items()}
    return codes | {f"{name}_scale": scales.clone() for name in CODES}


def moments_bytes(parameters: Iterable[Tensor], eight_bit: bool) -> int:
    """What the moments of all parameters will take."""
    on_meta = (torch.empty_like(parameter, device="meta") for parameter in parameters)
    return sum(tensor.nbytes for parameter in on_meta for tensor in new_moments(parameter, eight_bit).values())


def read(state: dict[str, Tensor], name: str, part: slice) -> Tensor:
    """Numbers `part` of a moment, whole blocks of it: (n,) fp32, in memory of their own."""
    stored = state[name].view(-1)[part]
    if stored.dtype.is_floating_point:
        return stored.to(torch.float32, copy=True)
    parts = stored.float().view(-1, SHARE_SCALE).div_(torch.iinfo(stored.dtype).max)  # (n / SHARE_SCALE, SHARE_SCALE)
    spread = parts.mul_(parts.abs()) if stored.dtype == torch.int8 else parts.square_().square_()
    return spread.mul_(state[f"{name}_scale"][_blocks(part)].unsqueeze(1)).view(-1)


def write_(state: dict[str, Tensor], name: str, part: slice, values: Tensor, generator: torch.Generator) -> None:
    """Put fp32 values (n,) there, rounded."""
    stored = state[name].view(-1)[part]
    if stored.dtype.is_floating_point:
        round_(stored, values, generator)
        return
    blocks, largest = values.view(-1, SHARE_SCALE), torch.iinfo(stored.dtype).max
    scales = blocks.abs().amax(1)  # (n / SHARE_SCALE,)
    state[f"{name}_scale"][_blocks(part)] = scales
    parts = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    roots = parts.abs().sqrt_()
    codes = (roots.copysign_(parts) if stored.dtype == torch.int8 else roots.sqrt_()).mul_(largest)
    codes += torch.rand(codes.shape, generator=generator, device=codes.device)
    codes.floor_().clamp_(-largest, largest)
    if stored.dtype == torch.uint8:
        # Never zero where the number is not: a first moment over nothing would be a step of any size.
        codes.clamp_(min=1).mul_(blocks > 0)
    stored.copy_(codes.view(-1))


def _blocks(part: slice) -> slice:
    return slice(part.start // SHARE_SCALE, part.stop // SHARE_SCALE)


def round_(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Put fp32 `values` into `target`; into bf16 by chance, the nearer neighbour the likelier, so the mean is exact."""
    if target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    # bf16 is the upper half of fp32: a random lower half is added, and what carries into the upper one stays.
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    target.copy_((bits + chance).bitwise_and_(-(1 << 16)).view(torch.float32))
