"""Ten steps of finetune's own loop on a tiny model, over any mesh, and what a rank found: for the tests of meshes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from finetune.build import fresh_weights, wrap_
from finetune.config import TrainConfig, resolve
from finetune.data.documents import Ints
from finetune.data.packing import Batch, Packer
from finetune.gather import full
from finetune.lora import LoraLinear, add_lora_
from finetune.mesh import mesh_sizes
from finetune.optim import make_optimizer, trained
from finetune.parallelize import World, make_world
from finetune.train import accumulate_
from nanollama.model import ModelConfig, Transformer

# 61 tokens: no number of ranks shares them evenly.
SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, hidden_dim=48, rope_theta=10_000.0)
LENGTHS = [30, 5, 20, 3, 11, 2, 9, 17, 26, 4, 8, 13]  # of documents; a row of 30 holds several, or one
SEQ_LEN, ROWS, STEPS = 30, 4, 10  # rows of a step, over all ranks and micro-batches
TARGETS = ("wq", "wv", "wo", "w1", "w2")
ALONE = World(torch.device("cpu"))


class Letters:
    """Documents of seeded tokens; token 1 is BOS."""

    bos_id = 1

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.lengths: Ints = np.array(LENGTHS)
        self.texts = [np.append(1, generator.integers(2, SHAPE.vocab_size, n - 1)) for n in LENGTHS]

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return self.texts[document][start:stop]


@dataclass(frozen=True)
class Mesh:
    """A way to spread a run, and what is trained."""

    fsdp: int = 0
    tp: int = 0
    method: str = "full"
    changes: dict[str, Any] = field(default_factory=dict)  # of TrainConfig
    steps: int = STEPS
    tied: bool = False

    def world(self) -> World:
        sizes = mesh_sizes(0, self.fsdp, self.tp, world_size=dist.get_world_size())
        return make_world("cpu", dist.get_rank(), sizes)


def make_model(mesh: Mesh, dtype: torch.dtype = torch.float32) -> Transformer:
    shape = SHAPE if not mesh.tied else ModelConfig(**{**vars(SHAPE), "tied": True})
    weights = fresh_weights(shape, torch.Generator().manual_seed(0))
    model = Transformer.from_weights(shape, {n: 2 * w if w.ndim > 1 else w for n, w in weights.items()}, dtype=dtype)
    if mesh.method == "lora":
        generator = torch.Generator().manual_seed(1)
        add_lora_(model, 4, 8.0, TARGETS, 0.0, generator)
        for module in model.modules():
            if isinstance(module, LoraLinear):  # B is not zero, or A would have no gradient
                module.lora_A.data = module.lora_A.data.to(dtype)
                module.lora_B.data = torch.randn(module.lora_B.shape, generator=generator).to(dtype)
    return model


def make_config(mesh: Mesh) -> TrainConfig:
    config = resolve(TrainConfig(init="260K", **mesh.changes), "cpu", 1)
    object.__setattr__(config, "method", mesh.method)  # a checkpoint is what it would ask for
    return config


def batches_of(packer: Packer, step: int, world: World, rows: int = ROWS) -> list[Batch]:
    """This rank's micro-batches, a row each; one row of a step has no document, and the last ranks fewer labels."""
    listed = [[(step + 3 * i) % len(LENGTHS)] for i in range(rows - 1)] + [[]]
    return [packer.batch([row]) for row in listed[world.data_rank :: world.data_size]]


def train(mesh: Mesh, world: World, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> dict[str, Any]:
    """Losses and norms of all steps, the first one's gradients and the last one's weights."""
    model, config, packer = make_model(mesh, dtype), make_config(mesh), Packer(Letters(), SEQ_LEN)
    loss_model = wrap_(model, config, world)
    optimizer, autocast = make_optimizer(model, config), torch.autocast("cpu", torch.bfloat16, config.dtype == "bf16")
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": {}}
    for step in range(mesh.steps):
        batches = batches_of(packer, step, world, rows)
        labels = float(world.sum([float(sum(batch.valid for batch in batches))]))
        nats = accumulate_(loss_model, batches, labels, autocast, world)
        found["losses"].append(float(world.sum(nats)) / labels)
        if not step:
            found["grads"] = {name: whole_grad(p) for name, p in trained(model).items()}
        norm = torch.nn.utils.clip_grad_norm_(list(trained(model).values()), 0.5)
        found["norms"].append(float(full(norm)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found["weights"] = {name: full(p).clone() for name, p in trained(model).items()}
    return found


def whole_grad(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return full(parameter.grad).clone()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


UNIT = 6e-8  # of fp32


def worst_gradient(found: dict[str, Any], one: dict[str, Any], other: dict[str, Any], exact: dict[str, Any]) -> float:
    """G8: the largest error of a parameter's gradient, as a multiple of what two layouts in one process are off by."""
    assert found["grads"].keys() == exact["grads"].keys()
    ratios = []
    for name, truth in exact["grads"].items():
        noise = max(rms(alone["grads"][name] - truth) for alone in (one, other))
        ratios.append(rms(found["grads"][name] - truth) / max(noise, UNIT * rms(truth) / 2))
    return max(ratios)


def worst_step(
    what: str, found: dict[str, Any], one: dict[str, Any], other: dict[str, Any], exact: dict[str, Any]
) -> float:
    """The same of ten losses or norms; the noise of a step is the largest up to it, since errors add up."""
    noise, worst = 0.0, 0.0
    for mine, a, b, truth in zip(*(run[what] for run in (found, one, other, exact)), strict=True):
        noise = max(noise, abs(a - truth), abs(b - truth), UNIT * abs(truth))
        worst = max(worst, abs(mine - truth) / noise)
    return worst
