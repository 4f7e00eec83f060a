"""The gradients of adapters: LoRA (arXiv 2106.09685), W + s B A, and DoRA (arXiv 2402.09353, equation 5), whose rows
are as long as a magnitude m says: m (W + s B A) / |W + s B A|, each row's norm a constant, as section 4.3 has it.

The whole matrices stand in the model's place; what their gradients say of A, B and m follows by the chain rule. Or the
products are taken as adapters usually are, W x + s B (A x): other sums, so another throw of the rounding. Those of q
and k are left out: their rows have another order in other layouts.

Written to OUT/adapters.safetensors: KIND/grad/LAYER.PART, KIND/padded/LAYER.PART of all documents in one batch,
KIND/beside/LAYER.PART by products beside the matrix, PART one of lora_A, lora_B, lora_magnitude; returned for
trace.json: the loss of each kind.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reference.training import Document, Trainable, changed, label_nats, padded_nats

FILE = "adapters.safetensors"


def made_up_adapter(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """Float32 numbers that any process makes alike from a weight (outputs, inputs): products and their fractions."""
    narrow = weight.detach().float()
    return {
        "lora_A": (torch.frac(narrow[:rank] * 8191.0) - 0.5) * 2.0**-3,  # (rank, inputs)
        "lora_B": (torch.frac(narrow[:, :rank] * 4093.0) - 0.5) * 2.0**-4,  # (outputs, rank)
        "lora_magnitude": 1 + torch.frac(narrow[:, 0] * 2039.0) / 2,  # (outputs,)
    }


def leaves_of(weight: Tensor, rank: int, kind: str) -> dict[str, Tensor]:
    """The parts that this kind has, in the weight's dtype, to be given gradients."""
    made = made_up_adapter(weight, rank)
    if kind == "lora":
        del made["lora_magnitude"]
    return {part: value.to(weight.dtype).requires_grad_() for part, value in made.items()}


def with_adapter(weight: Tensor, parts: dict[str, Tensor], scale: float, kind: str) -> Tensor:
    """The whole matrix, with gradients to the parts that this kind has."""
    whole = weight + scale * (parts["lora_B"] @ parts["lora_A"])
    if kind == "lora":
        return whole
    assert kind == "dora", kind
    return whole * (parts["lora_magnitude"] / whole.detach().norm(dim=1)).unsqueeze(1)


class Beside(TorchFunctionMode):
    """While it is entered, a product with one of the matrices of `parts` has its adapter's product beside it."""

    def __init__(self, parts: dict[Tensor, dict[str, Tensor]], scale: float) -> None:
        super().__init__()
        self.parts, self.scale = parts, scale

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear or args[1] not in self.parts:
            return out
        x, weight, own = args[0], args[1].detach(), self.parts[args[1]]
        out = out + self.scale * func(func(x, own["lora_A"]), own["lora_B"])
        if "lora_magnitude" not in own:
            return out
        whole = weight + self.scale * (own["lora_B"].detach() @ own["lora_A"].detach())
        return out * (own["lora_magnitude"] / whole.norm(dim=1))


def run_adapters(trainable: Trainable, asked: dict[str, Any], documents: list[Document], out: Path) -> dict[str, float]:
    """The loss of each kind; its gradients go into a file. The parameters are as before, after it."""
    chosen = {n: p for n, p in trainable.parameters.items() if n.endswith(tuple(asked["targets"]))}
    scale, tensors, losses = asked["alpha"] / asked["rank"], dict[str, Tensor](), dict[str, float]()
    for kind in asked["kinds"]:
        parts = {name: leaves_of(weight, asked["rank"], kind) for name, weight in chosen.items()}
        wholes = {name: with_adapter(chosen[name].detach(), own, scale, kind) for name, own in parts.items()}
        named = {f"{name.removesuffix('.weight')}.{p}": v for name, own in parts.items() for p, v in own.items()}
        leaves, found = list(named.values()), dict[str, tuple[Tensor, ...]]()
        with changed(chosen, wholes):
            for way, nats in (("padded", padded_nats), ("grad", label_nats)):
                if way == "padded" and not trainable.batched:
                    continue
                loss = nats(trainable, documents).mean()
                losses[kind] = float(loss.detach())
                gradients = torch.autograd.grad(loss, list(chosen.values()))
                found[way] = torch.autograd.grad(list(wholes.values()), leaves, gradients, retain_graph=True)
        if trainable.batched:
            with Beside({chosen[name]: own for name, own in parts.items()}, scale):
                found["beside"] = torch.autograd.grad(label_nats(trainable, documents).mean(), leaves)
        for way, each in found.items():
            tensors |= {f"{kind}/{way}/{name}": g.contiguous() for name, g in zip(named, each, strict=True)}
    save_file(tensors, out / FILE)
    return losses
