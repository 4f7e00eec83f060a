"""What ranks write and read: checkpoints, final models, parts of files, answers; see test_mesh_files.py."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.build import wrap_
from finetune.data.packing import Packer
from finetune.gather import full, gathering
from finetune.lora import merged_when_read
from finetune.optim import make_optimizer, trained
from finetune.parallelize import World
from finetune.resume import Progress, RunFolder, saved_tensors
from finetune.sharding import answering, cut_layers_, rest_, shard_blocks_
from finetune.train import accumulate_
from mesh_cases import Letters, Mesh, batches_of, make_config, make_model
from nanollama.checkpoint import open_checkpoint, write_meta
from nanollama.checkpoint.weights import Lazy, Weights
from nanollama.generation.llama import Llama, Sampling
from nanollama.generation.parallel import load_parallel
from nanollama.model import Transformer
from nanollama.tensor_parallel import fill_
from parity.machine import anonymous_bytes

PROMPTS = [[1, 7, 9, 4], [1, 30, 2]]
SAMPLING = Sampling(max_new_tokens=24, stop_ids=frozenset())
FP32 = torch.autocast("cpu", enabled=False)


def run_steps(mesh: Mesh, world: World, steps: int, folder: RunFolder | None = None) -> tuple[Transformer, Any]:
    """A model and its optimizer after so many steps, from the folder's checkpoint where there is one."""
    model, config, packer = make_model(mesh), make_config(mesh), Packer(Letters(), 30)
    loss_model = wrap_(model, config, world)
    optimizer = make_optimizer(model, config)
    if folder:
        folder.restore_(model, optimizer, "data")
    for step in range(steps):
        batches = batches_of(packer, step, world)
        labels = float(world.sum([float(sum(batch.valid for batch in batches))]))
        accumulate_(loss_model, batches, labels, FP32, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def save(model: Transformer, optimizer: Any, mesh: Mesh, world: World, out: Path) -> None:
    with gathering(saved_tensors(model, optimizer), world) as whole:
        if whole is not None:
            RunFolder(out, make_config(mesh)).save(Progress(2), model, optimizer, "data", whole)
    dist.barrier()


def states(model: Transformer, optimizer: Any) -> dict[str, Tensor]:
    """Weights and moments, whole."""
    return {name: full(tensor).clone() for name, tensor in saved_tensors(model, optimizer).items()}


def counted(weights: Weights, read: list[int]) -> Weights:
    """The same weights; every number that is read is counted."""

    def entry(name: str) -> Lazy:
        def rows(start: int, stop: int) -> Tensor:
            block = weights.rows(name, start, stop)
            read[0] += block.numel()
            return block

        return Lazy(weights.shapes[name], weights.dtypes[name], rows)

    return Weights({name: entry(name) for name in weights})


def fill(mesh: Mesh, checkpoint: Path) -> dict[str, Any]:
    """A model that each rank read its part of, whole again; and the numbers that this rank has and has read."""
    opened, world, read = open_checkpoint(checkpoint), mesh.world(), [0]
    with torch.device("meta"):
        model = Transformer(opened.config)
    cut_layers_(model, world)
    shard_blocks_(model, world)
    fill_(model, counted(opened.weights, read), torch.float32, "cpu")
    own = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
    return {"weights": {n: full(p).clone() for n, p in model.named_parameters()}, "own": own, "read": read[0]}


def fill_large(folder: Path) -> dict[str, Any]:
    """Anonymous memory, in bytes, that reading a part of a larger model takes, on each mesh of four ranks."""
    found = {}
    for name, mesh in (("small", Mesh(fsdp=2, tp=2)), ("fsdp", Mesh(fsdp=4)), ("fsdp x tp", Mesh(fsdp=2, tp=2))):
        world, opened = mesh.world(), open_checkpoint(folder / ("checkpoint" if name == "small" else "large"))
        with torch.device("meta"):
            model = Transformer(opened.config)
        cut_layers_(model, world)
        shard_blocks_(model, world)
        before = anonymous_bytes(os.getpid())
        fill_(model, opened.weights, torch.float32, "cpu")
        found[name] = anonymous_bytes(os.getpid()) - before
        del model
    return found


def answers(llama: Llama) -> list[list[float]]:
    """(prompt, token, logprob) of each event."""
    return [[e.prompt, e.token, e.logprob] for e in llama.generate(PROMPTS, SAMPLING)]


def answer_in_training(mesh: Mesh, world: World) -> list[list[float]]:
    model, _ = run_steps(mesh, world, 1)
    with answering(model, world):
        found = answers(Llama(model.eval()))
    model.train()
    rest_(model)
    return found


def fail(world: World) -> str:
    """A writer that fails must leave no rank waiting."""
    tensors = {"a": torch.ones(1)}
    try:
        with gathering(tensors, world) as whole:
            if whole is not None:
                raise OSError("full")
    except OSError as error:
        return str(error)
    return "went on"


def work(folder: Path) -> dict[str, Any]:
    """Everything on two ranks; the test has put a checkpoint of each kind into the folder."""
    found: dict[str, Any] = {}
    for name, mesh in (("fsdp", Mesh(fsdp=2)), ("tp", Mesh(tp=2)), ("tp lora", Mesh(tp=2, method="lora"))):
        world = mesh.world()
        model, optimizer = run_steps(mesh, world, 2)
        save(model, optimizer, mesh, world, folder / name)
        found[f"{name} states"] = states(model, optimizer)
        again, restored = run_steps(mesh, world, 0, RunFolder(folder / f"{name} alone", make_config(mesh)))
        found[f"{name} restored"] = states(again, restored)
        with gathering(dict(model.named_parameters()), world) as whole:
            if whole is not None:
                write_meta(folder / f"{name} final", model.config, merged_when_read(model, whole))
        found[f"{name} weights"] = {n: full(p).clone() for n, p in model.named_parameters()}
        found[f"{name} trained"] = sorted(trained(model))
        if "lora" not in name:
            found[f"{name} filled"] = fill(mesh, folder / "checkpoint")
            found[f"{name} answers"] = answer_in_training(mesh, world)
    found["failure"] = fail(Mesh(fsdp=2).world())
    found["generated"] = answers(load_parallel(folder / "checkpoint", 2))
    return found
