"""Which parameters a method trains, the learning rate of each step, and AdamW with norms undecayed: torch's, or one
whose weights and moments are bf16 or bytes.

>>> config = resolve(TrainConfig(init="260K", lr=1.0, max_steps=100, warmup_steps=10), "cpu", 1)
>>> [round(learning_rate(config, step), 3) for step in (0, 4, 9, 55, 99)]
[0.1, 0.5, 1.0, 0.548, 0.1]
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.config import LORA_METHODS, TrainConfig
from finetune.gather import local
from finetune.lora import LORA_SUFFIXES
from finetune.loss import BLOCK_NUMBERS
from finetune.muon import EMBEDDINGS, MuonAndAdamW, is_orthogonalised
from nanollama.tensor_parallel import part_of


def is_trained(name: str, method: str) -> bool:
    """Whether `method` trains the weight with this name: the nano Llama 3.1's full, norms, no_embeddings; or LoRA's."""
    if method in LORA_METHODS:
        return name.endswith(LORA_SUFFIXES)
    if method == "norms":
        return name.endswith("norm.weight")
    return method == "full" or name not in EMBEDDINGS


def select_trained_(model: nn.Module, method: str) -> None:
    """Freeze the parameters that `method` leaves alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, method))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; one-dimensional ones (norms) without weight decay."""
    named = trained(model)
    muon = {n: p for n, p in named.items() if config.optimizer == "muon" and is_orthogonalised(n, p)}
    faster = [p for n, p in named.items() if config.lora_plus != 1 and n.endswith(".lora_B")]
    apart = {id(p) for p in (*muon.values(), *faster)}
    parameters = [p for p in named.values() if id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": faster, "weight_decay": config.weight_decay, "rate": config.lora_plus},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups, betas = [g for g in groups if g["params"]], (config.beta1, config.beta2)
    eight_bit = config.optimizer == "adamw8bit"
    if muon:
        return MuonAndAdamW(
            list(muon.values()),
            groups,
            lr=config.lr,
            momentum=config.beta2,
            decay=config.weight_decay,
            betas=betas,
            eps=config.eps,
        )
    if eight_bit or config.weights == "bf16":
        return RoundingAdamW(groups, lr=config.lr, betas=betas, eps=config.eps, seed=config.seed, eight_bit=eight_bit)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


class StepInBackward:
    """Updates each parameter as soon as its gradient is there, and frees the gradient: one exists at a time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.squares = optimizer, 0.0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update_)

    def _update_(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.squares += float(parameter.grad.float().square().sum())
        self.optimizer.step()  # parameters without a gradient, all the others, are left alone
        parameter.grad = None

    def norm(self) -> float:
        """Of all gradients since the last call."""
        norm, self.squares = math.sqrt(self.squares), 0.0
        return norm


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 0, 1, ..., max_steps - 1: linear warmup that ends at lr, then down to min_lr * lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps + 1) / max(1, config.max_steps - config.warmup_steps))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.lr * (config.min_lr + (1 - config.min_lr) * fall)


def set_learning_rate_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)  # a multiple of some groups' own


# --- AdamW that rounds by chance -------------------------------------------------------------------------------------


BLOCK_NUMBERS_GPU = 1 << 25  # each block is some 30 launches


def block_numbers(device: torch.device) -> int:
    """Numbers of a parameter that are updated at a time."""
    return BLOCK_NUMBERS_GPU if device.type == "cuda" else BLOCK_NUMBERS


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW whose parameters may be bf16, its moments too, or bytes: all rounded up or down by chance, so that steps
    far smaller than the distance between two bf16 numbers still count on average.

    A weight of 0.02 has neighbours 1.2e-4 away: at a learning rate of 1e-5 plain rounding gives every step back
    (torchtune#2254). The sums are fp32, a block of a matrix at a time, so no fp32 copy of the model exists: 8 bytes a
    parameter with gradient and both moments, where fp32 has 16. A step's random numbers depend on `seed` and the step
    alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
        eight_bit: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed, self.eight_bit = seed, eight_bit

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        place = 0  # of the parameter: each draws for itself, so the order of updates changes nothing
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), **new_moments(parameter, self.eight_bit)}
                state["step"] += 1
                n = int(state["step"])
                offsets = [rows.start for rows in part_of(parameter)] if isinstance(parameter, DTensor) else []
                seed = mixed_seed(self.seed, n, place, *offsets)  # a shard draws for itself, its copies what it draws
                generator = torch.Generator(parameter.device).manual_seed(seed)
                self._update_(parameter, group, state, n, generator)

    @staticmethod
    def _update_(parameter: Tensor, group: dict, state: dict, n: int, generator: torch.Generator) -> None:
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None
        weights, grads = local(parameter).view(-1), local(parameter.grad).reshape(-1)
        size = len(weights)
        step = block_numbers(parameter.device)
        for start in range(0, size, step):
            part = slice(start, min(start + step, size))
            p, grad = weights[part], grads[part].float()
            mean = read_moment(state, "exp_avg", part).lerp_(grad, 1 - beta1)
            square = read_moment(state, "exp_avg_sq", part).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = (mean / (1 - beta1**n)).div_((square / (1 - beta2**n)).sqrt_().add_(group["eps"]))
            moved = p.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])
            round_(p, moved, generator)
            write_moment_(state, "exp_avg", part, mean, generator)
            write_moment_(state, "exp_avg_sq", part, square, generator)


# --- Moments ---------------------------------------------------------------------------------------------------------
#
# As fine as the weights, or in bytes (--optimizer adamw8bit), a quarter of what fp32 takes: 256 numbers share a scale,
# their largest. A signed byte c stands for c |c| / 127^2 of it, an unsigned one for (c / 255)^4: such steps are finest
# near zero, and the squared gradients of one block span many orders of magnitude. Rounding is stochastic, so that a
# moment which decays by less than a step does decay, on average.


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


def read_moment(state: dict[str, Tensor], name: str, part: slice) -> Tensor:
    """Numbers `part` of a moment, whole blocks of it: (n,) fp32, in memory of their own."""
    stored = local(state[name]).view(-1)[part]
    if stored.dtype.is_floating_point:
        return stored.to(torch.float32, copy=True)
    parts = stored.float().view(-1, SHARE_SCALE).div_(torch.iinfo(stored.dtype).max)  # (n / SHARE_SCALE, SHARE_SCALE)
    spread = parts.mul_(parts.abs()) if stored.dtype == torch.int8 else parts.square_().square_()
    return spread.mul_(state[f"{name}_scale"][_blocks(part)].unsqueeze(1)).view(-1)


def write_moment_(state: dict[str, Tensor], name: str, part: slice, values: Tensor, generator: torch.Generator) -> None:
    """Put fp32 values (n,) there, rounded."""
    stored = local(state[name]).view(-1)[part]
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


def mixed_seed(*numbers: int) -> int:
    """A seed that depends on a few integers alone, so that a resumed run draws the same random numbers again.

    32 bits, a hash of them: torch's generator on CPU looks at the lower 32 bits of its seed alone.
    """
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
