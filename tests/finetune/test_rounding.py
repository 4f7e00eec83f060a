"""Stochastic rounding: right on average, blind to no small step, repeatable."""

import pytest
import torch
from torch import Tensor, nn

from finetune.config import TrainConfig
from finetune.optim import RoundingAdamW, make_optimizer, round_

SIZE = 4096


def test_rounding_is_right_on_average_and_goes_to_a_neighbour() -> None:
    values = torch.full((200_000,), 0.02) * torch.tensor([1.0, -1.0]).repeat(100_000)
    target = torch.empty(200_000, dtype=torch.bfloat16)
    round_(target, values, torch.Generator().manual_seed(0))
    neighbours = target.abs().unique().float()
    assert len(neighbours) == 2 and neighbours[0] < 0.02 < neighbours[1]
    spread = float(neighbours[1] - neighbours[0])
    assert abs(float(target.float().abs().mean()) - 0.02) < 5 * spread / 2 / 200_000**0.5
    exact = torch.tensor([1.0, -2.5, 0.0, 1e-30]).bfloat16().float()
    for seed in range(20):
        kept = torch.empty(4, dtype=torch.bfloat16)
        round_(kept, exact, torch.Generator().manual_seed(seed))
        assert torch.equal(kept.float(), exact)  # what bf16 holds stays as it is


def moved(weights: Tensor, how: str) -> float:
    """Mean change of weights of 0.02 in 100 AdamW steps at 1e-5, their gradients alike but noisy."""
    parameter = nn.Parameter(weights.clone())
    arguments = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}
    group = [{"params": [parameter], "weight_decay": 0.0}]
    optimizer = (
        RoundingAdamW(group, seed=1, **arguments) if how == "stochastic" else torch.optim.AdamW(group, **arguments)
    )  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        parameter.grad = (1e-3 + 3e-4 * torch.randn(SIZE, generator=generator)).to(parameter.dtype)
        optimizer.step()
    return float((parameter.detach().double() - weights.double()).mean())


def test_small_steps_count() -> None:
    weights = torch.full((SIZE,), 0.02)
    fp32 = moved(weights, "plain")
    assert fp32 == pytest.approx(-1e-3, rel=0.1)
    assert moved(weights.bfloat16(), "plain") == 0.0  # each step rounded away
    assert moved(weights.bfloat16(), "stochastic") == pytest.approx(fp32, rel=0.1)


def test_fp32_parameters_are_updated_as_by_torch() -> None:
    weights = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    assert moved(weights, "stochastic") == pytest.approx(moved(weights, "plain"), rel=1e-5)


def test_a_step_depends_on_seed_and_step_alone() -> None:
    def run(seed: int, noise: bool) -> Tensor:
        model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
        nn.init.constant_(model.weight, 0.02)
        optimizer = make_optimizer(model, TrainConfig(lr=1e-4, weights="bf16", seed=seed))
        for n in range(3):
            model.weight.grad = torch.full_like(model.weight, 1e-3 * (n + 1))
            if noise:
                torch.rand(7)
            optimizer.step()
        return model.weight.detach()

    assert torch.equal(run(1, False), run(1, True))
    assert not torch.equal(run(1, False), run(2, False))
