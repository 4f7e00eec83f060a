"""Moments in bytes follow those in fp32: nothing small is lost, training learns as much, memory is what is promised."""

import pytest
import torch
from torch import Tensor, nn

from finetune.optim import SHARE_SCALE, RoundingAdamW, moments_bytes, new_moments, read, write_

SIZE = 4 * SHARE_SCALE
WHOLE = slice(0, SIZE)


def through(name: str, values: Tensor, seed: int = 0) -> Tensor:
    state = new_moments(torch.zeros(4, SHARE_SCALE), eight_bit=True)
    write_(state, name, WHOLE, values, torch.Generator().manual_seed(seed))
    return read(state, name, WHOLE)


def spread() -> Tensor:
    """Every block spans seven orders of magnitude."""
    return torch.logspace(-7, 0, SIZE).view(SHARE_SCALE, 4).T.reshape(-1)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_bytes_are_near_on_average_and_keep_signs(name: str) -> None:
    signs = torch.tensor([1.0, -1.0] if name == "exp_avg" else [1.0, 1.0]).repeat(SIZE // 2)
    values = spread() * signs
    kept = torch.stack([through(name, values, seed) for seed in range(200)])
    assert (kept.sign() * signs >= 0).all()
    large = values.abs() > 1e-2
    torch.testing.assert_close(kept.mean(0)[large], values[large], rtol=0.05, atol=0)
    assert torch.equal(kept[0].view(-1, SHARE_SCALE).abs().amax(1), values.view(-1, SHARE_SCALE).abs().amax(1))


def test_a_second_moment_is_never_rounded_to_nothing() -> None:
    for seed in range(20):
        assert (through("exp_avg_sq", spread(), seed) > 0).all()
    assert (through("exp_avg", spread()) == 0).any()  # a first moment may be
    assert not through("exp_avg_sq", torch.zeros(SIZE)).any()


def test_a_moment_decays_by_less_than_its_steps() -> None:
    """0.1% a step is less than half the distance of two bytes: rounding to the nearest would keep it for ever."""
    state, generator = new_moments(torch.zeros(4, SHARE_SCALE), eight_bit=True), torch.Generator().manual_seed(0)
    values = torch.full((SIZE,), 0.5)
    values[::SHARE_SCALE] = 1.0  # holds the scale
    write_(state, "exp_avg_sq", WHOLE, values, generator)
    for _ in range(500):
        decayed = read(state, "exp_avg_sq", WHOLE).mul_(0.999)
        decayed[::SHARE_SCALE] = 1.0
        write_(state, "exp_avg_sq", WHOLE, decayed, generator)
    others = read(state, "exp_avg_sq", WHOLE).view(-1, SHARE_SCALE)[:, 1:]
    assert float(others.mean()) == pytest.approx(0.5 * 0.999**500, rel=0.05)


def last_loss(kind: str, dtype: torch.dtype, lr: float = 1e-2) -> float:
    """Of a small network after 200 steps on noisy lines whose inputs span three orders of magnitude."""
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=draws)
    model.to(dtype)
    arguments = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), weight_decay=0.0, **arguments)  # type: ignore[arg-type]
        if kind == "fp32"
        else RoundingAdamW(model.parameters(), seed=0, eight_bit=True, **arguments)  # type: ignore[arg-type]
    )
    scales, target = torch.logspace(-3, 0, 32), torch.randn(32, 16, generator=draws)
    for _ in range(200):
        x = torch.randn(64, 32, generator=draws) * scales
        loss = (model(x.to(dtype)).float() - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns_as_much(dtype: torch.dtype) -> None:
    exact, untrained = last_loss("fp32", torch.float32), last_loss("fp32", torch.float32, lr=0.0)
    assert exact < 0.1 * untrained
    assert last_loss("bytes", dtype) < exact + 0.02 * untrained


def test_their_memory_is_two_bytes_and_a_thirty_second() -> None:
    even, odd = torch.zeros(64, SHARE_SCALE), torch.zeros(7, 3)
    assert moments_bytes([even], eight_bit=True) == even.numel() * 2 + even.numel() // 32
    assert moments_bytes([even, odd], eight_bit=False) == 2 * (even.nbytes + odd.nbytes)
    assert moments_bytes([odd], eight_bit=True) == 2 * odd.nbytes  # no whole block: as they were
    assert moments_bytes([even.bfloat16()], eight_bit=False) == even.nbytes
